"""How far apart two sets of model outputs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_adapt.proof.runner import Values, as_arrays


def distance(expected: Sequence[Values], got: Sequence[Values]) -> float:
    """The largest difference of any output, relative to that output's largest value.

    Equal infinities and NaNs in the same places count as equal; a different shape or
    type, and a NaN on one side only, as infinitely far.
    """
    worst = 0.0
    for before, after in zip(expected, got, strict=True):
        for name in before:
            pairs = zip(as_arrays(before[name]), as_arrays(after[name]), strict=False)
            if len(as_arrays(before[name])) != len(as_arrays(after[name])):
                return float("inf")
            worst = max([worst, *(_array_distance(a, b) for a, b in pairs)])
    return worst


def _array_distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.dtype.kind in "OSUT" or a.dtype.kind == "b":
        return 0.0 if np.array_equal(a, b) else float("inf")
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    x, y = a.astype(wide), b.astype(wide)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    if same.all():
        return 0.0
    finite = np.abs(x[np.isfinite(x)])
    scale = max(float(finite.max(initial=0.0)), 1e-6)
    with np.errstate(invalid="ignore"):
        off = np.abs(x - y)[~same]
    return float("inf") if np.isnan(off).any() else float(off.max()) / scale


def in_words(expected: Sequence[Values], got: Sequence[Values]) -> str:
    """How far outputs are apart, in words."""
    far = distance(expected, got)
    if far:
        return f"{far:.1e} away"
    pairs = [
        (a, b)
        for before, after in zip(expected, got, strict=True)
        for name in before
        for a, b in zip(as_arrays(before[name]), as_arrays(after[name]), strict=True)
    ]
    same = all(a.dtype.kind in "OSUT" or a.tobytes() == b.tobytes() for a, b in pairs)
    return "bit for bit" if same else "equal (but for the sign of some zeros)"


def movement(still: Values, got: Values) -> float:
    """The largest change of any output relative to its largest value."""
    worst = 0.0
    for name, value in still.items():
        for a, b in zip(as_arrays(value), as_arrays(got[name]), strict=False):
            worst = max(worst, _change(a, b))
    return worst


def _change(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    if a.shape != b.shape or a.dtype.kind not in "fiubV":
        return 0.0 if np.array_equal(a, b) else 1.0
    x, y = a.astype(np.float64), b.astype(np.float64)
    if np.array_equal(x, y, equal_nan=True):
        return 0.0
    scale = max(float(np.abs(x[np.isfinite(x)]).max(initial=0.0)), 1e-6)
    off = np.abs(np.nan_to_num(x) - np.nan_to_num(y))
    return max(float(off.max(initial=0.0)) / scale, 1e-12)
