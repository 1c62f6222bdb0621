"""`.onnx_adapter`: what ONNX Runtime's LoraAdapter loads, without ONNX Runtime.

A FlatBuffers file (identifier `TORT`): `Adapter{format_version, adapter_version,
model_version, parameters: [Parameter{name, dims, data_type, raw_data}]}`. Source:
onnxruntime/lora/adapter_format/adapter_schema.fbs. There is no place for metadata; the
base's fingerprint goes into `model_version`, as far as 31 bits go.
"""

from __future__ import annotations

import struct
from pathlib import Path

import flatbuffers
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table

from onnx_adapt.adapter import (
    Adapter,
    abbreviated,
    adapter_from_tensors,
    short_fingerprint,
)
from onnx_adapt.dtypes import DTYPES, FLOATS, Array
from onnx_adapt.errors import AdapterError

_IDENTIFIER = b"TORT"
_ALIGNMENT = 64
_LIMIT = 2**31 - 1
_NUMBERS = {name: number for number, name in FLOATS.items()}
# Offsets of a table's fields in its vtable: 4, 6, 8, ... in the order of the schema.
_FORMAT, _ADAPTER_VERSION, _MODEL_VERSION, _PARAMETERS = 4, 6, 8, 10
_NAME, _DIMS, _DATA_TYPE, _RAW_DATA = 4, 6, 8, 10


def read(data: bytes, path: Path) -> Adapter:
    """Read an adapter; its name is the file's.

    Raises:
        AdapterError: If the file is damaged or of another format version.
    """
    if len(data) < 8 or data[4:8] != _IDENTIFIER:
        raise AdapterError(f"{path.name} is not an .onnx_adapter file")
    try:
        root = _root(data)
        version = _integer(root, _FORMAT)
        if version != 1:
            raise AdapterError(f"{path.name} has format version {version}; only 1 is known")
        identity = abbreviated(_integer(root, _MODEL_VERSION))
        return adapter_from_tensors(path.stem, _parameters(root), fingerprint=identity)
    except (struct.error, IndexError, TypeError, OverflowError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{path.name} is damaged: {error}", hint="write it again with onnx-adapt"
        ) from error


def _root(data: bytes) -> Table:
    return Table(data, struct.unpack_from("<I", data)[0])


def _integer(table: Table, field: int) -> int:
    offset = table.Offset(field)
    return int(table.Get(number_types.Int32Flags, offset + table.Pos)) if offset else 0


def _bounds(table: Table, field: int, size: int) -> tuple[int, int]:
    """Start and count of a vector, checked to lie inside the file."""
    offset = table.Offset(field)
    if not offset:
        raise ValueError("a field is missing")
    start, count = table.Vector(offset), table.VectorLen(offset)
    if start < 0 or start + count * size > len(table.Bytes):
        raise ValueError("a vector goes past the end")
    return start, count


def _parameters(root: Table) -> dict[str, Array]:
    start, count = _bounds(root, _PARAMETERS, 4)
    tensors: dict[str, Array] = {}
    for i in range(count):
        item = Table(root.Bytes, root.Indirect(start + 4 * i))
        at, length = _bounds(item, _NAME, 1)
        name = bytes(item.Bytes[at : at + length]).decode()
        if name in tensors:
            raise ValueError(f"two tensors are called {name!r}")
        at, length = _bounds(item, _DIMS, 8)
        dims = struct.unpack_from(f"<{length}q", item.Bytes, at)
        elem_type = _integer(item, _DATA_TYPE)
        if elem_type not in FLOATS or any(dim < 0 for dim in dims):
            raise ValueError(f"tensor {name!r} has element type {elem_type}, shape {dims}")
        at, length = _bounds(item, _RAW_DATA, 1)
        dtype = DTYPES[FLOATS[elem_type]]
        # A view: many parameters may share one vector, which must not multiply it.
        raw = memoryview(item.Bytes)[at : at + length]
        tensors[name] = np.frombuffer(raw, dtype).reshape(dims)
    return tensors


def write(adapter: Adapter, path: Path) -> bytes:
    """The bytes of an adapter: sorted by name, every tensor at a multiple of 64 bytes.

    Raises:
        AdapterError: If the adapter passes the format's 2 GB.
    """
    if adapter.size > _LIMIT - (1 << 20):
        raise AdapterError(
            f"{path.name} would pass the 2 GB of this format", hint="use .safetensors"
        )
    builder = flatbuffers.Builder(1024)
    offsets = [_write_parameter(builder, n, a) for n, a in adapter.feeds().items()]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    parameters = builder.EndVector()
    builder.StartObject(4)
    builder.PrependInt32Slot(0, 1, 0)
    builder.PrependInt32Slot(2, short_fingerprint(adapter.fingerprint), 0)
    builder.PrependUOffsetTRelativeSlot(3, parameters, 0)
    builder.Finish(builder.EndObject(), _IDENTIFIER)
    return bytes(builder.Output())


def _write_parameter(builder: flatbuffers.Builder, name: str, array: Array) -> int:
    if not array.ndim:
        raise AdapterError(
            f"{name!r} is a scalar, which ONNX Runtime cannot read from this format",
            hint="use .safetensors",
        )
    raw = array.tobytes()
    builder.StartVector(1, len(raw), _ALIGNMENT)
    builder.head -= len(raw)
    builder.Bytes[builder.head : builder.head + len(raw)] = raw
    data = builder.EndVector()
    builder.StartVector(8, array.ndim, 8)
    for dim in reversed(array.shape):
        builder.PrependInt64(dim)
    dims = builder.EndVector()
    label = builder.CreateString(name)
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(0, label, 0)
    builder.PrependUOffsetTRelativeSlot(1, dims, 0)
    builder.PrependInt32Slot(2, _NUMBERS[str(array.dtype)], 0)
    builder.PrependUOffsetTRelativeSlot(3, data, 0)
    return int(builder.EndObject())
