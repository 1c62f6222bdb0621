"""Turn slots on the outputs of layers back into LoRA, DoRA and IA3.

An example of DoRA. The slot on `query`, whose bias is in its node, has

    scale    m / |W + B A|, one number for each row
    up       scale * B transposed
    up_bias  (1 - scale) * bias, because DoRA does not scale the bias and the slot does

so `B` is `up / scale`, `m` is `scale * |W + B A|`, and what is left of `up_bias` without
`(1 - scale) * bias` is `scale` times LoRA's own bias.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import KEEP, LowRank, Scaling, SlotEdit
from onnx_adapt.checkpoints.mapping import Graph
from onnx_adapt.checkpoints.modules.weights import read_bias, read_matrix
from onnx_adapt.checkpoints.placing.low_rank import kernel_window
from onnx_adapt.checkpoints.unplacing.base import (
    Parts,
    find_module,
    layer_kind,
    no_module,
)
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import attribute
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.slot.manifest import Slot

_PARTS = {"down", "up", "up_bias", "scale", "table", "gate", "gate_bias"}
_ROUNDING = 1e-5


def is_low_rank(slot: Slot, parts: Parts) -> bool:
    """Whether a slot could be LoRA, DoRA or IA3 on a layer, from what it computes."""
    plain = not (slot.plus or slot.norm or slot.norm_after) and set(parts) <= _PARTS
    if plain and set(parts) <= {"scale"}:
        return True
    return plain and slot.activation == "identity" and slot.source != slot.inner


def layer_edits(graph: Graph, slot: Slot, parts: Parts) -> Iterator[SlotEdit]:
    """What a slot on a layer asks for, for each module that the layer computes.

    Raises:
        CheckpointError: If the slot is on no module, or its weights are of another kind.
    """
    if slot.modules:
        for module in slot.modules:
            yield from _packed_edits(graph, slot, parts, module)
        return
    scaled = set(parts) <= {"scale"}
    place = find_module(graph, slot, lambda module: _call(graph, slot, module, scaled))
    if place is None:
        raise no_module(slot)
    module, call = place
    if not scaled:
        edit = _low_rank(graph, slot, parts, module, call)
        yield SlotEdit(slot.name, edit, layer_kind(call), _has_bias(graph, call))
    elif parts:
        on_input = slot.tensor not in (call.raw, call.output)
        edit_of = Scaling(module, parts["scale"].reshape(-1), on_input)
        yield SlotEdit(slot.name, edit_of, layer_kind(call))


def _call(graph: Graph, slot: Slot, module: str, scaled: bool) -> LayerCall | None:
    """The call of a module that a slot is on, or whose input it scales."""
    for call in graph.finder.calls(module):
        if call.view.scope.path != slot.graph or call.packing:
            continue
        if scaled and slot.tensor in (call.output, call.source):
            return call
        if slot.tensor in (call.raw, call.output) and slot.source == call.source:
            return call
    return None


def _packed_edits(graph: Graph, slot: Slot, parts: Parts, module: str) -> Iterator[SlotEdit]:
    """What a slot on a layer that computes several modules asks for one of them.

    Raises:
        CheckpointError: If the graph does not compute the module there.
    """
    calls = [c for c in graph.finder.calls(module) if slot.tensor in (c.raw, c.output)]
    if not calls or calls[0].span is None:
        raise no_module(slot)
    start, end = calls[0].span
    own = {part: value[..., start:end] for part, value in parts.items() if part != "down"}
    if set(parts) <= {"scale"}:
        if np.any(own["scale"] != 1):
            yield SlotEdit(slot.name, Scaling(module, own["scale"], False), "linear")
        return
    units = np.any(own["up"] != 0, axis=1)
    changed = units.any() or any(np.any(own[part] != off) for part, off in _OFF if part in own)
    if changed:
        own |= {"down": parts["down"][:, units], "up": own["up"][units]}
        edit = _low_rank(graph, slot, own, module, calls[0])
        yield SlotEdit(slot.name, edit, "linear", _has_bias(graph, calls[0]))


_OFF = (("up_bias", 0), ("scale", 1))


def _low_rank(graph: Graph, slot: Slot, parts: Parts, module: str, call: LayerCall) -> LowRank:
    a, b = _matrices(slot, parts, call)
    b = b / call.alpha
    bias = parts.get("up_bias")
    if "gate" in parts:
        return LowRank(module, a, b, 1.0, gate=(parts["gate"].T, parts["gate_bias"]))
    if "scale" not in parts:
        bias = None if bias is None else bias / call.alpha
        return LowRank(module, a, b, 1.0, bias=bias)
    scale = parts["scale"].reshape(-1)
    if not np.all(scale):
        raise CheckpointError(
            f"slot {slot.name!r} has a scale of 0, from which DoRA's B cannot be computed",
            hint=KEEP,
        )
    b = b / scale.reshape(-1, *(1,) * (b.ndim - 1))
    inside = read_bias(graph.model, call)
    scales_bias = inside is not None or slot.tensor != call.raw
    if inside is not None and bias is not None:
        scales_bias = False
        bias = bias - (1 - scale) * inside
        bias = None if np.abs(bias).max() < _ROUNDING * np.abs(inside).max() else bias
    elif call.raw == call.output and inside is None:
        scales_bias = False
    weight = read_matrix(graph.model, call)
    weight = weight.T if layer_kind(call) == "embedding" else weight
    delta = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    norm = np.linalg.norm(weight.reshape(len(weight), -1) + delta, axis=1)
    return LowRank(
        module,
        a,
        b,
        1.0,
        bias=None if bias is None else bias / scale,
        magnitude=scale * norm,
        scales_bias=scales_bias,
    )


def _has_bias(graph: Graph, call: LayerCall) -> bool:
    return call.raw != call.output or read_bias(graph.model, call) is not None


def _matrices(slot: Slot, parts: Parts, call: LayerCall) -> tuple[Array, Array]:
    """A and B of PyTorch, with B times LoRA's scale."""
    if slot.axis != 1 or layer_kind(call) != "conv":
        return parts["table" if "table" in parts else "down"].T, parts["up"].T
    a, b = parts["down"], parts["up"]
    if slot.window != kernel_window(call, a):
        raise CheckpointError(
            f"slot {slot.name!r} moves over its input as {list(slot.window)}, and the "
            f"convolution {call.label!r} does not",
            hint=KEEP,
        )
    return a, _grouped(slot, b, attribute(call.node, "group", 1))


def _grouped(slot: Slot, b: Array, groups: int) -> Array:
    """The weight of a grouped 1x1 convolution in a full one that is zero between groups."""
    out, rank = len(b) // groups, b.shape[1] // groups
    blocks = [b[i * out : (i + 1) * out, i * rank : (i + 1) * rank] for i in range(groups)]
    if sum(np.count_nonzero(block) for block in blocks) != np.count_nonzero(b):
        raise CheckpointError(
            f"slot {slot.name!r} mixes the {groups} groups of its convolution, which LoRA of "
            "that convolution cannot",
            hint=KEEP,
        )
    return np.concatenate(blocks)
