"""Let the calls of one module share one set of weights where these are equal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.dtypes import Array
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.places import can_share, further_place


def share_weights(placement: Placement) -> None:
    """Make one slot with several places of the slots on the calls of one module.

    Their weights must be equal, bit for bit. Those of LoRA always are. Those of DoRA also
    depend on the weight of the base, which a tool may have changed for one of the calls.

    For example a module `ffn` that runs three times, with another weight the third time, has
    the slots `ffn`, `ffn.2` and `ffn.3` before. After, it has `ffn`, its further place `ffn@2`
    and `ffn.3`.
    """
    first: dict[str, list[Slot]] = {}
    for i, slot in enumerate(placement.slots):
        known = first.setdefault(placement.wanted[slot.name], [])
        weights = placement.weights[slot.name]
        owner = next(
            (
                other
                for other in known
                if can_share(other, slot) and _equal(placement.weights[other.name], weights)
            ),
            None,
        )
        if owner is None:
            known.append(slot)
            continue
        placement.slots[i] = place = further_place(slot, owner, placement.taken)
        placement.taken.add(place.name)
        del placement.weights[slot.name]


def _equal(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return all(np.array_equal(one[part], other[part]) for part in one)
