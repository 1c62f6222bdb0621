"""Numbers with a forward error bound: how far rounding may have taken them.

Each operation gives the exact result in float64 and, beside it, how far the same operation
in the slot's own arithmetic may be from it, from the operands' bounds and its own roundings.
The rules are those of N. J. Higham, Accuracy and Stability of Numerical Algorithms (2nd ed.,
SIAM 2002): a rounded operation is within `u` of the exact one, relative to its result
(2.4), and a sum of `n` products, in whatever order, within `gamma_n = n u / (1 - n u)`
relative to the sum of the absolute products (3.1 to 3.5). Nothing in them is tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from onnx_adapt.dtypes import DTYPES, Array

_ORACLE_UNIT = 2.0**-53


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The arithmetic of an element type in ONNX Runtime.

    Attributes:
        dtype: The element type.
        unit: Roundoff of a result: half the distance from 1 to the next number.
        sums: Roundoff inside a kernel. On the CPU float16 and bfloat16 are computed in
            float32, and rounded to the type where a node ends, if at all.
        least: What underflow may take from a result: half the smallest number.
        largest: Beyond it a result is infinite.
    """

    dtype: np.dtype[Any]
    unit: float
    sums: float
    least: float
    largest: float

    @property
    def half(self) -> bool:
        """Whether kernels compute in a wider type than tensors have."""
        return self.unit > self.sums

    def gamma(self, terms: int) -> float:
        """Return `gamma_n` of a sum of `terms` terms, or infinity where it is no bound."""
        share = terms * self.sums
        return share / (1 - share) if share < 1 else float("inf")


def _arithmetic(dtype: np.dtype[Any]) -> Arithmetic:
    finfo: Any = ml_dtypes.finfo
    info = finfo(dtype)
    unit = float(info.eps) / 2
    sums = min(unit, 2.0**-24)
    # The oracle's own roundings in float64 count as well.
    return Arithmetic(
        dtype,
        unit + _ORACLE_UNIT,
        sums + _ORACLE_UNIT,
        float(info.smallest_subnormal) / 2,
        float(info.max),
    )


ARITHMETIC = {name: _arithmetic(dtype) for name, dtype in DTYPES.items()}
"""The arithmetic of each element type a slot can have."""

FUNCTION_UNITS = {"sigmoid": 4, "tanh": 8, "erf": 4, "exp": 4, "log": 4}
"""The error of ONNX Runtime's own functions in units of roundoff.

The unit is relative to 1 for the sigmoid, which ONNX Runtime cuts off where it is small, and
relative to the result for the others. A test measures each function over its whole range."""


