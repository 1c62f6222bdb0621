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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.slot.names import weight_name
from onnx_adapt.slot.parts import PARTS

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


def quantize(adapter: Adapter, *, bits: int = 8) -> Quantised:
    """Quantise the projections of an adapter, for a smaller file.

    Every weight is at most half a step off, where a step is the largest weight of its unit of
    the bottleneck divided by 127, or by 7 for 4 bits. `save_adapter` writes the result as
    safetensors, and `load_adapter` gives `quantised.adapter` back.

    Args:
        adapter: The adapter.
        bits: 8 or 4.

    Raises:
        AdapterError: If the bits are others, nothing can be quantised, or a weight holds NaN.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> rng = np.random.default_rng(0)
        >>> fc = {"down": rng.normal(size=(64, 8)), "up": rng.normal(size=(8, 64))}
        >>> lora = oa.Adapter("fr", {"fc": fc}, activations={"fc": "identity"})
        >>> small = oa.quantize(lora, bits=8)
        >>> oa.measure_loss(lora, small.adapter)["fc"] < 0.02
        True
    """
    if bits not in LARGEST:
        raise AdapterError(f"adapters cannot have {bits!r} bits", hint="give 8 or 4")
    tensors, forms = dict(adapter.tensors()), {}
    for slot, parts in adapter.weights.items():
        for part, value in parts.items():
            axis = _axis(part, value)
            if axis is None:
                continue
            name = weight_name(slot, part)
            if name + SCALES in tensors:
                raise AdapterError(
                    f"{name + SCALES!r} is a tensor of adapter {adapter.name!r} already",
                    hint="give the slot another name",
                )
            numbers, scales = _quantised(name, value, axis, bits)
            forms[name] = {"shape": list(value.shape), "dtype": str(value.dtype), "axis": axis}
            tensors[name] = _packed(numbers) if bits == 4 else numbers
            tensors[name + SCALES] = scales
    if not forms:
        raise AdapterError(
            f"adapter {adapter.name!r} has no projections that could be quantised",
            hint="its vectors and replaced weights keep their element type",
        )
    made = dequantised(tensors, bits, forms)
    weights = {
        slot: {part: made[weight_name(slot, part)] for part in parts}
        for slot, parts in adapter.weights.items()
    }
    return Quantised(replace(adapter, weights=weights), bits, tensors, forms)


def _axis(part: str, value: Array) -> int | None:
    """The axis along which a part has a scale for each place; None if it stays as it is."""
    if part not in PARTS or value.ndim < 2 or not value.size:
        return None
    return PARTS[part].bottleneck_axis(channels=value.ndim > len(PARTS[part].shape))


def _quantised(name: str, value: Array, axis: int, bits: int) -> tuple[Array, Array]:
    """The numbers of a tensor, int8 in its shape, and the scale of each place of the axis."""
    wide = np.asarray(value, np.float64)
    if not np.isfinite(wide).all():
        raise AdapterError(
            f"{name!r} holds NaN or infinity", hint="the training diverged; use another file"
        )
    others = tuple(i for i in range(value.ndim) if i != axis)
    kind = np.float64 if value.dtype == np.float64 else np.float32
    scales = (np.abs(wide).max(axis=others) / LARGEST[bits]).astype(kind)
    along = _along(scales, axis, value.ndim).astype(np.float64)
    numbers = np.rint(np.divide(wide, along, out=np.zeros_like(wide), where=along > 0))
    return numbers.clip(-LARGEST[bits], LARGEST[bits]).astype(np.int8), scales


def _along(scales: Array, axis: int, axes: int) -> Array:
    return scales.reshape([-1 if i == axis else 1 for i in range(axes)])


def _packed(numbers: Array) -> Array:
    """Numbers of 4 bits, two in a byte, in one row."""
    flat = (numbers.reshape(-1) & 15).astype(np.uint8)
    flat = np.pad(flat, (0, flat.size % 2))
    return np.asarray(flat[::2] | flat[1::2] << 4)


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
        wide = numbers * _along(scales, axis, len(shape)).astype(np.float64)
        with np.errstate(over="ignore"):
            made[name] = np.ascontiguousarray(wide, dtype)
    return made
