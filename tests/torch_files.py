"""Shared by the tests of PyTorch's `.bin` files: an assembler of such files."""

import contextlib
import io
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
from adapter_models import peak

from onnx_adapt.checkpoints.pickles import read_pickled_tensors
from onnx_adapt.errors import CheckpointError

MB = 1 << 20
FILE = Path("adapter_model.bin")

# A tiny assembler of pickles, in the opcodes that torch.save uses.
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
ORDERED = b"ccollections\nOrderedDict\n"
NONE, TRUE, EMPTY = b"N", b"\x88", b")"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def num(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(
    key: bytes = text("0"), kind: bytes = b"ctorch\nFloatStorage\n", count: bytes = num(4)
) -> bytes:
    return tup(text("storage"), kind, key, text("cpu"), count) + b"Q"


def tensor(
    offset: bytes = num(0),
    size: bytes = tup(num(4)),
    stride: bytes = tup(num(1)),
    data: bytes | None = None,
    *more: bytes,
) -> bytes:
    given = storage() if data is None else data
    ordered = ORDERED + EMPTY + b"R"
    return TENSOR + tup(given, offset, size, stride, b"\x89", ordered, *more) + b"R"


def mapping(*pairs: bytes) -> bytes:
    return b"}(" + b"".join(pairs) + b"u"


def one(value: bytes) -> bytes:
    """A state dict with one entry."""
    return mapping(text("w"), value)


def archive(
    pickle: bytes,
    storages: dict[str, bytes] | None = None,
    *extra: tuple[str, bytes],
    method: int = zipfile.ZIP_STORED,
) -> bytes:
    """A file as torch.save lays it out."""
    out = io.BytesIO()
    parts = {"0": struct.pack("<4f", 1, 2, 3, 4)} if storages is None else storages
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as file:
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names
        file.writestr("archive/data.pkl", b"\x80\x02" + pickle + b".")
        for key, data in parts.items():
            file.writestr(f"archive/data/{key}", data)
        for name, data in (("archive/version", b"3\n"), *extra):
            file.writestr(name, data)
    return out.getvalue()


def refused(data: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_pickled_tensors(data, FILE)
    return caught.value


def cheap(data: bytes) -> None:
    """Read, or a CheckpointError: nothing else, and no memory beyond the file's own."""

    def load() -> None:
        with contextlib.suppress(CheckpointError):
            for value in read_pickled_tensors(data, FILE).values():
                value.tobytes()

    assert peak(load) < 4 * MB + 16 * len(data)
