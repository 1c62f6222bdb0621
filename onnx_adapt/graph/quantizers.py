"""The QuantizeLinear nodes with a calibrated range that an adapter's values run into.

Such a node rounds a float tensor to integers and saturates what is outside a constant
range. The range was measured on the base; an adapter can drive values out of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnx_adapt.dtypes import Array
from onnx_adapt.graph.index import GraphView, ModelIndex, attribute, text
from onnx_adapt.graph.layers import is_layer
from onnx_adapt.model import walk
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.slot.manifest import Slot, read_manifest, slot_of

_KINDS = onnx.TensorProto
_LIMITS: dict[int, tuple[int, int]] = {
    _KINDS.UINT8: (0, 255),
    _KINDS.INT8: (-128, 127),
    _KINDS.UINT16: (0, 65535),
    _KINDS.INT16: (-32768, 32767),
    _KINDS.UINT4: (0, 15),
    _KINDS.INT4: (-8, 7),
}
"""The least and the largest integer of each type that values are rounded to."""

_REARRANGE = {
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"),
    *("Slice", "Gather", "Split", "MaxPool", "DepthToSpace", "SpaceToDepth"),
}
"""Operators that give integers of their first input on, so that the range is still theirs."""


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A QuantizeLinear with a constant range behind a slot or a replaceable weight.

    Attributes:
        graph: Path of its graph.
        node: Its place among the graph's nodes.
        name: What to call it: its name, or that of its output.
        tensor: The float tensor that it rounds.
        output: Its output.
        elem_type: Element type of the integers.
        scale: Its scale, `()` or `(channels,)`.
        zero: Its zero point, of the same shape.
        has_zero: Whether the zero point is an input; else it is 0.
        axis: The axis of the channels.
        slots: The slots and replaceable weights behind which it is, with no other slot
            between.
        direct: Those of them with no other layer and no other quantizer between either.
        partners: The DequantizeLinear nodes that turn its integers back: path and place.
        refused: Why its range cannot be changed, or ''.
    """

    graph: str
    node: int
    name: str
    tensor: str
    output: str
    elem_type: int
    scale: Array
    zero: Array
    has_zero: bool
    axis: int
    slots: tuple[str, ...]
    direct: tuple[str, ...]
    partners: tuple[tuple[str, int], ...] = ()
    refused: str = ""

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer."""
        return _LIMITS[self.elem_type]

    @property
    def range(self) -> tuple[Array, Array]:
        """The least and the largest value that it can hold, `()` or `(channels,)`."""
        lowest, highest = self.limits
        zero = self.zero.astype(np.float64)
        scale = self.scale.astype(np.float64)
        return (lowest - zero) * scale, (highest - zero) * scale

    def along(self, values: Array, rank: int) -> Array:
        """Values for the channels in the shape in which they broadcast with the tensor."""
        if values.ndim == 0 or values.size == 1:
            return values.reshape(())
        shape = [1] * rank
        shape[self.axis] = values.size
        return values.reshape(shape)


@dataclass(slots=True)
class _Reached:
    slots: list[str] = field(default_factory=list)
    direct: list[str] = field(default_factory=list)


def has_quantizers(proto: onnx.ModelProto) -> bool:
    """Whether any node of a model's graphs rounds floats to integers; this needs no index."""
    return any(
        node.op_type == "QuantizeLinear"
        for scope in walk.scopes(proto.graph)
        for node in scope.graph.node
    )


def quantizers_behind(index: ModelIndex, slots: Iterable[Slot]) -> tuple[Quantizer, ...]:
    """The quantizers with a constant range that an adapter's values run into.

    They are behind the slots, and behind the weights that adapters may replace. A range that
    is computed in the graph (dynamic quantisation) follows the values, and is not listed.

    Raises:
        ModelFileError: If a scale cannot be read.
    """
    known = {
        (view.scope.path, number)
        for view in index.views.values()
        for number, node in enumerate(view.nodes)
        if node.op_type == "QuantizeLinear" and _is_calibrated(view, node)
    }
    if not known:
        return ()
    reached = {place: _Reached() for place in sorted(known)}
    for name, starts in _sources(index, slots):
        for place in _reach(index, starts, through_layers=True) & known:
            reached[place].slots.append(name)
        for place in _reach(index, starts, through_layers=False) & known:
            reached[place].direct.append(name)
    return tuple(
        _describe(index, place, found) for place, found in reached.items() if found.slots
    )


