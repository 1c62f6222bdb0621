"""A read-only index of a model: what makes and reads each tensor, and its type."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from itertools import chain

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.graph.constants import Weight, constant_of, derived, stored
from onnx_adapt.graph.endless_shapes import MOST_AXES
from onnx_adapt.graph.finite import require_finite
from onnx_adapt.graph.inference import infer
from onnx_adapt.graph.liveness import PARTLY_READ, inputs_read
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.model.walk import Scope

Shape = tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class TensorType:
    """What is known of a tensor.

    Attributes:
        elem_type: ONNX element type, or 0 if it is not known or not a tensor.
        shape: One entry per axis (a number, a symbol or None), or None if unknown.
    """

    elem_type: int = 0
    shape: Shape | None = None


UNKNOWN = TensorType()


def elem_name(elem_type: int) -> str:
    """The name of an element type: `float32`, `int64`, ...; '' if unknown."""
    if elem_type in FLOATS:
        return FLOATS[elem_type]
    known = onnx.TensorProto.DataType.values()
    if elem_type and elem_type not in known:
        return f"type {elem_type}"  # of a newer ONNX than the one installed
    return str(onnx.TensorProto.DataType.Name(elem_type)).lower() if elem_type else ""


def read_type(value: onnx.ValueInfoProto) -> TensorType:
    """Read the type of a declared tensor; sequences, maps and optionals are unknown."""
    if not value.type.HasField("tensor_type"):
        return UNKNOWN
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return TensorType(tensor.elem_type)
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in tensor.shape.dim
    )
    return TensorType(tensor.elem_type, shape)


def text(value: str | bytes) -> str:
    """A string of a model: protobuf gives one that is not UTF-8 as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def default_opset(proto: onnx.ModelProto) -> int:
    """The version of the default operator set that a model imports; 0 if none."""
    versions = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    return versions[0] if versions else 0


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """The integer attribute `name` of a node."""
    for item in node.attribute:
        if item.name == name:
            return int(item.i)
    return default


