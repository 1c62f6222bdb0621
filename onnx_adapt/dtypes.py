"""The element types a slot can have: their names, in numpy and in ONNX."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
"""The numpy dtype for each element type a slot can have."""

FLOATS: dict[int, str] = {1: "float32", 10: "float16", 16: "bfloat16", 11: "float64"}
"""The same by number, as ONNX's TensorProto.DataType has them."""

ELEM_TYPES: dict[str, int] = {name: number for number, name in FLOATS.items()}
"""These numbers by name."""

Array = np.ndarray[Any, np.dtype[Any]]
