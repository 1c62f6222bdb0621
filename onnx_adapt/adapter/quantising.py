"""Quantise an adapter: its projections as numbers of 8 or 4 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.adapter.quantised import LARGEST, SCALES, Quantised, along, dequantised
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.slot.names import weight_name
from onnx_adapt.slot.parts import PARTS


def quantize(adapter: AdapterLike, *, bits: int = 8) -> Quantised:
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
    adapter = as_adapter(adapter)
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
    places = along(scales, axis, value.ndim).astype(np.float64)
    numbers = np.rint(np.divide(wide, places, out=np.zeros_like(wide), where=places > 0))
    return numbers.clip(-LARGEST[bits], LARGEST[bits]).astype(np.int8), scales


def _packed(numbers: Array) -> Array:
    """Numbers of 4 bits, two in a byte, in one row."""
    flat = (numbers.reshape(-1) & 15).astype(np.uint8)
    flat = np.pad(flat, (0, flat.size % 2))
    return np.asarray(flat[::2] | flat[1::2] << 4)
