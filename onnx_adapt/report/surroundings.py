"""The part of a graph around a slot, before and after the slot was inserted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx

from onnx_adapt.graph.index import GraphView, TensorType, elem_name, text
from onnx_adapt.graph.layers import is_layer
from onnx_adapt.slot.manifest import Slot, slot_of

_READERS = 3
"""The number of readers of a tensor that are shown."""

BASE, NEW, OTHER = "base", "new", "other"
"""The origin of a node or tensor: the base, this slot, or another slot."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A weight that a node reads.

    Attributes:
        name: Name of the tensor.
        type: Element type and shape, such as `float32[64, r]`.
    """

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Box:
    """A node or a tensor.

    Attributes:
        kind: `node` or `tensor`.
        name: Its name in the model; may be empty for a node.
        label: The operator of a node, or the element type and shape of a tensor.
        origin: `base`, `new` or `other`.
        weights: The constants and adapter weights that a node reads.
    """

    kind: str
    name: str
    label: str
    origin: str
    weights: tuple[Constant, ...] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """A part of a graph.

    Attributes:
        boxes: Nodes and tensors.
        edges: Pairs of box numbers: an edge leads from the first to the second.
        hidden: How many more nodes read the last tensor.
    """

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]
    hidden: int


def surroundings_before(view: GraphView | None, slot: Slot) -> Surroundings | None:
    """The base's graph around a slot's site, or None if the base has no such tensor."""
    if view is None:
        return None
    if slot.tensor not in (view.consumers if slot.on_edge else view.producers):
        return None
    return _around(view, slot, _site(view, slot.tensor), slot.tensor)


def surroundings_after(view: GraphView, slot: Slot) -> Surroundings:
    """The adapted model's graph around a slot."""
    own = [node for node in view.nodes if slot_of(node) == slot.name]
    return _around(view, slot, _site(view, slot.inner) + own, slot.output)


def _site(view: GraphView, tensor: str) -> list[onnx.NodeProto]:
    """The node that produces a tensor.

    If that node is not a layer (it adds a bias, say), the producers of its inputs come first.
    """
    if tensor not in view.producers:
        return []
    node = view.nodes[view.producers[tensor]]
    read = [] if is_layer(view, node) or slot_of(node) else dict.fromkeys(node.input)
    producers = {view.producers[name] for name in read if name in view.producers}
    return [*(view.nodes[i] for i in sorted(producers)[:_READERS]), node]


def _makes_constant(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node produces a constant, which is shown in the boxes of its readers."""
    return any(view.weight(name) is not None for name in node.output)


def _around(
    view: GraphView, slot: Slot, inner: Sequence[onnx.NodeProto], last: str
) -> Surroundings:
    """The given nodes with their tensors, and the first readers of the last tensor."""
    readers = view.readers(last)
    sketch = _Sketch(view, slot)
    for node in (node for node in inner if not _makes_constant(view, node)):
        sketch.add(node, [name for name in node.input if name], list(node.output))
    for node in readers[:_READERS]:
        sketch.add(node, [last], [])
    return Surroundings(
        tuple(sketch.boxes), tuple(dict.fromkeys(sketch.edges)), len(readers[_READERS:])
    )


@dataclass(slots=True)
class _Sketch:
    """The boxes and edges collected so far.

    Attributes:
        view: The graph.
        slot: The slot that is drawn.
        boxes: Nodes and tensors.
        edges: Pairs of box numbers.
        tensors: The number of each tensor's box, by the tensor's name.
    """

    view: GraphView
    slot: Slot
    boxes: list[Box] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    tensors: dict[str, int] = field(default_factory=dict)

    def add(self, node: onnx.NodeProto, inputs: list[str], outputs: list[str]) -> None:
        """Add a node with edges from these inputs and to these outputs."""
        weights = [name for name in dict.fromkeys(inputs) if self._is_weight(name)]
        number = len(self.boxes)
        self.boxes.append(
            Box(
                "node",
                text(node.name),
                text(node.op_type),
                self._origin(node),
                tuple(Constant(name, self._type(name)) for name in weights),
            )
        )
        for name in inputs:
            if name not in weights:
                self.edges.append((self._tensor(name), number))
        for name in filter(None, outputs):
            self.edges.append((number, self._tensor(name)))

    def _is_weight(self, name: str) -> bool:
        return self.view.weight(name) is not None or name in self.slot.inputs

    def _tensor(self, name: str) -> int:
        """The number of a tensor's box, which is added if it is new."""
        if name not in self.tensors:
            producer = self.view.producers.get(name)
            origin = BASE if producer is None else self._origin(self.view.nodes[producer])
            self.tensors[name] = len(self.boxes)
            self.boxes.append(Box("tensor", text(name), self._type(name), origin))
        return self.tensors[name]

    def _origin(self, node: onnx.NodeProto) -> str:
        owner = slot_of(node)
        return NEW if owner == self.slot.name else OTHER if owner else BASE

    def _type(self, name: str) -> str:
        return type_text(self.view.type_of(name), self.slot, empty=name in self.slot.inputs)


def type_text(known: TensorType, slot: Slot, *, empty: bool = False) -> str:
    """Write an element type and shape: `float32[n, 64]`. The slot's bottleneck is written `r`.

    Args:
        known: The type of a tensor, as far as it is known.
        slot: The slot whose bottleneck is written `r`.
        empty: Whether the tensor is a weight whose bottleneck is 0 by default; that 0 is the
            slot's bottleneck too.
    """
    if known.shape is None:
        return elem_name(known.elem_type) or "?"
    free = {slot.symbol, 0} if empty else {slot.symbol}
    dims = ("r" if dim in free else "?" if dim is None else dim for dim in known.shape)
    return f"{elem_name(known.elem_type)}[{', '.join(map(str, dims))}]"
