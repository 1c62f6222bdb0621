"""Follow one graph back from its results to what they depend on, rule by rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.graph.index import GraphView
from onnx_adapt.model import walk

DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Where the operators are that have rules."""

FLAT = frozenset(
    {
        *("Shape", "Size", "ConstantOfShape", "Range", "EyeLike", "OneHot", "NonZero"),
        *("Floor", "Ceil", "Round", "Sign", "ArgMax", "ArgMin", "Hardmax", "IsNaN", "IsInf"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("Not", "And", "Or", "Xor", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseNot"),
        *("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"),
        *("NonMaxSuppression", "Unique", "StringNormalizer"),
    }
)
"""Operators whose outputs do not change, or jump, when their inputs change a little."""


@dataclass(frozen=True, slots=True)
class Way:
    """The part of a graph between weights and results.

    Attributes:
        nodes: The nodes that a result depends on and that depend on a weight, in order.
        changing: The tensors that depend on a weight.
    """

    nodes: tuple[onnx.NodeProto, ...]
    changing: frozenset[str]

    def reads(self) -> set[str]:
        """All that the nodes read."""
        return {name for node in self.nodes for name in (*node.input, *walk.captured(node))}


def way_back(view: GraphView, results: Sequence[str], weights: Iterable[str]) -> Way:
    """Find the nodes of a graph between weights, also of a graph around it, and results."""
    changing = set(weights)
    nodes = []
    for node in _ancestors(view, results):
        if node.op_type in FLAT or changing.isdisjoint((*node.input, *walk.captured(node))):
            continue
        nodes.append(node)
        changing.update(name for name in node.output if name)
    return Way(tuple(nodes), frozenset(changing))


def _ancestors(view: GraphView, results: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that results depend on, each behind those that it reads from."""
    found: dict[int, onnx.NodeProto] = {}
    waiting = [(name, False) for name in results]
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


def nodes_on_way(
    views: Mapping[str, GraphView],
    view: GraphView,
    results: Sequence[str],
    weights: Iterable[str],
) -> Iterator[tuple[GraphView, onnx.NodeProto]]:
    """The nodes between weights and results, each with its graph, those in bodies included."""
    way = way_back(view, results, weights)
    for node in way.nodes:
        yield view, node
        for _, body in body_views(views, view, node):
            outputs = [value.name for value in body.scope.graph.output]
            yield from nodes_on_way(views, body, outputs, way.changing)


def body_views(
    views: Mapping[str, GraphView], view: GraphView, node: onnx.NodeProto
) -> list[tuple[str, GraphView]]:
    """The bodies of a node, each with the attribute that it is in."""
    if not any(True for _ in walk.bodies(node)):
        return []
    place = view.producers[next(name for name in node.output if name)]
    return [
        (body.scope.attribute, body)
        for body in views.values()
        if body.parent is view and body.scope.owner == place
    ]


def go_back(tape: Tape, seeds: Mapping[str, str], weights: Iterable[str]) -> dict[str, str]:
    """Add the nodes that compute the gradients of weights.

    Reverse-mode differentiation (Speelpenning, 1980): each node on the way from a weight to
    a result is asked, last node first, for the gradients of what it reads. Nodes that are
    not on such a way get no gradient, so slots in the last layers cost little more than a
    forward run.

    Args:
        tape: Where nodes are added; its view is the graph.
        seeds: The gradients of results, by result.
        weights: What to differentiate for.

    Returns:
        The gradients by weight; those on which no result depends are left out.

    Raises:
        GradientError: If a node on the way has no rule, or none for its kind.
    """
    wanted = list(weights)
    way = way_back(tape.view, list(seeds), wanted)
    collected = {name: [grad] for name, grad in seeds.items()}
    for node in reversed(way.nodes):
        _go_back_one(tape, node, way.changing, collected)
    grads = {weight: _total(tape, collected, weight) for weight in wanted}
    return {weight: grad for weight, grad in grads.items() if grad}


def _go_back_one(
    tape: Tape,
    node: onnx.NodeProto,
    changing: frozenset[str],
    collected: dict[str, list[str]],
) -> None:
    """Add the gradients of what a node reads to those that are there."""
    grads = tuple(_total(tape, collected, name) if name else "" for name in node.output)
    if not any(grads):
        return
    captured = tuple(dict.fromkeys(walk.captured(node)))
    wanted = tuple(
        name in changing and _has_gradient(tape, name) for name in (*node.input, *captured)
    )
    step = Step(node, grads, wanted, captured)
    rule = tape.rules.get(node.op_type) if node.domain in DOMAINS else None
    if rule is None:
        raise GradientError(f"there is no gradient for node {step.label}")
    if not grads[0] and node.op_type not in _SEVERAL:
        raise step.refuse("the loss depends on another output than the first")
    for name, want, grad in zip(step.reads, wanted, rule(tape, step), strict=False):
        if want and grad is not None:
            collected.setdefault(name, []).append(grad)


_SEVERAL = frozenset(
    {
        *("Split", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "If"),
        *("LSTM", "GRU", "RNN"),
    }
)
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
