"""Reverse mode: follow a graph from a loss back to weights, rule by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.gradients.table import FLAT, RULES
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.graph.index import GraphView, ModelIndex, default_opset
from onnx_adapt.model import walk

OLDEST = 17
"""The oldest operator set whose operators the rules are written in."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """The nodes that compute the gradients of a loss.

    Attributes:
        nodes: The nodes, to stand behind those of the forward graph.
        constants: Their initializers.
        grads: The tensor with the gradient of each weight, by the weight's name.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    grads: Mapping[str, str]


def differentiate(index: ModelIndex, loss: str, weights: Sequence[str]) -> Gradients:
    """Make the nodes that compute the gradients of a loss with respect to weights.

    Reverse-mode differentiation (Speelpenning, 1980): each node on the way from a weight to
    the loss is asked, last node first, for the gradients of what it reads. Nodes that are
    not on such a way get no gradient, so slots in the last layers cost little more than a
    forward run.

    Args:
        index: The forward model with its loss.
        loss: A tensor of the main graph with one number.
        weights: Inputs or initializers of the main graph.

    Raises:
        GradientError: If the loss does not depend on a weight, or an operator on the way
            has no rule.
    """
    view, opset = index.main, default_opset(index.model.proto)
    if opset < OLDEST:
        raise GradientError(
            f"{index.model.label} uses opset {opset}; gradients need {OLDEST} or newer",
            hint="convert it with onnx.version_converter",
        )
    tape = Tape(index.model, view, opset)
    way = find_way(view, loss, weights)
    seed = tape.add("Expand", tape.number(1, loss), tape.shape_of(loss))
    collected = {loss: [seed]}
    for node in reversed(way.nodes):
        _go_back(tape, node, way.changing, collected)
    grads = {weight: _total(tape, collected, weight) for weight in weights}
    return Gradients(tuple(tape.nodes), tuple(tape.constants.values()), grads)


@dataclass(frozen=True, slots=True)
class Way:
    """The part of a graph between weights and a loss.

    Attributes:
        nodes: The nodes that the loss depends on and that depend on a weight, in order.
        changing: The tensors that depend on a weight.
    """

    nodes: tuple[onnx.NodeProto, ...]
    changing: frozenset[str]


def find_way(view: GraphView, loss: str, weights: Sequence[str]) -> Way:
    """Find the nodes between weights and a loss.

    Raises:
        GradientError: If the loss does not depend on one of the weights.
    """
    way = _way(view, loss, weights)
    if idle := [weight for weight in weights if weight not in _read(way.nodes)]:
        raise GradientError(
            f"{loss!r} does not depend on {idle[0]!r}, so it cannot be trained with it",
            hint="train only the slots that the output depends on",
        )
    return way


def weights_on_way(view: GraphView, loss: str, weights: Sequence[str]) -> list[str]:
    """The weights that a loss depends on."""
    read = _read(_way(view, loss, weights).nodes)
    return [weight for weight in weights if weight in read]


def _way(view: GraphView, loss: str, weights: Sequence[str]) -> Way:
    changing = set(weights)
    nodes = []
    for node in _ancestors(view, loss):
        if node.op_type in FLAT or changing.isdisjoint((*node.input, *walk.captured(node))):
            continue
        nodes.append(node)
        changing.update(name for name in node.output if name)
    return Way(tuple(nodes), frozenset(changing))


def _read(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in (*node.input, *walk.captured(node))}


def _ancestors(view: GraphView, tensor: str) -> list[onnx.NodeProto]:
    """The nodes that a tensor depends on, each behind those that it reads from."""
    found: dict[int, onnx.NodeProto] = {}
    waiting = [(tensor, False)]
    while waiting:
        name, done = waiting.pop()
        place = view.producers.get(name)
        if place is None or place in found:
            continue
        node = view.nodes[place]
        if done:
            found[place] = node
            continue
        waiting.append((name, True))
        waiting += ((item, False) for item in (*node.input, *walk.captured(node)))
    return list(found.values())


def _go_back(
    tape: Tape,
    node: onnx.NodeProto,
    changing: frozenset[str],
    collected: dict[str, list[str]],
) -> None:
    """Add the gradients of what a node reads to those that are there."""
    grads = tuple(_total(tape, collected, name) if name else "" for name in node.output)
    if not any(grads):
        return
    rule = RULES.get(node.op_type)
    wanted = tuple(name in changing and _has_gradient(tape, name) for name in node.input)
    step = Step(node, grads, wanted)
    if rule is None:
        raise GradientError(
            f"there is no gradient for operator {node.op_type} (node {step.label})",
            hint="train slots that are behind it, nearer to the output",
        )
    if not grads[0] and node.op_type not in _SEVERAL:
        raise step.refuse("the loss depends on another output than the first")
    for name, want, grad in zip(node.input, wanted, rule(tape, step), strict=False):
        if want and grad is not None:
            collected.setdefault(name, []).append(grad)


_SEVERAL = ("Split", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
"""Operators whose rules take the gradients of other outputs than the first."""


def _total(tape: Tape, collected: dict[str, list[str]], tensor: str) -> str:
    """The sum of the gradients of a tensor; '' if it has none."""
    grads = collected.get(tensor, [])
    if len(grads) > 1:
        grads[:] = [tape.add("Sum", *grads)]
    return grads[0] if grads else ""


def _has_gradient(tape: Tape, tensor: str) -> bool:
    """Whether a tensor holds floats, or the integers of a quantised layer."""
    kind = tape.elem_type(tensor)
    return kind in FLOATS or kind in _QUANTISED


_QUANTISED = {
    *(onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT16),
    *(onnx.TensorProto.UINT16, onnx.TensorProto.INT32),
}
"""Types of the integers that quantised layers read and make."""
