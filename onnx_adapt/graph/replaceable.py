"""The plan to make a weight of the base replaceable by adapters."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from onnx_adapt.slot.base_changes import ReplaceableWeight


@dataclass(frozen=True, slots=True)
class ReplacementPlan:
    """The plan to make one weight of the base replaceable.

    Attributes:
        weight: Its record for the manifest.
        default: The tensor that is used while nothing is fed: the base's value.
        readers: Where it is read: graph, index of the node, position of the input.
    """

    weight: ReplaceableWeight
    default: onnx.TensorProto
    readers: tuple[tuple[str, int, int], ...]
