"""`.safetensors`: the default adapter file (https://github.com/huggingface/safetensors)."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.quantised import Quantised
from onnx_adapt.adapter.record import KEY, adapter_from_record, write_record
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdapterError, reason

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": DTYPES["bfloat16"],
    "F64": np.dtype(np.float64),
    **{name: np.dtype(kind) for name, kind in (("I64", np.int64), ("I32", np.int32))},
    **{name: np.dtype(kind) for name, kind in (("I8", np.int8), ("U8", np.uint8))},
    **{name: np.dtype(kind) for name, kind in (("I16", np.int16), ("BOOL", np.bool_))},
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),  # some trained adapters are
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def read_tensors(data: bytes, path: Path) -> dict[str, Array]:
    """Read all tensors of a safetensors file, bfloat16 included.

    Raises:
        AdapterError: If the bytes are not such a file.
    """
    tensors: dict[str, Array] = {}
    try:
        _header(data)
        items: Any = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        for name, item in items:
            dtype: np.dtype[Any] = _DTYPES[item["dtype"]]
            tensors[name] = np.frombuffer(item["data"], dtype).reshape(item["shape"])
    except (safetensors.SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path.name} is not a whole safetensors file: {reason(error)}",
            hint="write it again",
        ) from error
    return dict(sorted(tensors.items()))  # the library returns them in any order


def read(data: bytes, path: Path) -> Adapter:
    """Read an adapter."""
    tensors = read_tensors(data, path)
    metadata = _header(data).get("__metadata__") or {}
    return adapter_from_record(metadata.get(KEY), tensors, path)


def read_bits(data: bytes) -> int:
    """The bits of a number in a file that was read; 0 if its numbers are floats."""
    record = (_header(data).get("__metadata__") or {}).get(KEY)
    form = json.loads(record).get("quantised") if record else None
    return int(form["bits"]) if form else 0


def _header(data: bytes) -> dict[str, Any]:
    return read_header(io.BytesIO(data), len(data))


def read_header(stream: BinaryIO, size: int) -> dict[str, Any]:
    """Read the header of a file, and refuse a name that is in it twice.

    Args:
        stream: The file, at its beginning; no byte behind the header is read.
        size: The number of its bytes.

    Raises:
        ValueError: If it is no header.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name is given twice")
        return dict(pairs)

    length = int.from_bytes(stream.read(8), "little")
    if length > size:
        raise ValueError("the header goes past the end")
    header: dict[str, Any] = json.loads(stream.read(length), object_pairs_hook=once)
    return header


def write(adapter: Adapter, path: Path) -> bytes:
    """Encode an adapter; the record is one metadata entry, as several have no fixed order."""
    return write_tensors(adapter.tensors(), path, {KEY: write_record(adapter)})


def write_quantised(quantised: Quantised, path: Path) -> bytes:
    """Encode an adapter with its numbers of few bits."""
    record = write_record(quantised.adapter, quantised)
    return write_tensors(quantised.tensors, path, {KEY: record})


def write_tensors(
    tensors: Mapping[str, Array], path: Path, metadata: Mapping[str, str]
) -> bytes:
    """Encode tensors and texts as a safetensors file.

    Raises:
        AdapterError: If a name or an element type cannot be in such a file.
    """
    # The library ignores strides (its issue 825) and would scramble arrays that have any.
    plain = {name: np.asarray(a, order="C") for name, a in sorted(tensors.items())}
    try:
        return safetensors.numpy.save(plain, dict(metadata))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise AdapterError(
            f"{path.name} cannot be written: {error}", hint="use .npz"
        ) from error
