"""Adapter files that are damaged, or made to do harm: always an AdapterError."""

import contextlib
import io
import json
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from adapter_models import npy_file, onnx_adapter_file, peak, safetensors_file
from hypothesis import given, settings
from hypothesis import strategies as st

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError

FORMATS = ["safetensors", "onnx_adapter", "npz"]
LAW = settings(max_examples=300, deadline=None, database=None)
MB = 1 << 20
GOOD = npy_file(b"{'descr':'<f4','fortran_order':False,'shape':(3,)}", b"\1" * 12)
FOUR = np.arange(4, dtype=np.float32).tobytes()

every_format = pytest.mark.parametrize("suffix", FORMATS)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small adapter in each format."""
    folder = tmp_path_factory.mktemp("honest")
    parts = {"down": np.ones((2, 1), np.float32), "up": np.ones((1, 2), np.float32)}
    adapter = oa.Adapter("fr", {"fc": parts}, {"base.h.bias": np.ones(2, np.float16)})
    return {s: oa.save_adapter(adapter, folder / f"a.{s}").read_bytes() for s in FORMATS}


def _refused(data: bytes, path: Path) -> AdapterError:
    path.write_bytes(data)
    with pytest.raises(AdapterError) as caught:
        oa.load_adapter(path)
    assert path.stem in caught.value.message
    return caught.value


def _read(data: bytes, path: Path) -> None:
    """Read every number, or get an AdapterError: nothing else."""
    path.write_bytes(data)
    with contextlib.suppress(AdapterError):
        for value in oa.load_adapter(path).feeds().values():
            value.tobytes()


def _survived(data: bytes, path: Path) -> None:
    """The same, with no more memory than the file deserves."""
    assert peak(lambda: _read(data, path)) < 4 * MB + 16 * len(data)


@every_format
def test_a_file_cut_anywhere_is_refused(
    suffix: str, honest: dict[str, bytes], tmp_path: Path
) -> None:
    # An .onnx_adapter file may end in padding, which nobody misses.
    data = honest[suffix].rstrip(b"\0") if suffix == "onnx_adapter" else honest[suffix]
    for end in range(len(data)):
        _refused(data[:end], tmp_path / f"cut.{suffix}")


@every_format
def test_any_flipped_bit_is_harmless(
    suffix: str, honest: dict[str, bytes], tmp_path: Path
) -> None:
    for at in range(len(honest[suffix])):
        data = bytearray(honest[suffix])
        data[at] ^= 1 << (5 * at + 7) % 8
        _read(bytes(data), tmp_path / f"flip.{suffix}")


@every_format
@LAW
@given(
    patch=st.lists(st.tuples(st.integers(0), st.binary(min_size=1, max_size=8)), max_size=6)
)
def test_any_changed_bytes_are_harmless(
    suffix: str,
    patch: list[tuple[int, bytes]],
    honest: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = bytearray(honest[suffix])
    for at, piece in patch:
        start = at % len(data)
        data[start : start + len(piece)] = piece
    _survived(bytes(data), tmp_path_factory.getbasetemp() / f"patched.{suffix}")


@every_format
@LAW
@given(data=st.binary(max_size=64))
def test_any_bytes_are_harmless(
    suffix: str, data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    start = {"safetensors": b"", "onnx_adapter": b"\x10\0\0\0TORT", "npz": b"PK\3\4"}[suffix]
    _survived(start + data, tmp_path_factory.getbasetemp() / f"random.{suffix}")


@pytest.mark.parametrize("content", [*FORMATS, "empty", "text", "pickle", "zeros"])
@every_format
def test_a_file_of_another_kind_is_refused(
    suffix: str, content: str, honest: dict[str, bytes], tmp_path: Path
) -> None:
    contents = {
        **honest,
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "pickle": b"\x80\x04N.",
        "zeros": bytes(64),
    }
    contents[suffix] = contents[suffix][1:]
    _refused(contents[content], tmp_path / f"trained.{suffix}")


# .safetensors


def _header(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32",'


LIES = {
    "data too short": safetensors_file(_header(a=_entry([2], 0, 8)), b"\0" * 4),
    "offsets too far": safetensors_file(_header(a=_entry([2], 4, 12)), b"\0" * 8),
    "offsets backwards": safetensors_file(_header(a=_entry([2], 8, 0)), b"\0" * 8),
    "shape too large": safetensors_file(_header(a=_entry([3], 0, 8)), b"\0" * 8),
    "shape huge": safetensors_file(_header(a=_entry([2**40], 0, 8)), b"\0" * 8),
    "shape overflows": safetensors_file(_header(a=_entry([2**62, 4], 0, 0))),
    "empty but huge": safetensors_file(_header(a=_entry([0, 2**62, 8], 0, 0))),
    "negative size": safetensors_file(_header(a=_entry([-1], 0, 4)), b"\0" * 4),
    "rank 100": safetensors_file(_header(a=_entry([1] * 100, 0, 4)), b"\0" * 4),
    "integers": safetensors_file(_header(a=_entry([1], 0, 8, "I64")), b"\0" * 8),
    "eight bits": safetensors_file(_header(a=_entry([4], 0, 4, "F8_E4M3")), b"\0" * 4),
    "unknown type": safetensors_file(_header(a=_entry([1], 0, 4, "nonsense")), b"\0" * 4),
    "overlap": safetensors_file(_header(a=_entry([1], 0, 4), b=_entry([1], 0, 4)), b"\0" * 4),
    "twice the same": safetensors_file(
        TWICE + b'"shape":[1],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "twice": safetensors_file(TWICE + b'"shape":[1],"data_offsets":[4,8]}}', b"\0" * 8),
    "deep": safetensors_file(b"[" * 100_000),
    "data without a name": safetensors_file(b"{}", b"more"),
    "no text": safetensors_file(b"\xff\xfe{}"),
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header of 2^40": struct.pack("<Q", 2**40) + b"{}",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_file_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    _refused(LIES[lie], tmp_path / "trained.safetensors")


@pytest.mark.parametrize(
    "record",
    [
        *("", "null", "3", "[]", "{}", "[" * 100_000, "1" * 5000, "NaN", '"\\ud800"'),
        '{"format":1,"name":"n","fingerprint":"","slots":[]}',
        '{"format":1,"name":"n","fingerprint":"","slots":{"fc":{"parts":["down"]}}}',
        '{"format":1,"name":"n","fingerprint":"","slots":{"x":{"parts":[],"activation":""}}}',
        '{"format":"1","name":"n","fingerprint":"","slots":{}}',
        '{"format":1,"name":null,"fingerprint":null,"slots":{}}',
        '{"format":1,"name":{},"fingerprint":"","slots":{}}',
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_damaged_record_is_refused(suffix: str, record: str, tmp_path: Path) -> None:
    header = _header(__metadata__={"onnx_adapt": record})
    entry = io.BytesIO()
    np.save(entry, np.array(record))
    files = {
        "safetensors": safetensors_file(header),
        "npz": _zip(("onnx_adapt.npy", entry.getvalue())),
    }
    _refused(files[suffix], tmp_path / f"trained.{suffix}")


def test_a_record_of_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    header = _header(__metadata__={"onnx_adapt": '{"format":4,"news":[]}'})
    error = _refused(safetensors_file(header), tmp_path / "trained.safetensors")
    assert "format 4" in error.message
    assert "upgrade" in error.hint


def test_a_record_that_names_other_tensors_is_refused(tmp_path: Path) -> None:
    slots = {"fc": {"parts": ["down", "up"], "activation": "relu"}}
    record = {"format": 1, "name": "n", "fingerprint": "", "slots": slots}
    metadata = {"onnx_adapt": json.dumps(record)}
    tensors = {"adapter.fc.down": _entry([1], 0, 4)}
    data = safetensors_file(_header(__metadata__=metadata, **tensors), b"\0" * 4)
    assert "not those" in _refused(data, tmp_path / "trained.safetensors").message


# .onnx_adapter


FALSE = {
    "twice": [("a", [4], 1, FOUR), ("a", [4], 1, FOUR)],
    "too long": [("a", [5], 1, FOUR)],
    "too short": [("a", [3], 1, FOUR)],
    "negative size": [("a", [-4], 1, FOUR)],
    "huge": [("a", [2**62], 1, FOUR)],
    "empty but huge": [("a", [2**62, 2**62, 0], 1, b"")],
    "rank 100": [("a", [1] * 100, 1, FOUR[:4])],
    "half a number": [("a", [1], 1, FOUR[:3])],
    "integers": [("a", [2], 7, FOUR)],
    "bytes": [("a", [16], 2, FOUR)],
    "no type": [("a", [1], 0, FOUR)],
    "negative type": [("a", [1], -1, FOUR)],
    "unknown type": [("a", [1], 2**31 - 1, FOUR)],
}


@pytest.mark.parametrize("lie", FALSE)
def test_an_onnx_adapter_file_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    _refused(onnx_adapter_file(FALSE[lie]), tmp_path / "trained.onnx_adapter")


def test_an_onnx_adapter_file_of_another_version_is_refused(tmp_path: Path) -> None:
    data = onnx_adapter_file([("a", [4], 1, FOUR)], version=2)
    assert "version 2" in _refused(data, tmp_path / "trained.onnx_adapter").message


@pytest.mark.parametrize("number", [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80"])
def test_no_number_in_an_onnx_adapter_file_makes_it_read_beyond_or_allocate(
    number: bytes, honest: dict[str, bytes], tmp_path: Path
) -> None:
    data = honest["onnx_adapter"]
    for at in range(len(data) - 3):
        if data[at : at + 4] != FOUR[:4] or at % 4:
            _survived(data[:at] + number + data[at + 4 :], tmp_path / "trained.onnx_adapter")


def test_data_that_many_parameters_share_is_not_multiplied(tmp_path: Path) -> None:
    parameters = [(f"p{i}", [MB // 4], 1, bytes(MB)) for i in range(200)]
    _survived(onnx_adapter_file(parameters, shared=200), tmp_path / "trained.onnx_adapter")


# .npz


def _zip(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def _array(header: bytes, data: bytes = b"") -> bytes:
    return _zip(("a.npy", npy_file(header, data)))


def _array_of(descr: bytes, shape: bytes, data: bytes = bytes(64)) -> bytes:
    return _array(b"{'descr':%s,'fortran_order':False,'shape':%s}" % (descr, shape), data)


def _marked(flag: int = 0, method: int = 0) -> bytes:
    """An archive whose only member claims to be encrypted, or packed in another way."""
    data = bytearray(_zip(("a.npy", GOOD)))
    for start, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.index(start) + place
        data[at] |= flag
        data[at + 2] = method
    return bytes(data)


TRICKS = {
    "npy": GOOD,
    "text member": _zip(("a.npy", GOOD), ("readme.txt", b"hello")),
    "no array": _zip(("a.npy", b"not an array")),
    "empty member": _zip(("a.npy", b"")),
    "twice": _zip(("a.npy", GOOD), ("a.npy", GOOD)),
    "two spellings": _zip(("a.npy", GOOD), ("a", GOOD)),
    "minuses": _array(b"{'descr':" + b"-" * 9000 + b"1}"),
    "brackets": _array(b"{'descr':" + b"(" * 9000 + b"1}"),
    "open quote": _array(b"{'descr':'''abc"),
    "unhashable": _array(b"{{}:1}"),
    "mixed keys": _array(b"{'descr':'<f4',1:False,'shape':(1,)}"),
    "code": _array(b"__import__('os').system('true')"),
    "huge": _array_of(b"'<f4'", b"(%d,)" % 2**45),
    "longer than its shape": _array_of(b"'<f4'", b"(2,)"),
    "beyond 64 bits": _array_of(b"'<f4'", b"(%d,)" % 2**80),
    "overflow": _array_of(b"'<f4'", b"(%d,%d)" % (2**32, 2**32)),
    "negative size": _array_of(b"'<f4'", b"(-3,)"),
    "size is a bool": _array_of(b"'<f4'", b"(True,)"),
    "size is a float": _array_of(b"'<f4'", b"(1.5,)"),
    "no bytes each": _array_of(b"'|V0'", b"(%d,)" % 2**40),
    "integers": _array_of(b"'<i4'", b"(2,)"),
    "strings": _array_of(b"'|S4'", b"(2,)"),
    "complex": _array_of(b"'<c8'", b"(2,)"),
    "dates": _array_of(b"'<M8[s]'", b"(2,)"),
    "structure": _array_of(b"[('a','<f4')]", b"(1,)"),
    "empty type": _array_of(b"()", b"(1,)"),
    "type of three": _array_of(b"(1,2,3)", b"(1,)"),
    "no type": _array_of(b"None", b"(1,)"),
    "objects": _array_of(b"'|O'", b"(1,)", b"\x80\x04N."),
    "encrypted": _marked(flag=1),
    **{f"method {n}": _marked(method=n) for n in (8, 9, 12, 14, 93, 99)},
}


@pytest.mark.parametrize("trick", TRICKS)
def test_an_npz_file_with_tricks_is_refused(trick: str, tmp_path: Path) -> None:
    _refused(TRICKS[trick], tmp_path / "trained.npz")


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Trap:
        def __reduce__(self) -> object:
            return Path.touch, (witness,)

    np.savez(tmp_path / "trained.npz", a=np.array([Trap()], object))
    witness.unlink(missing_ok=True)
    _refused((tmp_path / "trained.npz").read_bytes(), tmp_path / "trained.npz")
    assert not witness.exists()


def test_a_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(
    tmp_path: Path,
) -> None:
    bomb = bytearray(_zip(("a.npy", GOOD), ("b.npy", GOOD), method=zipfile.ZIP_DEFLATED))
    for at in (bomb.index(b"PK\1\2"), bomb.rindex(b"PK\1\2")):
        bomb[at + 24 : at + 28] = struct.pack("<I", 3 << 30)  # the unpacked size
    _refused(bytes(bomb), tmp_path / "trained.npz")
    _survived(bytes(bomb), tmp_path / "trained.npz")
