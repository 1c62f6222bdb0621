"""PyTorch's `.bin` files that lie, are damaged, or are made to exhaust the machine."""

import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import (
    EMPTY,
    FILE,
    MB,
    NONE,
    ORDERED,
    PARAMETER,
    TENSOR,
    TRUE,
    archive,
    cheap,
    mapping,
    num,
    one,
    refused,
    storage,
    tensor,
    text,
    tup,
)
from waiting import LONG

# Views and storages that lie.

ROW = tensor(num(0), tup(num(1), num(4)), tup(num(4), num(1)))
"""A tensor of one row: not a storage."""

LIES = {
    "offset past the end": tensor(num(4)),
    "offset negative": tensor(num(-1)),
    "offset huge": tensor(num(2**63)),
    "offset no number": tensor(text("0")),
    "offset a float": tensor(b"G" + struct.pack(">d", 0)),
    "offset a bool": tensor(TRUE),
    "too long": tensor(size=tup(num(5))),
    "window past the end": tensor(num(1)),
    "stride past the end": tensor(size=tup(num(2)), stride=tup(num(4))),
    "stride negative": tensor(num(3), stride=tup(num(-1))),
    "stride overflows": tensor(size=tup(num(2)), stride=tup(num(2**62))),
    "stride wraps": tensor(size=tup(num(3)), stride=tup(num(2**63))),
    "stride 0 that multiplies": tensor(size=tup(num(2**40)), stride=tup(num(0))),
    "size negative": tensor(size=tup(num(-4))),
    "sizes negative": tensor(size=tup(num(-2), num(-2)), stride=tup(num(2), num(1))),
    "size huge": tensor(size=tup(num(2**62)), stride=tup(num(0))),
    "size empty but huge": tensor(
        size=tup(num(2**62), num(0), num(8)), stride=tup(*[num(1)] * 3)
    ),
    "sizes and strides": tensor(stride=tup(num(1), num(1))),
    "no strides": tensor(stride=NONE),
    "no sizes": tensor(size=NONE),
    "rank 100": tensor(size=tup(*[num(1)] * 100), stride=tup(*[num(1)] * 100)),
    "no storage": tensor(data=NONE),
    "text for a storage": tensor(data=text("abcd")),
    "dict for a storage": tensor(data=b"}"),
    "view of a row": tensor(num(1), tup(num(3)), tup(num(1)), ROW),
    "negated": tensor(num(0), tup(num(4)), tup(num(1)), None, mapping(text("neg"), TRUE)),
    "count too large": tensor(data=storage(count=num(5))),
    "count too small": tensor(data=storage(count=num(3)), size=tup(num(3))),
    "count huge": tensor(data=storage(count=num(2**62))),
    "count negative": tensor(data=storage(count=num(-4))),
    "count no number": tensor(data=storage(count=text("4"))),
    "count a float": tensor(data=storage(count=b"G" + struct.pack(">d", 4))),
    "type no storage": tensor(data=storage(kind=ORDERED)),
    "type text": tensor(data=storage(kind=text("FloatStorage"))),
    "type not fitting": tensor(data=storage(key=text("odd"), count=num(1))),
    "type unknown": tensor(data=storage(kind=b"ctorch\nQInt8Storage\n")),
    "key missing": tensor(data=storage(key=text("1"))),
    "key a number": tensor(data=storage(key=num(0))),
    "key a path": tensor(data=storage(key=text("../data/0"))),
    "key the pickle": tensor(data=storage(key=text("../data.pkl"))),
    "key absolute": tensor(data=storage(key=text("/etc/hostname"))),
    "id too short": tensor(data=tup(text("storage")) + b"Q"),
    "id of another kind": tensor(
        data=tup(text("module"), NONE, text("0"), NONE, num(4)) + b"Q"
    ),
    "id no tuple": tensor(data=num(0) + b"Q"),
    "too few arguments": TENSOR + tup(storage()) + b"R",
    "no arguments": TENSOR + EMPTY + b"R",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_tensor_that_lies_is_refused(lie: str) -> None:
    data = archive(one(LIES[lie]), {"0": struct.pack("<4f", 1, 2, 3, 4), "odd": b"\0" * 5})
    refused(data)
    cheap(data)


# Pickles that are no state dict, or no pickle.

NOT_A_STATE_DICT = {
    "a list": b"](" + tensor() + b"e",
    "a tensor": tensor(),
    "nothing": NONE,
    "a number": num(7),
    "a dict in a dict": one(one(tensor())),
    "a number in a dict": mapping(text("w"), tensor(), text("step"), num(7)),
    "text in a dict": one(text("hello")),
    "a key that is no text": mapping(num(0), tensor()),
    "a key that is a tuple": mapping(tup(text("w")), tensor()),
    "a key that is a tensor": mapping(tensor(), tensor()),
    "itself": b"}q\x07" + text("w") + b"h\x07s",
    "a list of itself": one(b"]q\x07h\x07a"),
    "a function": one(TENSOR),
    "a type": one(ORDERED),
    "a type of storage": one(b"ctorch\nFloatStorage\n"),
    "a parameter of nothing": one(PARAMETER + tup(num(1), TRUE, NONE) + b"R"),
    "an unknown memo": b"h\x63",
    "a negative memo": NONE + b"p-1\n",
    "an empty stack": b"R",
    "an open mark": b"(",
    "no end of line": b"c" + b"x" * 200,
    "an unknown opcode": b"\xff",
    "protocol 9": b"\x80\x09N",
    "a frame past the end": b"\x95" + struct.pack("<Q", 2**62),
    "text past the end": b"X" + struct.pack("<I", 2**31),
    "long text past the end": b"\x8d" + struct.pack("<Q", 2**62),
    "bytes past the end": b"\x8e" + struct.pack("<Q", 2**40),
    "an array of bytes past the end": b"\x96" + struct.pack("<Q", 2**40),
    "a number past the end": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a negative number of bytes": b"\x8b" + struct.pack("<i", -1),
    "an out-of-band buffer": b"\x97",
    "text that is no text": one(b"X\x01\0\0\0\xff"),
    "a long number": one(b"L" + b"9" * 5000 + b"L\n"),
}


@pytest.mark.parametrize("what", NOT_A_STATE_DICT)
def test_a_pickle_that_is_no_state_dict_is_refused(what: str) -> None:
    data = archive(NOT_A_STATE_DICT[what])
    refused(data)
    cheap(data)


BOMBS = {
    "one tensor many times": mapping(
        text("w")
        + tensor(size=tup(num(MB)), data=storage(text("big"), count=num(MB)))
        + b"q\x07",
        *[text(f"w{i}") + b"h\x07" for i in range(90)],
    ),
    "memo": one(NONE + b"r" + struct.pack("<I", 20_000_000)),
    "memo in text": one(NONE + b"p20000000\n"),
    "bytes": b"B" + struct.pack("<I", 64 * MB),
    "many bytes": b"\x8e" + struct.pack("<Q", 64 * MB),
    "byte array": b"\x96" + struct.pack("<Q", 64 * MB),
    "one storage many times": mapping(
        *[
            text(f"w{i}") + tensor(size=tup(num(MB)), data=storage(text("big"), count=num(MB)))
            for i in range(60)
        ]
    ),
    "one window many times": mapping(
        *[
            text(f"w{i}")
            + tensor(
                size=tup(num(MB // 2), num(2)),
                stride=tup(num(1), num(2)),
                data=storage(text("big"), count=num(MB)),
            )
            for i in range(60)
        ]
    ),
}


def _nested(count: int) -> bytes:
    """An archive of storages that lie inside each other: `count` times their size."""
    kinds = b"ctorch\nByteStorage\n"
    inner, members, sizes = bytes(MB), [], []
    for i in range(count):
        name = b"archive/data/%d" % i
        crc, size = zlib.crc32(inner), len(inner)
        start = struct.pack(
            "<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0, crc, size, size, len(name), 0
        )
        inner = start + name + inner
        members.append((name, crc, size, len(inner)))
        sizes.append(size)
    pairs = [
        text(f"w{i}") + tensor(size=tup(num(1)), data=storage(text(str(i)), kinds, num(size)))
        for i, size in enumerate(sizes)
    ]
    honest = archive(mapping(*pairs), {})
    end = honest.index(b"PK\1\2")
    directory, trailer = honest[end : honest.index(b"PK\5\6")], bytearray(honest[-22:])
    for name, crc, size, whole in members:
        directory += struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0, crc, size, size,
            len(name), 0, 0, 0, 0, 0, end + len(inner) - whole,
        ) + name  # fmt: skip
    struct.pack_into(
        "<HHII", trailer, 8, count + 2, count + 2, len(directory), end + len(inner)
    )
    return honest[:end] + inner + directory + bytes(trailer)


def test_storages_inside_each_other_are_not_multiplied() -> None:
    cheap(_nested(60))


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_never_takes_much_memory(bomb: str) -> None:
    big = {"0": struct.pack("<4f", 1, 2, 3, 4), "big": bytes(4 * MB)}
    cheap(archive(BOMBS[bomb], big if "one" in bomb else None))


SCRIPT = """
import sys
from pathlib import Path
from onnx_adapt.checkpoints.readers.pickles import read_pickled_tensors
from onnx_adapt.errors import CheckpointError
path = Path(sys.argv[1])
try:
    read_pickled_tensors(path.read_bytes(), path)
except CheckpointError:
    print("refused")
"""


@pytest.mark.parametrize(
    "key",
    {
        "a deep key": NONE + b"\x85" * 300_000,
        "a key that doubles": NONE + b"q\x07h\x07\x86" * 100,
        "a deep value": text("w") + b"(" * 300_000,
        "a long stack": NONE * 200_000 + b"(t0" * 200_000,
        "a name that doubles": NONE + b"q\x07h\x07\x86" * 100 + text("x") + b"\x93",
        "many tuples above a long stack": NONE * 100_000 + b"(t" * 100_000,
        "many items above a long stack": NONE * 100_000 + b"}" + b"(u" * 100_000,
    }.items(),
    ids=lambda item: item[0],
)
def test_no_nesting_makes_the_process_crash_or_hang(
    key: tuple[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(archive(mapping(key[1], tensor())))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, timeout=LONG
    )
    assert (done.returncode, done.stdout) == (0, "refused\n")


# Archives.


def _marked(flag: int) -> bytes:
    """An archive whose pickle is flagged, such as encrypted."""
    data = bytearray(archive(one(tensor())))
    for start, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(start) + place] |= flag
    return bytes(data)


ARCHIVES = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "a bare pickle": b"\x80\x02}.",
    "an empty archive": b"PK\5\6" + bytes(18),
    "no pickle": archive(NONE).replace(b"/data.pkl", b"/data.txt"),
    "two pickles": archive(one(tensor()), None, ("other/data.pkl", b"N.")),
    "the pickle twice": archive(one(tensor()), None, ("archive/data.pkl", b"N.")),
    "a storage twice": archive(one(tensor()), None, ("archive/data/0", b"\0" * 16)),
    "big-endian": archive(one(tensor()), None, ("archive/byteorder", b"big")),
    "another byte order": archive(one(tensor()), None, ("archive/byteorder", b"pdp")),
    "deflated": archive(one(tensor()), method=zipfile.ZIP_DEFLATED),
    "bzip2": archive(one(tensor()), method=zipfile.ZIP_BZIP2),
    "lzma": archive(one(tensor()), method=zipfile.ZIP_LZMA),
    "a zip bomb": archive(one(tensor()), {"0": bytes(64 * MB)}, method=zipfile.ZIP_DEFLATED),
    "encrypted": _marked(1),
    "strongly encrypted": _marked(64),
    "patched": _marked(32),
    "a wrong checksum": archive(one(tensor())).replace(
        struct.pack("<4f", 1, 2, 3, 4), bytes(16)
    ),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive_that_torch_does_not_write_is_refused(what: str) -> None:
    assert FILE.name in refused(ARCHIVES[what]).message
    cheap(ARCHIVES[what])


LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00(X\x10\x00"
    b"\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88u."
)
"""The start of a file that PyTorch before 1.6 wrote."""


def test_a_file_of_an_old_pytorch_is_refused_with_what_to_do() -> None:
    error = refused(LEGACY)
    assert "PyTorch 1.6" in error.message
    assert "safetensors" in error.hint


def test_a_file_cut_anywhere_is_refused() -> None:
    data = archive(one(tensor()))
    for end in range(len(data)):
        refused(data[:end])


def test_any_flipped_bit_is_harmless() -> None:
    data = archive(mapping(text("w"), tensor(), text("v"), PARAMETER + tup(tensor()) + b"R"))
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << (5 * at + 7) % 8
        cheap(bytes(changed))


OPCODES = st.sampled_from(
    [tensor(), storage(), TENSOR, PARAMETER, ORDERED, NONE, TRUE, EMPTY, text("w"), num(1)]
    + [bytes([i]) for i in b"(.012FIJKLMNQRabdeghijloqstu}]\x81\x82\x85\x86\x87\x8a\x93\x94"]
)


@settings(max_examples=400, deadline=None, database=None)
@given(pieces=st.lists(OPCODES, max_size=30))
def test_any_opcodes_are_harmless(pieces: list[bytes]) -> None:
    cheap(archive(b"".join(pieces)))
