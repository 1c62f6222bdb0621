"""Visit every graph and tensor of a model, bodies of control flow included."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import onnx

_LONGEST = 300
"""How many characters of a node's name are part of the paths of its bodies."""


@dataclass(frozen=True, slots=True)
class Scope:
    """A graph and its path in the model.

    Attributes:
        graph: The graph itself.
        path: `main` for the main graph; for a body the nodes and attributes that lead to
            it, such as `main/cond.then_branch`.
        parent: The graph that holds the node with this body, or None for the main graph.
        owner: Index of that node in the parent graph, or -1.
        attribute: Name of the attribute that holds the body.
    """

    graph: onnx.GraphProto
    path: str = "main"
    parent: Scope | None = None
    owner: int = -1
    attribute: str = ""


def bodies(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """The graphs inside one node (If, Loop, Scan, ...), with the attribute's name."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for number, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}[{number}]", graph


def has_bodies(node: onnx.NodeProto) -> bool:
    """Whether there are graphs inside a node; few nodes have any."""
    return any(map(_holds_graph, node.attribute))


def _holds_graph(attribute: onnx.AttributeProto) -> bool:
    return attribute.HasField("g") or bool(attribute.graphs)


def scopes(main: onnx.GraphProto, path: str = "main") -> Iterator[Scope]:
    """Yield a graph and every body inside it, outermost first, each with a unique path.

    A body is named after its node and the attribute that contains it. If the node's name is
    not unique, its position among the nodes with bodies is added. No path contains a colon
    if `path` does not.

    Args:
        main: The graph to begin with.
        path: Its path.
    """
    waiting = deque([Scope(main, path)])
    taken = {path}
    while waiting:
        scope = waiting.popleft()
        yield scope
        holders = [(i, n) for i, n in enumerate(scope.graph.node) if has_bodies(n)]
        names = Counter(node.name for _, node in holders)
        for place, (index, node) in enumerate(holders):
            # Every nested body repeats the name, so a long one could fill the memory.
            label = f"{node.name or node.op_type}".replace(":", "_")[:_LONGEST]
            if not node.name or names[node.name] > 1:
                label += f"#{place}"
            inner = {_cut(name, i): body for i, (name, body) in enumerate(bodies(node))}
            while any(f"{scope.path}/{label}.{attribute}" in taken for attribute in inner):
                label += f"#{place}"
            for attribute, body in inner.items():
                inside = Scope(
                    body, f"{scope.path}/{label}.{attribute}", scope, index, attribute
                )
                taken.add(inside.path)
                waiting.append(inside)


def _cut(attribute: str, place: int) -> str:
    """An attribute's name as a part of a path; a long one is cut, and numbered."""
    whole = len(attribute) <= _LONGEST
    return attribute if whole else f"{attribute[:_LONGEST]}#{place}"


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that the bodies of a node read from the graphs around them."""
    for _, body in bodies(node):
        own = {value.name for value in body.input} | {t.name for t in body.initializer}
        for inner in body.node:
            for name in (*inner.input, *captured(inner)):
                if name and name not in own:
                    yield name
            own.update(inner.output)
        for value in body.output:
            if value.name not in own:
                yield value.name


def _node_tensors(
    nodes: Iterable[onnx.NodeProto], *, sparse: bool
) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute, sparse=sparse)


def _attribute_tensors(
    attribute: onnx.AttributeProto, *, sparse: bool
) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if sparse:
        yield from _sparse_tensors(attribute.sparse_tensors)
        if attribute.HasField("sparse_tensor"):
            yield from _sparse_tensors([attribute.sparse_tensor])
    if attribute.HasField("g"):
        yield from graph_tensors(attribute.g, sparse=sparse)
    for graph in attribute.graphs:
        yield from graph_tensors(graph, sparse=sparse)


def _sparse_tensors(items: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for item in items:
        yield item.values
        yield item.indices


def graph_tensors(
    graph: onnx.GraphProto, *, sparse: bool = True
) -> Iterator[onnx.TensorProto]:
    """Yield every tensor stored in a graph and in the bodies inside it."""
    yield from graph.initializer
    if sparse:
        yield from _sparse_tensors(graph.sparse_initializer)
    yield from _node_tensors(graph.node, sparse=sparse)


def tensors(proto: onnx.ModelProto, *, sparse: bool = True) -> Iterator[onnx.TensorProto]:
    """Yield every tensor stored in a model: in graphs, functions and training information.

    Args:
        proto: The model.
        sparse: Whether to include the parts of sparse tensors. Their data cannot be
            external: ONNX Runtime before 1.32 and the ONNX checker refuse it.
    """
    yield from graph_tensors(proto.graph, sparse=sparse)
    for function in proto.functions:
        yield from _node_tensors(function.node, sparse=sparse)
        for attribute in function.attribute_proto:
            yield from _attribute_tensors(attribute, sparse=sparse)
    for training in proto.training_info:
        yield from graph_tensors(training.initialization, sparse=sparse)
        yield from graph_tensors(training.algorithm, sparse=sparse)


def inlines_to_more_than(proto: onnx.ModelProto, most: int) -> bool:
    """Whether a model has more than `most` nodes once its functions are inlined.

    True as well if a function calls itself. A file of 60 functions that each call the next
    one twice is small, and has 2^60 nodes inlined.
    """
    nodes = {_key(f.domain, f.name, f): f.node for f in proto.functions}
    calls = {key: _calls(body, nodes) for key, body in nodes.items()}
    sizes: dict[tuple[str, ...], int] = {}
    try:
        for key in TopologicalSorter(calls).static_order():
            size = len(nodes[key]) + sum(sizes[called] for called in calls[key])
            sizes[key] = min(size, most + 1)
    except CycleError:
        return True
    called = _calls(proto.graph.node, nodes)
    return len(proto.graph.node) + sum(sizes[key] for key in called) > most


def _calls(
    nodes: Iterable[onnx.NodeProto], functions: Container[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """List the functions that nodes and their bodies call, once for each call."""
    found = []
    for node in nodes:
        key = _key(node.domain, node.op_type, node)
        if key in functions:
            found.append(key)
        for _, body in bodies(node):
            found += _calls(body.node, functions)
    return found


def _key(
    domain: str, name: str, overloaded: onnx.NodeProto | onnx.FunctionProto
) -> tuple[str, ...]:
    return domain, name, overloaded.overload
