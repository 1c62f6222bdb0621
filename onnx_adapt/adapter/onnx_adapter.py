"""`.onnx_adapter`: the file that ONNX Runtime's LoraAdapter loads, read and written here.

A FlatBuffers file (identifier `TORT`): `Adapter{format_version, adapter_version,
model_version, parameters: [Parameter{name, dims, data_type, raw_data}]}`. Source:
onnxruntime/lora/adapter_format/adapter_schema.fbs. The schema has no place for metadata.
The first 31 bits of the base's fingerprint go into `model_version`. The whole record goes
into one more field of the root table, numbered far behind those of the schema; readers of
FlatBuffers skip fields that they do not know (https://flatbuffers.dev/evolution).
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import flatbuffers
import numpy as np

from onnx_adapt.adapter.data import (
    Adapter,
    abbreviated,
    adapter_from_tensors,
    short_fingerprint,
)
from onnx_adapt.adapter.record import adapter_from_record, write_record
from onnx_adapt.dtypes import DTYPES, ELEM_TYPES, FLOATS, Array
from onnx_adapt.errors import AdapterError

_IDENTIFIER = b"TORT"
_ALIGNMENT = 64
_RECORD = 60
"""The number of the record's field, which the schema is unlikely to reach."""
_INT, _UNSIGNED, _COUNT = struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<H")
_FIELDS = struct.Struct("<4H")


def read(data: bytes, path: Path) -> Adapter:
    """Read an adapter; its name is the file's, as in ONNX Runtime GenAI.

    Raises:
        AdapterError: If the file is damaged or of another format version.
    """
    if len(data) < 8 or data[4:8] != _IDENTIFIER:
        raise AdapterError(
            f"{path.name} is not an .onnx_adapter file",
            hint="`onnx-adapt convert` and `extract` write such files",
        )
    try:
        root = _follow(data, 0)
        version, _, base, parameters = _table(data, root)
        number = _INT.unpack_from(data, version)[0] if version else 0
        if number != 1:
            raise AdapterError(
                f"{path.name} has format version {number}; only 1 is known",
                hint="upgrade: pip install -U onnx-adapt",
            )
        identity = abbreviated(_INT.unpack_from(data, base)[0]) if base else ""
        tensors = _parameters(data, parameters)
        if record := _record(data, root):
            return replace(adapter_from_record(record, tensors, path), name=path.stem)
        return adapter_from_tensors(path.stem, tensors, fingerprint=identity)
    except (struct.error, IndexError, TypeError, OverflowError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{path.name} is damaged: {error}", hint="write it again with onnx-adapt"
        ) from error


def _follow(data: bytes, at: int) -> int:
    """Follow an offset to the position that it refers to."""
    return int(at + _UNSIGNED.unpack_from(data, at)[0])


def _table(data: bytes, at: int) -> tuple[int, ...]:
    """Where the four fields of a table are; 0 for one that has its default.

    The tables of this format all have four. Read by hand: the flatbuffers library takes
    longer for the fields of an adapter than ONNX Runtime for all of it.
    """
    start = at - _INT.unpack_from(data, at)[0]
    if start < 0:
        raise ValueError("a table lies before the file")
    size = _COUNT.unpack_from(data, start)[0]
    if size >= 12:
        offsets = _FIELDS.unpack_from(data, start + 4)
    else:
        present = max(size - 4, 0) // 2
        offsets = (*struct.unpack_from(f"<{present}H", data, start + 4), 0, 0, 0, 0)[:4]
    return tuple(at + offset if offset else 0 for offset in offsets)


def _record(data: bytes, root: int) -> str:
    """What the file says of itself; '' if ONNX Runtime wrote it, or an older version."""
    start = root - _INT.unpack_from(data, root)[0]
    if _COUNT.unpack_from(data, start)[0] < 4 + 2 * (_RECORD + 1):
        return ""
    offset = _COUNT.unpack_from(data, start + 4 + 2 * _RECORD)[0]
    if not offset:
        return ""
    at, length = _vector(data, root + offset, 1)
    return bytes(data[at : at + length]).decode()


def _vector(data: bytes, field: int, size: int) -> tuple[int, int]:
    """Start and count of a vector, checked to lie inside the file."""
    if not field:
        raise ValueError("a field is missing")
    at = _follow(data, field)
    count = _UNSIGNED.unpack_from(data, at)[0]
    if at + 4 + count * size > len(data):
        raise ValueError("a vector goes past the end")
    return at + 4, count


def _parameters(data: bytes, field: int) -> dict[str, Array]:
    start, count = _vector(data, field, 4)
    whole = memoryview(data)
    tensors: dict[str, Array] = {}
    letters = 0
    for i in range(count):
        label, shape, kind, raw = _table(data, _follow(data, start + 4 * i))
        at, length = _vector(data, label, 1)
        letters += length
        if letters > len(data):
            raise ValueError("names lie inside each other")
        name = bytes(data[at : at + length]).decode()
        if name in tensors:
            raise ValueError(f"two tensors are called {name!r}")
        at, length = _vector(data, shape, 8)
        dims = struct.unpack_from(f"<{length}q", data, at)
        elem_type = _INT.unpack_from(data, kind)[0] if kind else 0
        if elem_type not in FLOATS or min(dims, default=0) < 0:
            raise ValueError(f"tensor {name!r} has element type {elem_type}, shape {dims}")
        at, length = _vector(data, raw, 1)
        # A view: many parameters may share one vector, which must not multiply it.
        values = np.frombuffer(whole[at : at + length], DTYPES[FLOATS[elem_type]])
        tensors[name] = values.reshape(dims)
    return tensors


def write(adapter: Adapter, path: Path) -> bytes:
    """Encode an adapter: sorted by name, every tensor at a multiple of 64 bytes."""
    tensors = adapter.tensors()
    # The builder copies everything whenever it is full, so it begins with about enough.
    builder = flatbuffers.Builder(1024 + sum(a.nbytes + 256 for a in tensors.values()))
    offsets = [_write_parameter(builder, name, array) for name, array in tensors.items()]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    parameters = builder.EndVector()
    record = builder.CreateString(write_record(adapter))
    builder.StartObject(_RECORD + 1)
    builder.PrependInt32Slot(0, 1, 0)
    builder.PrependInt32Slot(2, short_fingerprint(adapter.fingerprint), 0)
    builder.PrependUOffsetTRelativeSlot(3, parameters, 0)
    builder.PrependUOffsetTRelativeSlot(_RECORD, record, 0)
    builder.Finish(builder.EndObject(), _IDENTIFIER)
    return bytes(builder.Output())


def _write_parameter(builder: flatbuffers.Builder, name: str, array: Array) -> int:
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
    builder.PrependInt32Slot(2, ELEM_TYPES[str(array.dtype)], 0)
    builder.PrependUOffsetTRelativeSlot(3, data, 0)
    return int(builder.EndObject())
