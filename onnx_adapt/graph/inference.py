"""Types and shapes as they follow from a model's inputs and weights.

What a model records of its own tensors may be wrong: other tools change the batch or the
number of classes and leave the records. So ONNX's shape inference runs on a copy without
them. Only what an operator makes that nobody knows keeps its record, for the nodes behind it.
"""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import onnx

from onnx_adapt.graph.constants import Weight
from onnx_adapt.graph.endless_shapes import has_endless_shapes
from onnx_adapt.graph.node_order import running_order
from onnx_adapt.graph.stand_ins import Draft, Find, stand_in
from onnx_adapt.model import walk

_Key = tuple[str, str, str]
"""Domain, name and overload of an operator or function."""

FindConstant = Callable[[str, str], Weight | None]
"""Gives the constant that can be read in a graph, by the graph's path and a name."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """What inference gave.

    Attributes:
        values: For each graph, by its path, the tensors with their types, to be read once.
        plain: Whether ONNX alone, given the model as it is, infers the same.
    """

    values: Mapping[str, Iterable[onnx.ValueInfoProto]]
    plain: bool


def infer(proto: onnx.ModelProto, look: FindConstant) -> Inferred:
    """Infer the types and shapes of a model's tensors without its own records.

    Nodes that are not in order are sorted, operators of ONNX Runtime are replaced by
    stand-ins, and weights that a body declares as inputs are weights: ONNX's inference
    takes a model as it ought to be, ONNX Runtime as it is.

    Args:
        proto: The model; it is left as it is.
        look: Gives its constants.
    """
    try:
        cleaned = _clean_copy(proto, look)
    except RecursionError:  # functions in functions, deeper than ONNX itself goes
        return Inferred({}, False)
    result = _run(cleaned.data) if cleaned.data else None
    graphs = [scope.graph for scope in walk.scopes(result.graph)] if result else []
    for graph in graphs:
        _rename((*graph.value_info, *graph.output), cleaned.names)
    values = {graph.name: chain(graph.value_info, graph.output) for graph in graphs}
    return Inferred(values, cleaned.plain and result is not None)


@dataclass(frozen=True, slots=True)
class _Cleaned:
    """A model made ready for inference.

    Attributes:
        data: The model, serialised; empty if inference would never end.
        names: What the tensors that were renamed were called.
        plain: Whether only records had to go.
    """

    data: bytes
    names: Mapping[str, str]
    plain: bool


def _clean_copy(proto: onnx.ModelProto, look: FindConstant) -> _Cleaned:
    """Make ready a copy, which is gone as a message before inference needs the memory."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    names = _tell_apart(copy.graph)
    cleaning = _Cleaning(copy, lambda path, name: look(path, names.get(name, name)))
    cleaning.clean()
    data = b"" if has_endless_shapes(copy) else copy.SerializeToString()
    return _Cleaned(data, names, cleaning.plain)


def typed_tensors(proto: onnx.ModelProto) -> dict[str, set[str]]:
    """The tensors that ONNX alone, also if it is strict, knows the type of, by graph."""
    result = None if has_endless_shapes(proto) else _run(proto.SerializeToString(), (False,))
    versions = {o.domain: o.version for o in proto.opset_import}
    found = {}
    for scope in walk.scopes(result.graph) if result else ():
        graph = scope.graph
        values = (*graph.value_info, *graph.output)
        names = {value.name for value in values if value.type.tensor_type.elem_type}
        for node in graph.node:
            if _infers(node.op_type, versions.get(node.domain, 0), node.domain) is False:
                names.difference_update(node.output)
        found[scope.path] = names
    return found


