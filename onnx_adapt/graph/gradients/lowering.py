"""Lower fused operators: write the plain nodes for those that have no rule of their own.

Only nodes between the weights and the loss are lowered; what is before them stays as fast as
it was. A node that has further outputs, such as the keys and values of an attention, stays
beside its plain nodes and goes on making these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
from onnx import helper

from onnx_adapt.graph.gradients.attention import ATTENTION
from onnx_adapt.graph.gradients.backward import DOMAINS, nodes_on_way
from onnx_adapt.graph.gradients.definitions import defined, write_definition
from onnx_adapt.graph.gradients.lowered_layers import LAYERS
from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.gradients.table import RULES
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.graph.index import GraphView, ModelIndex, default_opset, index_model
from onnx_adapt.model.file import Model

PREFIX = "lowered:"

Lowering = Callable[[Tape, Step], str]
"""Adds the nodes for the first output of a fused operator, and returns it."""

LOWERED: dict[str, Lowering] = {**ATTENTION, **LAYERS}
"""How operators of ONNX Runtime are lowered, by operator."""


def lower(model: Model, results: Sequence[str], weights: Sequence[str]) -> Model:
    """A model in which no node between weights and results is fused, if it is known how.

    Args:
        model: The model; it is left as it was.
        results: Tensors of its main graph.
        weights: What is to be differentiated for.

    Raises:
        GradientError: If a fused node is of a kind that cannot be lowered.
    """
    result = model
    while True:
        index = index_model(result)
        found = [
            (view, node)
            for view, node in nodes_on_way(index.views, index.main, results, weights)
            if _lowering(index, node) is not None
        ]
        if not found:
            return result
        if result is model:
            result = model.copy()
            continue  # the nodes to replace are those of the copy
        for view in reversed(index.views.values()):  # bodies before the graphs around them
            _replace(index, view, [node for there, node in found if there is view])


def _lowering(index: ModelIndex, node: onnx.NodeProto) -> Lowering | None:
    """How a node is lowered; None if it has a rule, or nobody knows."""
    if node.domain not in DOMAINS or node.output[0].startswith(PREFIX):
        return None  # the latter makes only further outputs, beside its plain nodes
    fused = node.domain == "com.microsoft" or node.op_type.startswith("QLinear")
    if fused and node.op_type in LOWERED:
        return LOWERED[node.op_type]
    if node.op_type in RULES:
        return None
    version = default_opset(index.model.proto)
    return write_definition if defined(node, version) else None


def _replace(index: ModelIndex, view: GraphView, fused: Sequence[onnx.NodeProto]) -> None:
    """Put the plain nodes of fused ones in their places, in place."""
    if not fused:
        return
    nodes: list[onnx.NodeProto] = []
    for node in view.nodes:
        nodes += _plain(index, view, node) if any(node is item for item in fused) else [node]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del view.scope.graph.node[:]
    view.scope.graph.node.extend(kept)


def _plain(index: ModelIndex, view: GraphView, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    lowering = _lowering(index, node)
    assert lowering is not None
    name, version = str(node.output[0]), default_opset(index.model.proto)
    tape = Tape(index.model, view, version, prefix=f"{PREFIX}{name}:")
    made = lowering(tape, Step(node, (), ()))
    tape.nodes.append(helper.make_node("Identity", [made], [name], f"{tape.prefix}result"))
    index.model.proto.graph.initializer.extend(tape.constants.values())
    others = [other for other in node.output[1:] if other]
    if not any(view.consumers.get(other) or other in view.outputs for other in others):
        return tape.nodes
    fused = onnx.NodeProto.FromString(node.SerializeToString())
    fused.output[0] = f"{tape.prefix}fused"
    return [fused, *tape.nodes]
