"""Which nodes are layers, and the weight, width, element type and bias of each."""

from __future__ import annotations

import math
from collections import deque

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.graph.constants import Weight
from onnx_adapt.graph.einsum import linear_order
from onnx_adapt.graph.index import GraphView, TensorType, attribute, text
from onnx_adapt.graph.operators import CHANNELS, OPERATORS, WeightLayout
from onnx_adapt.slot.manifest import slot_of


def find_weight(view: GraphView, name: str) -> Weight | None:
    """The constant behind an input, also through DequantizeLinear, Transpose, Cast and Mul."""
    return view.weight(name) if name else None


def layer_weight(view: GraphView, node: onnx.NodeProto) -> Weight | None:
    """The constant weight of a node, if the node is a layer that has one."""
    operator = OPERATORS.get(node.op_type)
    if operator is None or operator.weight >= len(node.input):
        return None
    return find_weight(view, node.input[operator.weight])


def is_layer(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node is a layer: an operator of `OPERATORS` with its weight constant."""
    operator = OPERATORS.get(node.op_type)
    if operator is None or slot_of(node):
        return False
    if not operator.constant:
        return True
    weight = layer_weight(view, node)
    if weight is None or text(node.domain) == BLOCKED:
        return False
    if operator.layout is WeightLayout.TABLE:
        return _is_embedding(view, node, weight)
    if operator.layout is WeightLayout.BY_EQUATION:
        return linear_order(node) is not None
    return True


def is_module_call(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node can be the call of a module that a checkpoint adapts."""
    operator = OPERATORS.get(node.op_type)
    return operator is not None and operator.module_call and is_layer(view, node)


BLOCKED = "com.microsoft.nchwc"
"""ONNX Runtime's convolutions on blocks of channels; no axis of their tensors has channels."""


def _is_embedding(view: GraphView, node: onnx.NodeProto, weight: Weight) -> bool:
    by_row = attribute(node, "axis", 0) == 0 and len(weight.dims) >= 2
    found = len(node.input) > 1 and find_weight(view, node.input[1]) is None
    return by_row and found and holds_features(view, node, weight)


def holds_features(view: GraphView, node: onnx.NodeProto, table: Weight) -> bool:
    """Whether the rows that a node looks up are floats, or become floats right behind it."""
    after = [reader.op_type for name in node.output for reader in view.readers(name)]
    return table.elem_type in FLOATS or after == ["DequantizeLinear"]


def layer_sizes(view: GraphView, node: onnx.NodeProto) -> tuple[int | None, int | None]:
    """The widths that a layer reads and makes, as its weight or its attributes tell them."""
    weight = layer_weight(view, node)
    return OPERATORS[node.op_type].sizes(node, weight.dims if weight else ())


def weight_width(view: GraphView, node: onnx.NodeProto) -> int | None:
    """The width of a layer's output, as its weight or its attributes tell it."""
    return layer_sizes(view, node)[1]


def feature_width(
    view: GraphView, layer: onnx.NodeProto | None, tensor: str, axis: int
) -> int | None:
    """The width of a tensor: as inferred, else from its layer's weight, else as recorded.

    Args:
        view: The graph that makes the tensor.
        layer: The node with the weight, if the tensor is a layer's output.
        tensor: The tensor.
        axis: Its feature axis.
    """
    inferred = _size(view.inferred.get(tensor), axis)
    if inferred is None and layer is not None:
        inferred = weight_width(view, layer)
    return _size(view.records.get(tensor), axis) if inferred is None else inferred


def _size(known: TensorType | None, axis: int) -> int | None:
    shape = known.shape if known else None
    size = shape[axis] if shape and -len(shape) <= axis < len(shape) else None
    return size if isinstance(size, int) else None


_SAME_TYPE = {
    *("Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Softmax", "Gelu"),
    *("FastGelu", "BiasGelu", "QuickGelu", "Transpose", "Reshape", "Slice", "Concat", "Split"),
    *("Squeeze", "Unsqueeze", "Identity", "RotaryEmbedding", "GroupQueryAttention"),
    "MultiHeadAttention",
}
"""Operators without weights whose float output has the type of a float input."""


def _keeps_type(op: str) -> bool:
    operator = OPERATORS.get(op)
    return operator.keeps_type if operator else op in _SAME_TYPE


def inherited_type(view: GraphView, node: onnx.NodeProto) -> int:
    """The element type of a node's output where shape inference is silent, or 0."""
    made: tuple[GraphView, onnx.NodeProto] | None = (view, node)
    for _ in range(64):
        if made is None or not _keeps_type(made[1].op_type):
            return 0
        view, node = made
        for name in node.input:
            weight = find_weight(view, name)
            known = view.type_of(name).elem_type or (weight.elem_type if weight else 0)
            if known in FLOATS:
                return known
        made = view.producer(node.input[0]) if node.input else None
    return 0


_MOST_AXES = 64
"""More than any runtime takes; a damaged tensor can have millions."""


def bias_add(
    view: GraphView, node: onnx.NodeProto, tensor: str, width: int | None
) -> str | None:
    """The output of the Add that gives a layer its bias, or None.

    The Add must be the only reader of `tensor`, the layer's output, and its other operand
    a constant with one entry per feature. In a quantised model it can read what
    QuantizeLinear and DequantizeLinear make of the tensor.
    """
    operator = OPERATORS[node.op_type]
    if not operator.bias_add or operator.has_bias(node):
        return None
    tensor = _requantised(view, tensor)
    readers = view.readers(tensor)
    if len(readers) != 1 or tensor in view.outputs:
        return None
    add = readers[0]
    if add.op_type != "Add" or slot_of(add) or list(add.input).count(tensor) != 1:
        return None
    if len(add.input) != 2 or not add.output:
        return None  # no Add that a runtime takes
    other = find_weight(view, add.input[1 - list(add.input).index(tensor)])
    if other is None or width is None or len(other.dims) > _MOST_AXES:
        return None
    if math.prod(other.dims) != width:
        return None
    dims = other.dims
    if operator.axis == CHANNELS:
        weight = layer_weight(view, node)
        rank = len(weight.dims) if weight else 0
        dims = (1,) * (rank - len(dims)) + dims if len(dims) <= rank else ()
    fits = -len(dims) <= operator.axis < len(dims) and dims[operator.axis] == width
    return add.output[0] if fits else None


def _requantised(view: GraphView, tensor: str) -> str:
    """The tensor after it was quantised and dequantised; itself if nothing does only that."""
    shown = tensor
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        readers = view.readers(shown)
        if len(readers) != 1 or readers[0].op_type != op_type or shown in view.outputs:
            return tensor
        if readers[0].input[0] != shown or not readers[0].output:
            return tensor
        shown = str(readers[0].output[0])
    return shown


_RESCALING = ("Cast", "DequantizeLinear", "Mul", "Reshape", "Transpose", "Identity")


def float_downstream(view: GraphView, tensor: str) -> str | None:
    """The float tensor an integer tensor is rescaled to: the place an adapter belongs."""
    waiting = deque([tensor])
    for _ in range(16):
        if not waiting:
            return None
        integer = waiting.popleft()
        for reader in view.readers(integer):
            outputs = list(reader.output) if reader.op_type in _RESCALING else []
            floats = [name for name in outputs if view.type_of(name).elem_type in FLOATS]
            if floats:
                after = view.readers(floats[0])
                scaled = len(after) == 1 and after[0].op_type == "Mul" and after[0].output
                return str(after[0].output[0] if scaled else floats[0])
            waiting.extend(outputs)
    return None
