"""What a caller feeds, as arrays: arrays themselves, OrtValues, or memory that is bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_adapt.dtypes import Array

IDS, MASK = "input_ids", "attention_mask"
"""What exporters call the tokens, and the mask of the tokens up to the last."""


def fed_array(feeds: Mapping[str, Any], name: str) -> Array | None:
    """What is fed as an array; None if it is nothing, or in memory that cannot be read."""
    value = feeds.get(name)
    if value is None:
        return None
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)  # an OrtValue


def fed_shape(feeds: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The shape of what is fed; () if it is nothing, or in memory that cannot be read."""
    value = feeds.get(name)
    if value is None:
        return ()
    return tuple(value.shape() if callable(getattr(value, "shape", None)) else np.shape(value))
