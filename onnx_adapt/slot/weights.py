"""The weights of a slot: their shapes, and values to start from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import SlotError
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import PARTS, Draw, Size, part_of


def matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """Read the shape of a weight as matrices: how many, and the rows and columns of one.

    A vector is one matrix of one row.
    """
    *groups, rows, columns = (1, 1, *shape)
    return math.prod(groups), rows, columns


def stacks_of(slots: Iterable[Slot]) -> dict[str, int]:
    """How many matrices the weight has that a slot is on, by slot, where it is a stack."""
    counted = {slot.owner: matrices(slot.weight_shape)[0] for slot in slots}
    return {name: groups for name, groups in counted.items() if groups > 1}


def part_shape(slot: Slot, part: str, bottleneck: int) -> tuple[int, ...]:
    """The shape of one weight for a given bottleneck.

    `down` is `(source_width, r)` and `up` is `(r, width)`; on a channel axis they are
    `(r, source_width, 1, ...)` and `(width, r, 1, ...)` as Conv has them.

    Raises:
        SlotError: If the part is unknown.
    """
    row = part_of(part)
    behind = slot.rank - 2 if slot.axis == 1 else 0
    sizes: dict[Size, tuple[int, ...]] = {
        "r": (bottleneck,),
        "width": (slot.width,),
        "source": (slot.source_width,),
        "half": (slot.width // 2,),
        "window": slot.window[:behind] or (1,) * behind,
        "ones": (1,) * behind,
        1: (1,),
    }
    shape = row.channels if slot.axis == 1 and row.channels else row.shape
    return tuple(itertools.chain.from_iterable(sizes[size] for size in shape))


def row_shape(slot: Slot, name: str, rows: int, bottleneck: int) -> tuple[int, ...]:
    """The shape of an input that gives each row a value of its own: `(rows, 1, size)`.

    On a channel axis it is `(rows, size, 1, ...)`.
    """
    size = {"r": bottleneck, "width": slot.width}.get(str(slot.row_forms[name].size), 1)
    return (rows, size, *(1,) * (slot.rank - 2)) if slot.axis == 1 else (rows, 1, size)


def row_rank(slot: Slot) -> int:
    """The number of axes of the inputs by row of a batched slot."""
    return slot.rank if slot.axis == 1 else 3


def neutral_rows(slot: Slot) -> dict[str, Array]:
    """The default values of the inputs by row of a batched slot; they change nothing."""
    return {
        name: np.full([1] * row_rank(slot), row.off, DTYPES[slot.dtype])
        for name, row in slot.row_forms.items()
    }


def bottleneck_axis(slot: Slot, part: str) -> int | None:
    """The axis of a weight that is the bottleneck, or None.

    Raises:
        SlotError: If the part is unknown.
    """
    return part_of(part).bottleneck_axis(channels=slot.axis == 1)


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
        weights[part] = np.full(shape, PARTS[part].off, dtype)
    return weights


def is_empty(slot: Slot, weights: Mapping[str, Array]) -> bool:
    """Whether a slot with a bottleneck has the weights it has before any adapter."""
    if slot.bottleneck or not any(bottleneck_axis(slot, part) is not None for part in weights):
        return False
    neutral = neutral_weights(slot)
    return all(np.array_equal(value, neutral[part]) for part, value in weights.items())


def is_off(weights: Mapping[str, Array]) -> bool:
    """Whether a slot with these weights gives its target."""
    rows = ((PARTS[part], value) for part, value in weights.items())
    return all(np.all(value == row.off) for row, value in rows if row.silences)


def fresh_weights(slot: Slot, bottleneck: int, rng: np.random.Generator) -> dict[str, Array]:
    """Weights to train from: `up` is zero, so the slot starts as the identity.

    `down` is Kaiming-uniform as `torch.nn.Linear` has it (a = sqrt(5)): uniform in
    +-1/sqrt(fan_in).
    """
    weights = neutral_weights(slot, bottleneck)
    for part in weights:
        if PARTS[part].projects:
            bound = fan_in(slot, part) ** -0.5
            drawn = rng.uniform(-bound, bound, weights[part].shape)
            weights[part] = drawn.astype(weights[part].dtype)
    return weights


def fan_in(slot: Slot, part: str) -> int:
    """Count the terms in each output of a projection; a table adds none up and has 1."""
    row = part_of(part)
    looked_up = row.projects and row.draw is not Draw.FAN_IN
    size = math.prod(part_shape(slot, part, 1)) // matrices(slot.weight_shape)[0]
    return 1 if looked_up else size