@dataclass(slots=True, eq=False)
class GraphView:
    """The index of one graph; names not found here are looked up in the graph around it.

    Attributes:
        scope: The graph and the way to it.
        nodes: Its nodes in order.
        parent: The view of the graph around it, or None for the main graph.
        producers: Tensor -> index of the node that makes it.
        consumers: Tensor -> indices of the nodes that read it, also from their bodies.
        constants: Tensor -> its value, for initializers and Constant nodes.
        weights: Tensor -> how it is read, for constants and what is made of them alone.
        inferred: Tensor -> its type as it is declared for an input, stored, or inferred.
        records: Tensor -> its type as the model records it.
        types: Tensor -> its type: what is inferred, and where nothing is the record.
        outputs: Names of the graph's outputs.
        live: Tensors whose values can reach an output of the model.
        repeated: Tensors that several nodes make, which no runtime takes.
    """

    scope: Scope
    nodes: list[onnx.NodeProto]
    parent: GraphView | None
    producers: dict[str, int] = field(default_factory=dict)
    consumers: dict[str, list[int]] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    inferred: dict[str, TensorType] = field(default_factory=dict)
    records: dict[str, TensorType] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    live: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)

    def type_of(self, tensor: str) -> TensorType:
        """The type of a tensor that can be read here."""
        view: GraphView | None = self
        while view is not None:
            known = view.types.get(tensor)
            if known is not None:
                return known
            if tensor in view.producers:
                return UNKNOWN
            view = view.parent
        return UNKNOWN

    def size(self, tensor: str, axis: int) -> int | None:
        """The size of an axis, where it is inferred to be a number; records do not count."""
        home = self.home(tensor)
        shape = (home.inferred[tensor].shape or ()) if home and tensor in home.inferred else ()
        size = shape[axis] if -len(shape) <= axis < len(shape) else None
        return size if isinstance(size, int) else None

    def constant(self, tensor: str) -> onnx.TensorProto | None:
        """The stored value of a tensor that can be read here, if it has one."""
        view = self.home(tensor)
        return view.constants.get(tensor) if view else None

    def weight(self, tensor: str) -> Weight | None:
        """The constant that a tensor readable here is, through Cast, Transpose, ..."""
        view = self.home(tensor)
        return view.weights.get(tensor) if view else None

    def home(self, tensor: str) -> GraphView | None:
        """The view of the graph that declares or produces a tensor readable here."""
        view: GraphView | None = self
        while view is not None:
            if tensor in view.producers or tensor in view.constants or tensor in view.inferred:
                return view
            view = view.parent
        return None

    def producer(self, tensor: str) -> tuple[GraphView, onnx.NodeProto] | None:
        """The node that makes a tensor readable here, and the graph it is in."""
        view = self.home(tensor)
        if view is None or tensor not in view.producers:
            return None
        return view, view.nodes[view.producers[tensor]]

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes of this graph that read a tensor, in order."""
        return [self.nodes[i] for i in self.consumers.get(tensor, ())]


@dataclass(frozen=True, slots=True, eq=False)
class ModelIndex:
    """The views of all graphs of a model, the main graph first.

    Attributes:
        model: The model that is indexed.
        views: One view per graph, by path.
        plain: Whether ONNX alone infers the same types from the model as it is.
    """

    model: Model
    views: dict[str, GraphView]
    plain: bool = True

    @property
    def main(self) -> GraphView:
        """The view of the main graph."""
        return self.views["main"]

    def stale_records(self) -> dict[str, tuple[TensorType, TensorType]]:
        """The tensors that the model records otherwise than inferred: record, inferred."""
        inputs = self.main.scope.graph.input
        symbols = {dim for value in inputs for dim in read_type(value).shape or ()}
        return {
            f"{path}:{name}": (record, view.inferred[name])
            for path, view in self.views.items()
            for name, record in view.records.items()
            if name in view.inferred and name not in view.constants
            if _contradict(record, view.inferred[name], symbols)
        }

    def names(self) -> set[str]:
        """Every tensor name used anywhere, functions left out; not all need be text."""
        found: set[str] = set()
        for view in self.views.values():
            found.update(view.producers, view.constants, view.types, view.consumers)
        return found


def index_model(model: Model) -> ModelIndex:
    """Index a model; types are inferred, and what it records counts where nothing is.

    Inference runs on the graph without weights, so its cost does not grow with them.

    Raises:
        ModelFileError: If its functions call each other without end.
    """
    require_finite(model)
    views: dict[str, GraphView] = {}
    for scope in walk.scopes(model.proto.graph):
        parent = views[scope.parent.path] if scope.parent else None
        views[scope.path] = _view(scope, parent)
    inferred = infer(model.proto, lambda path, name: views[path].weight(name))
    for path, view in views.items():
        _note_types(view, inferred.values.get(path, ()))
    _mark_live(views)
    return ModelIndex(model, views, inferred.plain)


def _view(scope: Scope, parent: GraphView | None) -> GraphView:
    graph = scope.graph
    view = GraphView(scope, list(graph.node), parent)
    view.outputs = frozenset(value.name for value in graph.output)
    for tensor in graph.initializer:
        view.constants[tensor.name] = tensor
    for index, node in enumerate(view.nodes):
        for name in map(_one_copy, node.output):
            if name and view.producers.setdefault(name, index) != index:
                view.repeated.add(name)
                view.producers[name] = index
        read = node.input
        if walk.has_bodies(node):
            read = [*read, *walk.captured(node)]
        for name in map(_one_copy, read):
            if name:
                view.consumers.setdefault(name, []).append(index)
        value = constant_of(node)
        if value is not None:
            view.constants.update((name, value) for name in node.output[:1])
    view.inferred.update((value.name, read_type(value)) for value in graph.input)
    for name, value in view.constants.items():
        known = TensorType(value.data_type, tuple(value.dims))
        view.inferred[name] = _merged(view.inferred.get(name, UNKNOWN), known)
        view.weights[name] = stored(value)
    for node in view.nodes:
        made = derived(node, view.weight)
        if made is not None and len(made.dims) > MOST_AXES:
            continue  # a shape for each node that keeps it could fill the memory
        if made is not None:
            view.weights.update((name, made) for name in node.output[:1])
    return view


def _one_copy(name: str) -> str:
    """The one copy of a name: protobuf makes a new text whenever one is read.

    A large graph has each name in many places.
    """
    return sys.intern(name) if isinstance(name, str) else name


def _note_types(view: GraphView, inferred: Iterable[onnx.ValueInfoProto]) -> None:
    """Note the types of a graph's tensors; a body may record captured ones too."""
    graph = view.scope.graph
    alike: dict[TensorType, TensorType] = {}  # many tensors have the same type
    for noted, values in (
        (view.inferred, inferred),
        (view.records, chain(graph.value_info, graph.output)),
    ):
        for value in values:
            name = _one_copy(value.name)
            if name in view.producers or name in view.constants:
                found = read_type(value)
                if name in noted:
                    found = _merged(noted[name], found)
                noted[name] = alike.setdefault(found, found)
    view.types.update(view.inferred)
    for name, record in view.records.items():
        known = view.inferred.get(name, UNKNOWN)
        view.types[name] = TensorType(
            known.elem_type or record.elem_type,
            record.shape if known.shape is None else known.shape,
        )


