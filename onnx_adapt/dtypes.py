"""The element types that a slot can have: the one table of their numbers and names."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class FloatType(NamedTuple):
    """A floating-point element type, as each library calls it.

    Attributes:
        name: In numpy, and in this package.
        number: In ONNX: `TensorProto.DataType`.
        ort: In ONNX Runtime: the type of a tensor of it.
        dtype: The numpy type of an array of it.
    """

    name: str
    number: int
    ort: str
    dtype: np.dtype[Any]


FLOAT_TYPES = (
    FloatType("float32", 1, "tensor(float)", np.dtype(np.float32)),
    FloatType("float16", 10, "tensor(float16)", np.dtype(np.float16)),
    FloatType("bfloat16", 16, "tensor(bfloat16)", np.dtype(ml_dtypes.bfloat16)),
    FloatType("float64", 11, "tensor(double)", np.dtype(np.float64)),
)
"""The element types that a slot can have; to add one, add a row."""

DTYPES = {item.name: item.dtype for item in FLOAT_TYPES}
"""The numpy type by name."""

FLOATS = {item.number: item.name for item in FLOAT_TYPES}
"""The name by ONNX's number."""

ELEM_TYPES = {item.name: item.number for item in FLOAT_TYPES}
"""ONNX's number by name."""

ORT_TYPES = {item.ort: item.name for item in FLOAT_TYPES}
"""The name by ONNX Runtime's name of a tensor's type."""

Array = np.ndarray[Any, np.dtype[Any]]
