"""Turn slots on weights inside operators back into LoRA, DoRA and IA3 of modules."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import KEEP, LowRank, Scaling, SlotEdit
from onnx_adapt.checkpoints.mapping import Graph
from onnx_adapt.checkpoints.modules.inner_weights import InnerWeight
from onnx_adapt.checkpoints.modules.weights import read_weight
from onnx_adapt.checkpoints.unplacing.base import Parts
from onnx_adapt.errors import CheckpointError
from onnx_adapt.slot.manifest import Slot


def weight_edits(graph: Graph, slot: Slot, parts: Parts) -> Iterator[SlotEdit]:
    """What a slot on a weight asks for, for each module whose columns the weight has.

    Raises:
        CheckpointError: If the weight is a parameter of no layer, such as an LSTM's.
    """
    for module in slot.modules or (slot.name.removesuffix(".bias"),):
        yield from _module_edits(graph, slot, parts, module)


def _module_edits(graph: Graph, slot: Slot, parts: Parts, module: str) -> Iterator[SlotEdit]:
    inner = next(iter(graph.finder.inner_weights(module)), None)
    if inner is None or not inner.in_out or inner.group is not None or inner.order:
        raise CheckpointError(
            f"slot {slot.name!r} is on the parameter {slot.tensor!r} of node {slot.node!r}, "
            "which is no layer; only adapters on layers can go back",
            hint=KEEP,
        )
    start, end = inner.span or (0, slot.weight_shape[-1])
    own = {part: value[..., start:end] for part, value in parts.items() if part != "down"}
    if "up" not in own:
        if "scale" in own and np.any(own["scale"] != 1) and len(slot.weight_shape) > 1:
            yield SlotEdit(slot.name, Scaling(module, own["scale"], False), "linear")
        return
    units = np.any(own["up"] != 0, axis=1)
    if units.any():
        own |= {"down": parts["down"][:, units], "up": own["up"][units]}
        edit = _low_rank(graph, slot, own, module, inner)
        yield SlotEdit(slot.name, edit, "linear")


def _low_rank(
    graph: Graph, slot: Slot, parts: Parts, module: str, inner: InnerWeight
) -> LowRank:
    a, b = parts["down"].T, parts["up"].T
    scale = parts.get("scale")
    if scale is None:
        return LowRank(module, a, b, 1.0)
    if not np.all(scale):
        raise CheckpointError(
            f"slot {slot.name!r} has a scale of 0, from which DoRA's B cannot be computed",
            hint=KEEP,
        )
    whole = read_weight(graph.model, inner.view, inner.tensor)
    own = whole if inner.span is None else whole[:, slice(*inner.span)]
    b = b / scale[:, None]
    norm = np.linalg.norm(own.T + b @ a, axis=1)
    return LowRank(module, a, b, 1.0, magnitude=scale * norm)
