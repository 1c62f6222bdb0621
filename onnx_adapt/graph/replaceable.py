"""How a weight of the base becomes one that adapters can replace."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from onnx_adapt.slot.manifest import ReplaceableWeight


@dataclass(frozen=True, slots=True)
class ReplacementPlan:
    """How a weight of the base becomes replaceable.

    Attributes:
        weight: The record of it.
        default: The tensor it has while nothing is fed: the base's value.
        readers: Where it is read: graph, index of the node, position of the input.
    """

    weight: ReplaceableWeight
    default: onnx.TensorProto
    readers: tuple[tuple[str, int, int], ...]