def _run(data: bytes, ways: Iterable[bool] = (True, False)) -> onnx.ModelProto | None:
    """The model with what ONNX infers; None if it infers nothing.

    Args:
        data: The model, serialised.
        ways: Whether to follow the numbers of shapes, through Shape, Gather, Concat to
            Reshape; one after the other until one works.
    """
    for follow_shapes in ways:
        try:
            inferred = onnx.shape_inference.infer_shapes(data, data_prop=follow_shapes)
        except (
            onnx.shape_inference.InferenceError,
            onnx.checker.ValidationError,
            RuntimeError,
            ValueError,
        ):
            continue
        return inferred
    # What the model itself records is used then; a site without a type says so.
    return None


def _tell_apart(main: onnx.GraphProto) -> dict[str, str]:
    """Give each tensor of a body a name that no other graph has, in place.

    ONNX follows the numbers in shapes by the names of tensors alone, and takes those of one
    branch for those of the other.

    Returns:
        What the renamed tensors were called.
    """
    if not any(True for node in main.node for _ in walk.bodies(node)):
        return {}
    taken, before = set(_declared(main)), {}
    waiting = [(node, ChainMap[str, str]()) for node in main.node]
    while waiting:
        node, around = waiting.pop()
        for _, body in walk.bodies(node):
            own: dict[str, str] = {}
            for name in _declared(body):
                new = name
                while new in taken:
                    new += f"/{len(taken)}"
                taken.add(new)
                if new != name:
                    own[name], before[new] = new, name
                elif name in around:
                    own[name] = name
            names = around.new_child(own)
            _rename((*body.input, *body.output, *body.value_info, *body.initializer), names)
            for inner in body.node:
                for listed in (inner.input, inner.output):
                    for i, name in enumerate(listed):
                        if name in names:
                            listed[i] = names[name]
            waiting += [(inner, names) for inner in body.node]
    return before


def _rename(
    values: Iterable[onnx.ValueInfoProto | onnx.TensorProto], names: Mapping[str, str]
) -> None:
    for value in values:
        if value.name in names:
            value.name = names[value.name]


def _declared(graph: onnx.GraphProto) -> dict[str, None]:
    """The tensors of a graph that are not of a graph around it.

    Protobuf gives a name that is not UTF-8 as bytes; no runtime takes that.
    """
    values = (*graph.input, *graph.initializer)
    made = (name for node in graph.node for name in node.output if name)
    names = (*(value.name for value in values), *made)
    return dict.fromkeys(name for name in names if isinstance(name, str))


