"""Random weights for slots, whose effect has the size of what the slots change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import PARTS, Draw
from onnx_adapt.slot.weights import fan_in, part_shape, row_shape

SIZES = (1, 8, 64)
"""The bottlenecks that are tried, in turn."""


@dataclass(frozen=True, slots=True)
class Read:
    """What a slot reads in one run: the typical sizes of its tensors, and their rows."""

    source: float
    target: float
    rows: int


@dataclass(slots=True)
class RandomWeights:
    """A source of random weights.

    Attributes:
        rng: The source of random numbers.
        read: What each slot reads, by name, for each set of inputs.
    """

    rng: np.random.Generator
    read: dict[str, list[Read]] = field(default_factory=dict)

    def note(self, slot: Slot, sources: Sequence[Array], targets: Sequence[Array]) -> None:
        """Note what a slot reads at all its places, in the run of one more set of inputs."""
        sizes = {len(value) for value in targets if value.ndim}
        rows = sizes.pop() if len(sizes) == 1 else 1
        seen = Read(_typical(sources), _typical(targets), rows)
        self.read.setdefault(slot.name, []).append(seen)

    def draw(
        self, slot: Slot, number: int, turn: int, strength: float = 1.0
    ) -> dict[str, Array]:
        """Draw weights for a slot.

        Args:
            slot: The slot, which owns its weights.
            number: The set of inputs, in the order in which they were noted.
            turn: Which of several bottlenecks they have, unless the slot has one of its own.
            strength: How strong they are; at 1 they change the target by half its size.
        """
        read = self.read[slot.name][number]
        # A slot on a weight multiplies `down` by `up`, and no source by `down`.
        source = fan_in(slot, "down") ** -0.5 if slot.on_weight else read.source
        size = slot.bottleneck or SIZES[turn % len(SIZES)]
        drawn: dict[str, tuple[tuple[int, ...], Draw]] = {
            part: (part_shape(slot, part, size), PARTS[part].draw) for part in slot.parts
        }
        for name, row in slot.row_forms.items():
            drawn[name] = (row_shape(slot, name, read.rows, size), row.draw)
        wide = np.float64 if slot.dtype == "float64" else np.float32
        weights = {}
        for part, (shape, how) in drawn.items():
            value = self.rng.standard_normal(shape, wide)
            if how is Draw.FAN_IN:
                value *= wide(1 / (source * np.sqrt(fan_in(slot, part))))
            elif how is Draw.TARGET:
                value *= wide(0.5 * strength * read.target / np.sqrt(max(size, 1)))
            elif how is Draw.NEAR_ONE:
                value = 1 + wide(0.3) * value
            weights[part] = value.astype(DTYPES[slot.dtype], copy=False)
        return weights


def _typical(values: Iterable[Array]) -> float:
    """The root mean square of some tensors; 1 if they are empty or all zero."""
    total, count = 0.0, 0
    for value in values:
        wide = value.astype(np.float64)
        wide = wide[np.isfinite(wide)]
        total, count = total + float(np.sum(wide * wide)), count + wide.size
    return float(np.sqrt(total / count)) or 1.0 if count else 1.0
