"""One tensor of the Open Inference Protocol: as JSON, as raw bytes, as an array."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import RequestError

_BYTES = np.dtype(object)

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    "FP16": DTYPES["float16"],
    "FP32": DTYPES["float32"],
    "FP64": DTYPES["float64"],
    "BF16": DTYPES["bfloat16"],
    "BYTES": _BYTES,
}
"""The protocol's names; texts are arrays of objects, as ONNX Runtime has them."""

_ROUNDED_TWICE = b"7.038531e-26"
"""The one decimal of a float32 that a double of it does not give back: all were tried. The
double that is nearest to it is halfway to the next float32."""

_KINDS = {"b": "b", "u": "iu", "i": "iu", "f": "iuf", "V": "iuf"}
"""What numpy may make of a JSON list for a datatype of each kind; bfloat16 is of kind V."""


def array_of_json(datatype: str, shape: Sequence[int], data: object) -> Array:
    """An array from a JSON list, flat or nested; numbers are not rounded to integers.

    Raises:
        RequestError: If a value is of another kind or out of range, or their number is
            not the shape's.

    Example:
        >>> array_of_json("INT8", [2, 2], [1, 2, 3, 4]).tolist()
        [[1, 2], [3, 4]]
        >>> array_of_json("UINT8", [1], [256])
        Traceback (most recent call last):
        ...
        onnx_adapt.errors.RequestError: 256 is no UINT8
        hint: docs/serving.md tells what the server takes
    """
    if not isinstance(data, list):
        raise RequestError("`data` is no list", hint="give the values as a JSON list")
    dtype = _dtype(datatype)
    if dtype == _BYTES:
        return _shaped(_texts(data), shape)
    try:
        found = np.array(data)
    except (ValueError, OverflowError) as error:
        raise RequestError(f"`data` is no {datatype} tensor: {error}") from error
    if dtype == np.uint64 and found.dtype.kind == "f":
        found = _large_integers(data)
    if found.size and found.dtype.kind not in _KINDS[dtype.kind]:
        raise RequestError(f"`data` holds values that are no {datatype}")
    if dtype.kind in "iu" and found.size:
        limits = np.iinfo(dtype)
        for value in (int(found.min()), int(found.max())):
            if not limits.min <= value <= limits.max:
                raise RequestError(f"{value} is no {datatype}")
    with np.errstate(over="ignore"):
        narrowed = found.astype(dtype)
    if dtype.kind in "fV" and not np.isfinite(narrowed).all():
        raise RequestError(f"`data` holds values that are too large for {datatype}")
    return _shaped(narrowed, shape)


def _large_integers(data: list[Any]) -> Array:
    """Integers of which some are too large for an INT64: numpy makes floats of the rest."""
    whole = np.array(data, object)
    if not all(type(value) is int and 0 <= value < 2**64 for value in whole.reshape(-1)):
        raise RequestError("`data` holds values that are no UINT64")
    return whole.astype(np.uint64)


def array_of_bytes(datatype: str, shape: Sequence[int], raw: memoryview) -> Array:
    """An array from raw little-endian values, of the binary tensor data extension.

    Numbers are a view of the bytes; nothing is copied.

    Raises:
        RequestError: If there are more or fewer bytes than the shape needs.
    """
    dtype = _dtype(datatype)
    if dtype == _BYTES:
        return _shaped(_counted_texts(raw), shape)
    needed = math.prod(shape) * dtype.itemsize
    if len(raw) != needed:
        raise RequestError(
            f"{datatype} {list(shape)} has {needed} bytes; there are {len(raw)}",
            hint="is binary_data_size right?",
        )
    if dtype.kind == "b" and np.any(np.frombuffer(raw, np.uint8) > 1):
        raise RequestError("a BOOL is a byte of 0 or 1")
    return _shaped(np.frombuffer(raw, dtype), shape)


def json_of_array(datatype: str, array: Array) -> bytes:
    """The values of an array as a flat JSON list.

    Floats are written with as few digits as tell them apart, and doubles that are made of
    these digits are rounded to the same floats.

    Raises:
        RequestError: If JSON has no way to write one: NaN and infinity.

    Example:
        >>> json_of_array("FP32", np.array([[0.1, 2]], np.float32))
        b'[0.1,2.0]'
    """
    if datatype == "BYTES":
        return orjson.dumps(array.reshape(-1).tolist())
    flat = np.ascontiguousarray(array).reshape(-1)
    if datatype in ("FP16", "BF16"):
        flat = flat.astype(np.float32)
    text = orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in text:
        raise RequestError(
            "an output holds NaN or infinity, which JSON cannot say",
            hint="ask for it with `binary_data`",
        )
    if _ROUNDED_TWICE in text and datatype != "FP64":
        return orjson.dumps(flat.astype(np.float64), option=orjson.OPT_SERIALIZE_NUMPY)
    return text


def bytes_of_array(datatype: str, array: Array) -> bytes:
    """The values of an array as raw little-endian bytes."""
    if datatype != "BYTES":
        return array.tobytes()
    encoded = [str(text).encode() for text in array.reshape(-1)]
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)


def _dtype(datatype: str) -> np.dtype[Any]:
    if datatype not in DATATYPES:
        raise RequestError(
            f"there is no datatype {datatype!r}", hint=f"there are {', '.join(DATATYPES)}"
        )
    return DATATYPES[datatype]


def _shaped(array: Array, shape: Sequence[int]) -> Array:
    if array.size != math.prod(shape):
        raise RequestError(f"shape {list(shape)} has not {array.size} values")
    if array.ndim > 1 and array.shape != tuple(shape):
        raise RequestError(f"`data` is nested as {list(array.shape)}, not {list(shape)}")
    try:
        return array.reshape(tuple(shape))
    except ValueError as error:  # no value at all, and an axis without end
        raise RequestError(f"shape {list(shape)} is too large") from error


def _texts(data: list[Any]) -> Array:
    found = np.array(data, object) if data else np.empty(0, object)
    for text in found.reshape(-1):
        if not isinstance(text, str):
            raise RequestError("`data` holds values that are no texts")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"a text is no text: {error}") from error
    return found


def _counted_texts(raw: memoryview) -> Array:
    """Texts that are each led by their length in four bytes."""
    texts: list[str] = []
    at = 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if len(raw) < at + 4 or end > len(raw):
            raise RequestError("a BYTES tensor ends within a text")
        try:
            texts.append(str(raw[at + 4 : end], "utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(f"ONNX texts are UTF-8: {error}") from error
        at = end
    return np.array(texts, object)
