"""The weights of a slot: what they are called, their shapes, and values to start from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import SlotError
from onnx_adapt.slot.manifest import ROW_PARTS, Slot

PARTS = (
    *("down", "up", "down_bias", "up_bias", "scale", "gain"),
    *("norm_weight", "norm_bias", "gate", "gate_bias", "after_weight", "after_bias"),
    *("residual", "skip", "switch"),
    *("table", "f_down", "f_down_bias", "f_up", "f_up_bias"),
    *("g_down", "g_down_bias", "g_up", "g_up_bias"),
)
"""Every weight a slot can have. `table` stands in for `down` where the source is ids; `f_`
and `g_` are the two networks of a NICE coupling (Dinh et al., 2014), the one slot of
another shape: `y1 = x1 + f(x2); y2 = x2 + g(y1)` on the halves of the target."""

NEUTRAL = ("down_bias", "up_bias", "scale", "gain")
"""Parts that change nothing while they have their neutral value, so may be left out."""

COUPLING = PARTS[PARTS.index("f_down") :]


def part_shape(slot: Slot, part: str, bottleneck: int) -> tuple[int, ...]:
    """The shape of one weight for a given bottleneck.

    `down` is `(source_width, r)` and `up` is `(r, width)`; on a channel axis they are
    `(r, source_width, 1, ...)` and `(width, r, 1, ...)` as Conv has them.
    """
    r, ones = bottleneck, (1,) * (slot.rank - 2) if slot.axis == 1 else ()
    if part in COUPLING:
        half = slot.width // 2
        ends = {"down": (half, r), "down_bias": (r,), "up": (r, half), "up_bias": (half,)}
        return ends[part[2:]]
    match part:
        case "down" if slot.axis == 1:
            return (r, slot.source_width, *(slot.window[: len(ones)] or ones))
        case "down" | "table":
            return (slot.source_width, r)
        case "up":
            return (slot.width, r, *ones) if slot.axis == 1 else (r, slot.width)
        case "down_bias":
            return (r,)
        case "scale" | "gain":
            return (slot.width, *ones)
        case "up_bias" | "after_weight" | "after_bias":
            return (slot.width,)
        case "norm_weight" | "norm_bias":
            return (slot.source_width,)
        case "gate":
            return (slot.source_width, 1)
        case _:  # gate_bias, residual, skip, switch: one number
            return (1,)


def row_shape(slot: Slot, part: str, rows: int, bottleneck: int) -> tuple[int, ...]:
    """The shape of what a batched slot has for each row: `(rows, 1, size)`.

    On a channel axis it is `(rows, size, 1, ...)`.
    """
    sizes = {"mask": bottleneck, "row_up_bias": slot.width, "row_scale": slot.width}
    size = sizes.get(part, 1)
    return (rows, size, *(1,) * (slot.rank - 2)) if slot.axis == 1 else (rows, 1, size)


def row_rank(slot: Slot) -> int:
    """Number of axes of what a batched slot has for each row."""
    return slot.rank if slot.axis == 1 else 3


def neutral_rows(slot: Slot) -> dict[str, Array]:
    """What a batched slot has for each row while nothing is fed: one value for all."""
    ones = ("mask", ROW_PARTS["scale"])
    return {
        part: np.full([1] * row_rank(slot), part in ones, DTYPES[slot.dtype])
        for part in slot.row_parts
    }


def bottleneck_axis(slot: Slot, part: str) -> int | None:
    """The axis of a weight that is the bottleneck, or None."""
    axes = {"down": 0, "up": 1} if slot.axis == 1 else {"down": 1, "up": 0, "table": 1}
    return {**axes, "down_bias": 0}.get(part[2:] if part in COUPLING else part)


def bottleneck_of(slot: Slot, weights: Mapping[str, Array]) -> int:
    """The inner size that weights bring to a slot; 0 if the slot has none."""
    sizes = [
        value.shape[axis]
        for part, value in weights.items()
        if (axis := bottleneck_axis(slot, part)) is not None
    ]
    return sizes[0] if sizes else 0


_LARGEST = 2**31


def neutral_weights(slot: Slot, bottleneck: int = 0) -> dict[str, Array]:
    """Weights with which the slot's output is its target, by part.

    A bottleneck of none is 0, but 1 on a channel axis: ONNX Runtime before 1.32 leaves the
    output of a convolution without input channels as it finds the memory.

    Raises:
        SlotError: If a weight would pass 2 GB.
    """
    ones = {"scale", "gain", "norm_weight", "after_weight"}
    dtype = DTYPES[slot.dtype]
    bottleneck = max(bottleneck, 1 if slot.axis == 1 else 0)
    weights = {}
    for part in slot.parts:
        shape = part_shape(slot, part, bottleneck)
        # numpy counts an axis of 0 as 1, and does not make what would pass 2**63 then.
        counted = math.prod(filter(None, shape)) * dtype.itemsize >= 2**63
        if counted or math.prod(shape) * dtype.itemsize > _LARGEST:
            raise SlotError(
                f"weight {part!r} of slot {slot.name!r} would have the shape {list(shape)} "
                f"with a bottleneck of {bottleneck}",
                hint="a weight can have 2 GB; give a smaller --bottleneck",
            )
        weights[part] = np.full(shape, part in ones, dtype)
    return weights


def is_empty(slot: Slot, weights: Mapping[str, Array]) -> bool:
    """Whether a slot with a bottleneck has the weights it has before any adapter."""
    if slot.bottleneck or not any(bottleneck_axis(slot, part) is not None for part in weights):
        return False
    neutral = neutral_weights(slot)
    return all(np.array_equal(value, neutral[part]) for part, value in weights.items())


def fresh_weights(slot: Slot, bottleneck: int, rng: np.random.Generator) -> dict[str, Array]:
    """Weights to train from: `up` is zero, so the slot starts as the identity.

    `down` is Kaiming-uniform as `torch.nn.Linear` has it (a = sqrt(5)): uniform in
    +-1/sqrt(fan_in).
    """
    weights = neutral_weights(slot, bottleneck)
    for part in ("down", "table", "f_down", "g_down"):
        if part in weights:
            bound = fan_in(slot, part) ** -0.5
            drawn = rng.uniform(-bound, bound, weights[part].shape)
            weights[part] = drawn.astype(weights[part].dtype)
    return weights


def fan_in(slot: Slot, part: str) -> int:
    """How many numbers each output of a projection sums up."""
    return 1 if part == "table" else math.prod(part_shape(slot, part, 1))
