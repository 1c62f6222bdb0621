"""Adapters with numbers of 8 or 4 bits in their file, which are floats again when loaded.

Each unit of a bottleneck has a scale of its own: the columns of `down` and of a `table`, the
rows of `up`. An example with 4 bits, whose numbers go from -7 to 7:

    down, column 0     [0.70, -0.33, 0.05]        scale = 0.70 / 7 = 0.1
    numbers            [7, -3, 0]                 each value / 0.1, rounded
    when loaded        [0.70, -0.30, 0.00]        at most half a scale off

Vectors (biases, scales) and replaced weights keep their element type. Two numbers of 4 bits
share a byte, the first in the lower half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.dtypes import DTYPES, Array

LARGEST = {8: 127, 4: 7}
"""The largest number by its bits; the smallest is its negative."""

SCALES = ".scales"
"""What the name of the scales of a tensor ends in."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """An adapter with the numbers that go into its file.

    Attributes:
        adapter: The adapter as it is when the file is loaded, in floats.
        bits: The bits of a number.
        tensors: What is stored, by name: numbers, their scales, and arrays left as they are.
        forms: How to read each tensor of numbers, by name: `shape`, `dtype` and `axis`, the
            axis along which each place has its scale.
    """

    adapter: Adapter
    bits: int
    tensors: Mapping[str, Array]
    forms: Mapping[str, Mapping[str, Any]]

    def __repr__(self) -> str:
        """The adapter and its bits."""
        return f"<Quantised {self.bits} bits of {self.adapter!r}>"


def along(scales: Array, axis: int, axes: int) -> Array:
    """Scales in the shape in which they multiply a tensor of so many axes."""
    return scales.reshape([-1 if i == axis else 1 for i in range(axes)])


def _unpacked(data: Array, count: int) -> Array:
    """The first numbers in a row of bytes, int8: the inverse of `_packed`."""
    halves = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)[:count].astype(np.int8)
    return np.asarray((halves ^ 8) - 8)


def dequantised(
    tensors: Mapping[str, Array], bits: int, forms: Mapping[str, Any]
) -> dict[str, Array]:
    """Turn the numbers among the tensors of a file into floats.

    Raises:
        ValueError: If bits, shapes or scales are not those that `quantize` writes.
        KeyError: If a tensor or a key of its form is missing.
        TypeError: If a form is of a wrong kind.
    """
    if bits not in LARGEST or isinstance(bits, bool):
        raise ValueError(f"numbers of {bits!r} bits")
    made = dict(tensors)
    for name, form in forms.items():
        numbers, scales = made[name], made.pop(name + SCALES)
        shape, axis, dtype = tuple(form["shape"]), form["axis"], DTYPES[form["dtype"]]
        count = math.prod(shape)
        if min(shape) < 0 or not 0 <= axis < len(shape) or scales.shape != (shape[axis],):
            raise ValueError(f"scales of {name!r} {scales.shape} for {shape}, axis {axis}")
        if not np.isfinite(scales).all() or scales.dtype not in (np.float32, np.float64):
            raise ValueError(f"scales of {name!r} are no finite floats")
        if bits == 4:
            if numbers.dtype != np.uint8 or numbers.shape != ((count + 1) // 2,):
                raise ValueError(f"{name!r} does not hold {count} numbers of 4 bits")
            numbers = _unpacked(numbers, count).reshape(shape)
        if numbers.dtype != np.int8 or numbers.shape != shape:
            raise ValueError(f"{name!r} does not hold numbers of the shape {shape}")
        # One product, rounded to the element type once: the same on every machine.
        wide = numbers * along(scales, axis, len(shape)).astype(np.float64)
        with np.errstate(over="ignore"):
            made[name] = np.ascontiguousarray(wide, dtype)
    return made
