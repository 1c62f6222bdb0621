"""Turn slots around sub-layers back into bottleneck adapters, and couplings into theirs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import Bottleneck, Coupling, SlotEdit
from onnx_adapt.checkpoints.mapping import Graph
from onnx_adapt.checkpoints.placing.bottleneck_places import (
    PLACES,
    READS,
    BottleneckPlace,
    bottleneck_place,
)
from onnx_adapt.checkpoints.unplacing.base import Parts, find_module, no_module
from onnx_adapt.errors import CheckpointError
from onnx_adapt.slot.manifest import Slot


def bottleneck_edits(graph: Graph, slot: Slot, parts: Parts) -> Iterator[SlotEdit]:
    """What a slot around a sub-layer asks for.

    Raises:
        CheckpointError: If it is at no place where a library has bottlenecks.
    """
    found = find_module(graph, slot, lambda module: _place(graph, slot, module))
    if found is None:
        raise no_module(slot)
    module, (place, reads) = found
    edit = Bottleneck(
        module, place, reads, dict(parts), slot.activation, norm_after=slot.norm_after
    )
    yield SlotEdit(slot.name, edit, "linear")


def _place(graph: Graph, slot: Slot, module: str) -> tuple[str, str] | None:
    """Where a slot sits around a module and what it reads, if it does."""
    source = "" if slot.source == slot.inner else slot.source
    own = BottleneckPlace(slot.tensor, source, slot.plus, slot.norm)
    for call in graph.finder.calls(module):
        for place in PLACES if call.view.scope.path == slot.graph else ():
            for reads in READS:
                try:
                    tensors = bottleneck_place(graph.survey, call, module, place, reads)
                except CheckpointError:
                    continue  # a sub-layer without a residual connection, or a LayerNorm
                if tensors == own:
                    return place, reads
    return None


def coupling_edits(graph: Graph, slot: Slot, parts: Parts) -> Iterator[SlotEdit]:
    """What the slot of an invertible adapter asks for.

    Raises:
        CheckpointError: If it is not on the output of a module.
    """

    def is_output(module: str) -> bool | None:
        outputs = graph.finder.output(module)
        return [(v.scope.path, t) for v, t in outputs] == [(slot.graph, slot.tensor)] or None

    found = find_module(graph, slot, is_output)
    if found is None:
        raise no_module(slot)
    whole = {part: np.asarray(value) for part, value in parts.items()}
    yield SlotEdit(slot.name, Coupling(found[0], whole, slot.activation))
