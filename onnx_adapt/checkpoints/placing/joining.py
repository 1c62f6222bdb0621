"""Join the weights of several modules into those of the one slot that they share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_adapt.dtypes import Array

Parts = Mapping[str, Array]
"""The weights of one slot, by part."""


def joined_beside(one: Parts, other: Parts) -> dict[str, Array]:
    """Join the weights of two modules with columns of their own, side by side."""
    joined: dict[str, Array] = {**one, **other}
    for part in one.keys() & other.keys():
        match part:
            case "down":
                joined[part] = np.concatenate([one[part], other[part]], axis=1)
            case "up":
                joined[part] = np.concatenate([one[part], other[part]], axis=0)
            case "up_bias":  # zero in the columns of other modules
                joined[part] = one[part] + other[part]
            case "scale":  # and one there
                joined[part] = one[part] * other[part]
    return joined


def joined_apart(one: Parts, other: Parts) -> dict[str, Array]:
    """Join the weights of two modules with matrices of their own in a stack of them.

    Each module's `down` is zero in the rows of the other, so both use the same units of the
    bottleneck; that of the smaller rank gets zeros for the rest.
    """
    joined: dict[str, Array] = {**one, **other}
    for part in one.keys() & other.keys():
        match part:
            case "down":
                joined[part] = np.add(*_padded(one[part], other[part], axis=1))
            case "up":
                joined[part] = np.add(*_padded(one[part], other[part], axis=0))
    return joined


def _padded(one: Array, other: Array, *, axis: int) -> tuple[Array, Array]:
    """Fill the shorter of two arrays up with zeros along one axis."""
    size = max(one.shape[axis], other.shape[axis])

    def fill(array: Array) -> Array:
        pads = [(0, 0)] * array.ndim
        pads[axis] = 0, size - array.shape[axis]
        return np.pad(array, pads)

    return fill(one), fill(other)