def _contradict(record: TensorType, known: TensorType, symbols: Container[object]) -> bool:
    """Whether a record cannot be true for all inputs that the model declares."""
    if record.elem_type and known.elem_type and record.elem_type != known.elem_type:
        return True
    if record.shape is None or known.shape is None:
        return False
    return len(record.shape) != len(known.shape) or any(
        isinstance(a, int) and a != b and (isinstance(b, int) or b in symbols)
        for a, b in zip(record.shape, known.shape, strict=True)
        if b is not None
    )


def _merged(first: TensorType, second: TensorType) -> TensorType:
    """What two records of a tensor tell together; the first is believed."""
    elem_type = first.elem_type or second.elem_type
    if first.shape is None or second.shape is None:
        return TensorType(elem_type, second.shape if first.shape is None else first.shape)
    if len(first.shape) != len(second.shape):
        return TensorType(elem_type, first.shape)
    pairs = zip(first.shape, second.shape, strict=True)
    shape = (next((d for d in (a, b) if isinstance(d, int)), a or b) for a, b in pairs)
    return TensorType(elem_type, tuple(shape))


def _mark_live(views: dict[str, GraphView]) -> None:
    """Find the tensors whose values can reach an output of the model."""
    waiting = deque((views["main"], name) for name in views["main"].outputs)
    children: dict[tuple[int, int], list[GraphView]] = {}
    for view in views.values():
        if view.parent is not None:
            children.setdefault((id(view.parent), view.scope.owner), []).append(view)
    seen = {path: bytearray(len(view.nodes)) for path, view in views.items()}
    while waiting:
        view, tensor = waiting.popleft()
        home = view.home(tensor)
        if home is None or tensor in home.live:
            continue
        home.live.add(tensor)
        index = home.producers.get(tensor)
        if index is None or seen[home.scope.path][index]:
            continue
        seen[home.scope.path][index] = True
        node = home.nodes[index]
        if node.op_type in PARTLY_READ:
            # Of a graph's output all is read, whoever else reads it.
            whole = node.output[0] in home.outputs
            readers = [] if whole else home.readers(node.output[0])
            read = inputs_read(node, readers, home.size, home.constant)
        else:
            read = [name for name in node.input if name]
        waiting.extend((home, name) for name in read)
        for body in children.get((id(home), index), ()):
            waiting.extend((body, name) for name in body.outputs)
