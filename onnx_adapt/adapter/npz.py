"""`.npz`: the archive format of numpy, for people who make weights in numpy."""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.record import KEY, adapter_from_record, write_record
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdapterError, reason
from onnx_adapt.formats import FORMATS

_BFLOAT16 = ".bfloat16"
"""The end of the name of a bfloat16 array, which is stored as uint16 for lack of a type."""


_ALLOWANCE, _EXPANSION = 1 << 22, 16
"""Against zip bombs: unpacked, a file may have this many times its size, and 4 MB more."""


def read(data: bytes, path: Path) -> Adapter:
    """Read an adapter; the record that `write` adds may be missing.

    Raises:
        AdapterError: If the file is damaged or holds anything but plain arrays.
    """
    arrays = read_arrays(io.BytesIO(data), path, _ALLOWANCE + _EXPANSION * len(data))
    record = arrays.pop(KEY, None)
    tensors: dict[str, Array] = {}
    for name, array in arrays.items():
        if name.endswith(_BFLOAT16) and array.dtype == np.uint16:
            tensors[name.removesuffix(_BFLOAT16)] = array.view(DTYPES["bfloat16"])
        else:
            tensors[name] = array
    return adapter_from_record(None if record is None else str(record), tensors, path)


def read_arrays(file: IO[bytes], path: Path, limit: int) -> dict[str, Array]:
    """Read every array of a file, by name.

    Args:
        file: The file, open.
        path: What it is called.
        limit: The number of bytes that it may unpack to.

    Raises:
        AdapterError: If the file is damaged or holds anything but plain arrays.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _read_members(archive, limit)
    except _DAMAGE as error:
        raise AdapterError(
            f"{path.name} is not a whole .npz file of arrays: {reason(error)}",
            hint="numpy.savez writes such a file; arrays of objects are not read",
        ) from error


_DAMAGE = (
    *(ValueError, OSError, KeyError, EOFError, RuntimeError, NotImplementedError),
    *(
        zipfile.BadZipFile,
        zlib.error,
        SyntaxError,
        tokenize.TokenError,
        TypeError,
        MemoryError,
        IndexError,
    ),
)
"""The errors that zipfile and numpy raise for bytes that are no archive of arrays."""


def _read_members(archive: zipfile.ZipFile, limit: int) -> dict[str, Array]:
    """Read every array by the name of its member; numpy's own reader changes some names."""
    members = archive.infolist()
    if sum(member.file_size for member in members) > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")
    arrays: dict[str, Array] = {}
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # numpy writes no other; LZMA takes as much memory as its header says.
            raise ValueError(f"member {member.filename!r} is packed in another way")
        name = member.filename.removesuffix(".npy")
        if name in arrays or name == member.filename:
            raise ValueError(f"member {member.filename!r} is given twice or is no array")
        with archive.open(member) as stream:
            arrays[name] = _read_array(stream, member.file_size)
    return arrays


def _read_array(stream: IO[bytes], size: int) -> Array:
    """Read one array, and refuse a header that promises more than its member has."""
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, by_column, dtype = readers[version](stream)
    if (
        dtype.hasobject
        or min(shape, default=0) < 0
        or math.prod(shape) * dtype.itemsize > size
    ):
        raise ValueError(f"an array is of objects, or {shape} is more than is there")
    values = np.frombuffer(stream.read(math.prod(shape) * dtype.itemsize), dtype)
    if stream.read(1):
        raise ValueError(f"there is more than the array of {shape} that its header tells")
    return values.reshape(shape, order="F" if by_column else "C")


def write(adapter: Adapter, path: Path) -> bytes:
    """Encode an adapter; entries have a fixed date, so that the bytes are always the same.

    Raises:
        AdapterError: If a name contains a NUL, where zip would cut it off.
    """
    arrays: dict[str, Array] = {KEY: np.array(write_record(adapter))}
    for name, array in adapter.tensors().items():
        if "\0" in name or name == KEY:
            raise AdapterError(
                f"{path.name}: {name!r} cannot be a name in an .npz file",
                hint=f"use {next(iter(FORMATS))}",
            )
        wide = array.dtype == DTYPES["bfloat16"]
        arrays[name + _BFLOAT16 if wide else name] = array.view(np.uint16) if wide else array
    return archive(arrays)


def archive(arrays: Mapping[str, Array]) -> bytes:
    """Make an `.npz` of arrays with any names, always with the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as members:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.asarray(array, order="C"), allow_pickle=False)
            members.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
    return out.getvalue()