@dataclass(frozen=True, slots=True, eq=False)
class Bounded:
    """Exact values, and how far computed values may be from them.

    The other operand of an operation may be an array or a number. Both count as exact, but a
    number is first rounded to the element type, as a constant in a graph is.

    Attributes:
        value: float64.
        bound: The same shape; infinite where nothing can be said.
        arithmetic: The arithmetic in which the values are computed.
    """

    value: Array
    bound: Array
    arithmetic: Arithmetic

    __array_ufunc__ = None  # an array on the left leaves the operation to this class

    def __add__(self, other: Bounded | Array | float) -> Bounded:
        """Add."""
        other = self._operand(other)
        return self._rounded(self.value + other.value, self.bound + other.bound)

    __radd__ = __add__

    def __neg__(self) -> Bounded:
        """Negate; this rounds nothing."""
        return Bounded(-self.value, self.bound, self.arithmetic)

    def __sub__(self, other: Bounded | Array | float) -> Bounded:
        """Subtract."""
        return self + -self._operand(other)

    def __rsub__(self, other: Array | float) -> Bounded:
        """Subtract from `other`."""
        return self._operand(other) + -self

    def __mul__(self, other: Bounded | Array | float) -> Bounded:
        """Multiply."""
        other = self._operand(other)
        bound = self.reach * other.bound + np.abs(other.value) * self.bound
        return self._rounded(self.value * other.value, bound)

    __rmul__ = __mul__

    def __truediv__(self, other: Bounded) -> Bounded:
        """Divide."""
        value = self.value / other.value
        room = np.maximum(np.abs(other.value) - other.bound, 0)
        return self._rounded(value, (self.bound + np.abs(value) * other.bound) / room)

    @property
    def reach(self) -> Array:
        """The largest size that a computed value may have."""
        return np.asarray(np.abs(self.value) + self.bound)

    def project(self, weight: Bounded, bias: Bounded | None = None) -> Bounded:
        """Compute `self @ weight + bias`, where a kernel may start its sum with the bias."""
        terms = len(weight.value)
        bound = self.arithmetic.gamma(terms) * self.reach + self.bound
        result = self._rounded(self.value @ weight.value, bound @ np.abs(weight.value))
        return result if bias is None else result.join(bias, terms)

    def join(self, other: Bounded, terms: int) -> Bounded:
        """Add `other`, which a kernel may have added before its own sum of `terms` terms."""
        early = Bounded(
            other.value,
            other.bound + self.arithmetic.gamma(terms) * other.reach,
            self.arithmetic,
        )
        return self + early

    def mean(self, axis: int) -> Bounded:
        """Average over one axis, which stays with size 1."""
        size = self.value.shape[axis]
        bound = self.bound + self.arithmetic.gamma(size) * self.reach
        return self._rounded(
            self.value.mean(axis, keepdims=True), bound.mean(axis, keepdims=True)
        )

    def square_root(self) -> Bounded:
        """Take the square root: two roots differ by less than `|a - b| / sqrt(a)`."""
        root = np.sqrt(self.value)
        return self._rounded(root, self.bound / root)

    def clip(self, low: float, high: float) -> Bounded:
        """Clip to `[low, high]`; this rounds nothing."""
        value = np.clip(self.value, low, high)
        above = np.clip(self.value + self.bound, low, high) - value
        below = value - np.clip(self.value - self.bound, low, high)
        return Bounded(value, np.maximum(above, below), self.arithmetic)

    def relu(self) -> Bounded:
        """Compute `max(x, 0)`; this rounds nothing."""
        value = np.maximum(self.value, 0)
        above = np.maximum(self.value + self.bound, 0) - value
        return Bounded(value, np.where(value > 0, self.bound, above), self.arithmetic)

    def abs(self) -> Bounded:
        """Take the absolute value; this rounds nothing."""
        return Bounded(np.abs(self.value), self.bound, self.arithmetic)

    def function(
        self, name: str, compute: Callable[[Array], Array], slope: Callable[[Array], Array]
    ) -> Bounded:
        """Apply a function of ONNX Runtime whose slope only falls as `|x|` grows.

        Args:
            name: Its row in `FUNCTION_UNITS`.
            compute: The function in float64.
            slope: Its derivative, which is largest where `x` is nearest to 0: what `x` is
                off moves the result by no more than the largest slope on the way.
        """
        value = compute(self.value)
        nearest = np.maximum(np.abs(self.value) - self.bound, 0)
        size = 1.0 if name == "sigmoid" else np.abs(value)
        own = FUNCTION_UNITS[name] * self.arithmetic.sums * size
        return self._rounded(value, slope(nearest) * self.bound + own)

    def within_a_kernel(self) -> Bounded:
        """Return the same values in a kernel's own arithmetic, before results are rounded."""
        kind = replace(self.arithmetic, unit=self.arithmetic.sums)
        return Bounded(self.value, self.bound, kind)

    def each(self, change: Callable[[Array], Array]) -> Bounded:
        """Move, cut or reshape the values and their bounds in the same way."""
        return Bounded(change(self.value), change(self.bound), self.arithmetic)

    def _operand(self, other: Bounded | Array | float) -> Bounded:
        if isinstance(other, Bounded):
            return other
        value = np.asarray(other, np.float64)
        off = np.zeros(())
        if not isinstance(other, np.ndarray):
            off = np.abs(value - value.astype(self.arithmetic.dtype).astype(np.float64))
        return Bounded(value, off, self.arithmetic)

    def _rounded(self, value: Array, bound: Array) -> Bounded:
        """Round the result of a node; the bound is infinite where it may overflow."""
        kind = self.arithmetic
        own = np.abs(value)
        own *= kind.unit
        own += kind.least
        bound = bound * (1 + kind.unit)
        bound += own
        if not own.max(initial=0) + bound.max(initial=0) < kind.unit * kind.largest:
            bound = np.where(np.abs(value) + bound > kind.largest, np.inf, bound)
        return Bounded(value, bound, kind)


def exact(value: Array, arithmetic: Arithmetic) -> Bounded:
    """Wrap a weight, which has no error."""
    wide = np.asarray(value, np.float64)
    return Bounded(wide, np.zeros(wide.shape), arithmetic)


def seen(value: Array, arithmetic: Arithmetic) -> Bounded:
    """Wrap a tensor that a slot reads, as it was read out of the model.

    ONNX Runtime drops the casts between two nodes that both compute in a wider type. The slot
    may therefore have read the number before it was rounded to the value that we see.
    """
    item = exact(value, arithmetic)
    if not arithmetic.half:
        return item
    off = np.abs(item.value) * arithmetic.unit + arithmetic.least
    return Bounded(item.value, off, arithmetic)