@dataclass(slots=True)
class _Cleaning:
    """Makes of a copy what ONNX's inference can follow.

    Attributes:
        proto: The copy.
        look: Gives constants.
        versions: The operator sets it imports.
        functions: The functions of the model.
        known: Whether ONNX infers through an operator or function.
        plain: Whether only records had to go.
    """

    proto: onnx.ModelProto
    look: FindConstant
    versions: dict[str, int] = field(default_factory=dict)
    functions: dict[_Key, onnx.FunctionProto] = field(default_factory=dict)
    known: dict[_Key, bool] = field(default_factory=dict)
    plain: bool = True

    def clean(self) -> None:
        """Clean the copy, in place."""
        self.versions = {o.domain: o.version for o in self.proto.opset_import}
        self.functions = {(f.domain, f.name, f.overload): f for f in self.proto.functions}
        # Bodies before the graphs around them: rewriting a graph copies the bodies in it.
        for scope in reversed(list(walk.scopes(self.proto.graph))):
            self._graph(scope)
        _import_onnx(self.proto.opset_import)

    def _graph(self, scope: walk.Scope) -> None:
        """Clean one graph."""
        graph = scope.graph
        nodes = list(graph.node)
        drafts, foreign = self._unknown(
            nodes, lambda name: self.look(scope.path, name), scope.path
        )
        dropped = scope.parent is not None and _drop_weights(graph)
        order = running_order(nodes)
        graph.name = scope.path
        _forget(graph, foreign)
        if drafts or order is not None:
            places = range(len(nodes)) if order is None else order
            _put(graph.node, _written(nodes, places, drafts))
        self.plain = self.plain and not (drafts or foreign or dropped or order)

    def _function(self, key: _Key) -> bool:
        """Clean a function, of whose inputs nothing is known; returns if it is known then."""
        self.known[key] = False  # should it call itself
        function = self.functions[key]
        nodes = list(function.node)
        drafts, foreign = self._unknown(nodes, lambda _: None, function.name)
        del function.value_info[:]
        if drafts:
            self.plain = False
            _put(function.node, _written(nodes, range(len(nodes)), drafts))
            _import_onnx(function.opset_import)
        return not foreign

    def _unknown(
        self, nodes: Sequence[onnx.NodeProto], find: Find, path: str
    ) -> tuple[dict[int, Draft], set[str]]:
        """What stands for the nodes ONNX does not know, and what they make without it."""
        drafts: dict[int, Draft] = {}
        foreign: set[str] = set()
        for i, node in enumerate(nodes):
            if self._knows(node):
                continue
            foreign.update(node.output)
            draft = stand_in(node, find, self._sizes, f"stand_in/{path}/{i}")
            if draft is not None:
                drafts[i] = draft
                foreign.difference_update(name for n in draft.nodes for name in n.output)
        return drafts, foreign

    def _sizes(self, name: str) -> Sequence[int]:
        """The axes of an input of the model, 0 where one has no fixed size."""
        dims = (
            value.type.tensor_type.shape.dim
            for value in self.proto.graph.input
            if value.name == name
        )
        return [dim.dim_value for dim in next(dims, ())]

    def _knows(self, node: onnx.NodeProto) -> bool:
        """Whether ONNX infers what a node makes."""
        key = (node.domain, node.op_type, node.overload)
        if key not in self.known:
            if key in self.functions:
                self.known[key] = self._function(key)
            else:
                version = self.versions.get(node.domain, 0)
                self.known[key] = bool(_infers(node.op_type, version, node.domain))
        return self.known[key]


@functools.cache
def _infers(operator: str, version: int, domain: str) -> bool | None:
    """Whether ONNX infers through an operator itself; None if it does not know it.

    Through some it goes by way of a function body, of which it does not see the defaults of
    attributes, and gives up.
    """
    try:
        schema = onnx.defs.get_schema(operator, version, domain)
    except (onnx.defs.SchemaError, TypeError):  # an opset of 2**40 is no number to it
        return None
    return bool(schema.has_type_and_shape_inference_function)


def _forget(graph: onnx.GraphProto, foreign: Container[str]) -> None:
    """Drop the records of a graph but those of foreign tensors, in place."""
    kept = [value.SerializeToString() for value in graph.value_info if value.name in foreign]
    del graph.value_info[:]
    graph.value_info.extend(map(onnx.ValueInfoProto.FromString, kept))
    for value in graph.output:
        if value.name not in foreign and value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")


def _drop_weights(body: onnx.GraphProto) -> bool:
    """Let the weights of a body be no inputs of it, in place; returns if some were."""
    stored = {tensor.name for tensor in body.initializer}
    places = [i for i, value in enumerate(body.input) if value.name in stored]
    for i in reversed(places):
        del body.input[i]
    return bool(places)


def _written(
    nodes: Sequence[onnx.NodeProto], places: Iterable[int], drafts: Mapping[int, Draft]
) -> list[onnx.NodeProto]:
    return [n for i in places for n in (drafts[i].nodes if i in drafts else [nodes[i]])]


def _put(field_: Any, nodes: Sequence[onnx.NodeProto]) -> None:
    copies = [node.SerializeToString() for node in nodes]
    del field_[:]
    field_.extend(map(onnx.NodeProto.FromString, copies))


def _import_onnx(imports: Any) -> None:
    """Import ONNX's own operators, where a model has none, for stand-ins, in place."""
    if not any(item.domain in ("", "ai.onnx") for item in imports):
        imports.add(domain="", version=onnx.defs.onnx_opset_version())