def _is_calibrated(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether scale and zero point are constants of a type whose limits are known."""
    names = [name for name in node.input[1:3] if name]
    constants = [view.constant(name) for name in names]
    whole = len(names) > 0 and all(value is not None for value in constants)
    return whole and not attribute(node, "block_size", 0) and _elem_type(view, node) in _LIMITS


def _elem_type(view: GraphView, node: onnx.NodeProto) -> int:
    zero = view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    stated = attribute(node, "output_dtype", 0) or _KINDS.UINT8
    return int(zero.data_type if zero is not None else stated)


_Tensors = set[tuple[str, str]]
"""Tensors by the path of their graph and their name."""


def _sources(index: ModelIndex, slots: Iterable[Slot]) -> Iterator[tuple[str, _Tensors]]:
    """What adapters change: slots and replaceable weights, and the tensors that have it."""
    for slot in slots:
        yield slot.name, {(slot.graph, slot.output)}
    manifest = read_manifest(index.model.proto)
    for weight in manifest.weights if manifest else ():
        yield weight.name, _made_with(index, weight.name)


def _made_with(index: ModelIndex, weight: str) -> _Tensors:
    """The activations that a weight of the base is the first to change.

    In `t = Transpose(w)`, `h = MatMul(x, t)` that is `h`: `t` is made of constants alone.
    """
    found: _Tensors = set()
    for path, view in index.views.items():
        waiting = [weight]
        for tensor in waiting:
            for number in view.consumers.get(tensor, ()):
                node = view.nodes[number]
                others = (text(name) for name in node.input if name and name not in waiting)
                constant = all(view.constant(name) is not None for name in others)
                made = [text(name) for name in node.output if name]
                if constant:
                    waiting += [name for name in made if name not in waiting]
                else:
                    found |= {(path, name) for name in made}
    return found


def _reach(
    index: ModelIndex, starts: _Tensors, *, through_layers: bool
) -> set[tuple[str, int]]:
    """The nodes that read what some tensors become, up to other slots.

    Without `through_layers` the way ends behind each layer and each quantizer as well.
    """
    bodies = _bodies(index)
    waiting = deque((index.views[path], tensor) for path, tensor in starts)
    seen = set(starts)
    nodes: set[tuple[str, int]] = set()

    def go(view: GraphView, names: Iterable[str]) -> None:
        for name in names:
            if name and (view.scope.path, name) not in seen:
                seen.add((view.scope.path, name))
                waiting.append((view, name))

    while waiting:
        view, tensor = waiting.popleft()
        for number in view.consumers.get(tensor, ()):
            node, place = view.nodes[number], (view.scope.path, number)
            if slot_of(node):
                continue
            nodes.add(place)
            ends = is_layer(view, node) or node.op_type == "QuantizeLinear"
            if ends and not through_layers:
                continue
            go(view, node.output)
            for body in bodies.get(place, ()):
                # Which input of a body it becomes is left open: all, to miss none.
                go(body, (tensor, *(value.name for value in body.scope.graph.input)))
        if tensor in view.outputs and view.parent is not None:
            owner = view.parent.nodes[view.scope.owner]
            go(view.parent, owner.output)
    return nodes


def _bodies(index: ModelIndex) -> dict[tuple[str, int], list[GraphView]]:
    found: dict[tuple[str, int], list[GraphView]] = {}
    for view in index.views.values():
        if view.parent is not None:
            place = (view.parent.scope.path, view.scope.owner)
            found.setdefault(place, []).append(view)
    return found


def _describe(index: ModelIndex, place: tuple[str, int], found: _Reached) -> Quantizer:
    path, number = place
    view = index.views[path]
    node = view.nodes[number]
    scale = _value(index, view, node.input[1])
    has_zero = len(node.input) > 2 and bool(node.input[2])
    zero = _value(index, view, node.input[2]) if has_zero else np.zeros(scale.shape, np.int64)
    partners, refused = _partners(index, view, node)
    if any(isinstance(name, bytes) for name in node.input):
        refused = "the names of its constants are not UTF-8, which no record can hold"
    return Quantizer(
        path,
        number,
        text(node.name) or text(node.output[0]),
        text(node.input[0]),
        text(node.output[0]),
        _elem_type(view, node),
        scale,
        zero,
        has_zero,
        attribute(node, "axis", 1),
        tuple(found.slots),
        tuple(found.direct),
        partners,
        refused,
    )


def _value(index: ModelIndex, view: GraphView, name: str) -> Array:
    tensor = view.constant(name)
    assert tensor is not None
    return np.asarray(read_tensor(index.model, tensor))


def _partners(
    index: ModelIndex, view: GraphView, node: onnx.NodeProto
) -> tuple[tuple[tuple[str, int], ...], str]:
    """Who turns the integers back into floats, and why that cannot be followed, or ''."""
    found, waiting = set(), [text(node.output[0])]
    shared = _range_of(index, view, node)
    for tensor in waiting:
        if tensor in view.outputs:
            return (), f"its integers are the output {tensor!r}"
        for number in view.consumers.get(tensor, ()):
            reader = view.nodes[number]
            back = reader.op_type == "DequantizeLinear"
            if back and _range_of(index, view, reader) == shared:
                found.add((view.scope.path, number))
            elif reader.op_type in _REARRANGE and reader.input[0] == tensor:
                waiting += [text(name) for name in reader.output if name not in waiting]
            else:
                label = text(reader.name) or text(reader.output[0])
                return (), f"node {label!r} ({reader.op_type}) reads its integers"
    return tuple(sorted(found)), ""


def _range_of(index: ModelIndex, view: GraphView, node: onnx.NodeProto) -> list[bytes | None]:
    """Scale and zero point of a node, comparable; None for what is no constant."""
    names = [*node.input[1:3], ""][:2]
    return [
        _value(index, view, name).tobytes() if name and view.constant(name) else None
        for name in names
    ]
