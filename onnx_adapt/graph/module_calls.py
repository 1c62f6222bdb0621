"""Modules that run several times: the output of each call."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layers import is_layer, layer_weight
from onnx_adapt.graph.modules import ModuleIndex, last_boundary
from onnx_adapt.graph.value_numbers import ValueNumbers


def module_calls(modules: ModuleIndex, path: str) -> list[tuple[GraphView, list[str]]]:
    """What each call of a module hands to the rest of the model, per graph it is in.

    An exporter does not tell the calls apart. They show in the layers: a module runs as
    often as each weight inside it is read. One without weights runs as often as it has
    parts of the same operators that do not read each other.

    For example a module `block` of a Linear and a Relu that runs twice is exported as

        0 MatMul(x, w) -> a      1 Relu(a) -> b
        2 MatMul(b, w) -> c      3 Relu(c) -> d

    `w` is read twice, by nodes 0 and 2, so there are two calls, which end at or behind these
    nodes. The last call hands out `d`, one node behind its MatMul; so the first call hands out
    what is one node behind node 0, `b`.
    """
    members: dict[str, set[int]] = {}
    for name in (path, *modules.numbered.get(path, ())):
        for graph, nodes in modules.members.get(name, {}).items():
            members.setdefault(graph, set()).update(nodes)
    found = []
    for graph, inside in members.items():
        view = modules.index.views[graph]
        tensors = _calls(view, sorted(inside), modules.values)
        if tensors:
            found.append((view, tensors))
    return found


def _calls(view: GraphView, inside: Sequence[int], values: ValueNumbers) -> list[str]:
    """The output of each call of a module in one graph, whose nodes are given."""
    inside = [i for i in inside if view.nodes[i].op_type != "Constant"]
    last = last_boundary(view, inside)
    if last is None:
        return []
    readers: dict[int, list[int]] = {}
    for i in inside:
        node = view.nodes[i]
        weight = layer_weight(view, node) if is_layer(view, node) else None
        if weight is not None:
            readers.setdefault(values.of(weight.tensor), []).append(i)
    if not readers:
        return _parts(view, inside) or [last]
    count = min(map(len, readers.values()))
    rounds = [nodes for nodes in readers.values() if len(nodes) == count]
    ends = [max(nodes) for nodes in zip(*rounds, strict=True)]
    return _rounds(view, inside, last, ends) if count > 1 else [last]


def _rounds(
    view: GraphView, inside: Sequence[int], last: str, ends: Sequence[int]
) -> list[str]:
    """The output of each call, given the last layer of each and the output of the last.

    The calls run the same nodes, so each output is equally far behind its last layer.
    """
    final = view.producers[last]
    distance = inside.index(final) - inside.index(ends[-1])
    found = []
    for end in ends:
        at = inside.index(end) + distance
        same = at >= 0 and view.nodes[inside[at]].op_type == view.nodes[final].op_type
        found.append(str(view.nodes[inside[at] if same else end].output[0]))
    return [*found[:-1], last]


def _parts(view: GraphView, inside: Sequence[int]) -> list[str]:
    """The outputs of a module's parts, if each has the same operators; else nothing."""
    part_of: dict[int, set[int]] = {}
    for i in inside:
        part = part_of[i] = {i}
        for name in view.nodes[i].input:
            fed = part_of.get(view.producers.get(name, i), part)
            if fed is not part:
                small, part = sorted((part, fed), key=len)
                part |= small
                part_of.update(dict.fromkeys(small, part))
    parts = {id(part): part for part in part_of.values()}.values()
    handed = [(tensor, part) for part in parts if (tensor := last_boundary(view, part))]
    kinds = {tuple(sorted(view.nodes[i].op_type for i in part)) for _, part in handed}
    return [tensor for tensor, _ in handed] if len(kinds) == 1 else []
