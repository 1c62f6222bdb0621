"""Which nodes are layers: where their constant weight is, and what width it gives."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.graph.constants import Weight
from onnx_adapt.graph.index import GraphView, TensorType, attribute
from onnx_adapt.graph.liveness import VALUE_FREE
from onnx_adapt.slot.manifest import slot_of

LAST, CHANNELS = -1, 1


@dataclass(frozen=True, slots=True)
class Kind:
    """How one operator is a layer.

    Attributes:
        weight: Input that must be constant, or -1 if the operator alone tells.
        axis: Feature axis of the output.
        width: How the width is read: `last` or `first` axis of the weight, `columns` of a
            matrix (by transB), `deconv` (second axis times group), an attribute's name,
            or ''.
        bias: Input that may hold the bias inside the operator, or -1.
        fold: Whether a following Add of a constant is this layer's bias.
    """

    weight: int
    axis: int = LAST
    width: str = "columns"
    bias: int = -1
    fold: bool = False


_MATMUL = Kind(1, fold=True)
_GEMM = Kind(1, bias=2, fold=True)
_CONV = Kind(1, CHANNELS, "first", bias=2, fold=True)
_NORM = Kind(-1, width="last")
_CHANNEL_NORM = Kind(1, CHANNELS, "last")
_RECURRENT = Kind(-1, width="hidden_size")

KINDS: dict[str, Kind] = {
    "MatMul": _MATMUL,
    "FusedMatMul": _MATMUL,
    "MatMulInteger": _MATMUL,
    "MatMulIntegerToFloat": Kind(1, bias=6, fold=True),
    "DynamicQuantizeMatMul": Kind(1, bias=4, fold=True),
    "MatMulNBits": Kind(1, width="N", bias=5, fold=True),
    "MatMulBnb4": Kind(1, width="N", fold=True),
    "QLinearMatMul": Kind(3),
    "Gemm": _GEMM,
    "FusedGemm": _GEMM,
    "GemmFloat8": _GEMM,
    "QGemm": Kind(3),
    "Conv": _CONV,
    "FusedConv": _CONV,
    "ConvTranspose": Kind(1, CHANNELS, "deconv", bias=2, fold=True),
    "ConvInteger": Kind(1, CHANNELS, "first"),
    "QLinearConv": Kind(3, CHANNELS, "first"),
    "NhwcFusedConv": Kind(1, LAST, "first"),
    "LayerNormalization": _NORM,
    "RMSNormalization": _NORM,
    "SimplifiedLayerNormalization": _NORM,
    "SkipLayerNormalization": _NORM,
    "SkipSimplifiedLayerNormalization": _NORM,
    "EmbedLayerNormalization": _NORM,
    "BatchNormalization": _CHANNEL_NORM,
    "InstanceNormalization": _CHANNEL_NORM,
    "GroupNormalization": Kind(-1, CHANNELS, ""),
    "Gather": Kind(0),
    "GatherBlockQuantized": Kind(0, width=""),
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "DynamicQuantizeLSTM": _RECURRENT,
}
"""Operators that are layers, by type; the domain does not matter."""

_NORM_WEIGHT = {
    "SkipLayerNormalization": 2,
    "SkipSimplifiedLayerNormalization": 2,
    "EmbedLayerNormalization": 5,
}


def find_weight(view: GraphView, name: str) -> Weight | None:
    """The constant that an input is, through DequantizeLinear, Transpose, Cast, ..."""
    return view.weight(name) if name else None


def layer_weight(view: GraphView, node: onnx.NodeProto) -> Weight | None:
    """The constant weight of a node, if the node is a layer that has one."""
    kind = KINDS.get(node.op_type)
    if kind is None:
        return None
    position = kind.weight if kind.weight >= 0 else _NORM_WEIGHT.get(node.op_type, 1)
    return find_weight(view, node.input[position]) if position < len(node.input) else None


def is_layer(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node is a layer: an operator of `KINDS` with its weight constant."""
    kind = KINDS.get(node.op_type)
    if kind is None or slot_of(node):
        return False
    if kind.weight < 0:
        return True
    weight = layer_weight(view, node)
    if weight is None:
        return False
    if node.op_type == "Gather":
        return _is_embedding(view, node, weight)
    return True


def _is_embedding(view: GraphView, node: onnx.NodeProto, weight: Weight) -> bool:
    by_row = attribute(node, "axis", 0) == 0 and len(weight.dims) >= 2
    floats = weight.elem_type in FLOATS
    return (
        by_row and floats and len(node.input) > 1 and find_weight(view, node.input[1]) is None
    )


def weight_width(view: GraphView, node: onnx.NodeProto) -> int | None:
    """The width of a layer's output as its constant weight tells it."""
    kind = KINDS[node.op_type]
    if kind.width not in ("last", "first", "columns", "deconv"):
        return attribute(node, kind.width, 0) or None if kind.width else None
    weight = layer_weight(view, node)
    if weight is None or not weight.dims:
        return None
    if kind.width == "first":
        return weight.dims[0]
    if kind.width == "last":
        return weight.dims[-1]
    if len(weight.dims) < 2:
        return None
    if kind.width == "deconv":
        return weight.dims[1] * attribute(node, "group", 1)
    return weight.dims[-2 if attribute(node, "transB", 0) else -1]


def feature_width(
    view: GraphView, layer: onnx.NodeProto | None, tensor: str, axis: int
) -> int | None:
    """The width of a tensor: as inferred, or its layer's weight has it, or it is recorded.

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


_OTHER_TYPE = {
    *("QLinearMatMul", "QLinearConv", "QGemm", "MatMulInteger", "ConvInteger", "GemmFloat8"),
}
_SAME_TYPE = {
    *("Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Softmax", "Gelu"),
    *("FastGelu", "BiasGelu", "QuickGelu", "Transpose", "Reshape", "Slice", "Concat", "Split"),
    *("Squeeze", "Unsqueeze", "Identity", "RotaryEmbedding", "GroupQueryAttention"),
    *("MultiHeadAttention", *(KINDS.keys() - _OTHER_TYPE)),
}
"""Operators, contrib ones included, whose float output has the type of a float input."""


def inherited_type(view: GraphView, node: onnx.NodeProto) -> int:
    """The element type of a node's output where shape inference is silent, or 0."""
    made: tuple[GraphView, onnx.NodeProto] | None = (view, node)
    for _ in range(64):
        if made is None or made[1].op_type not in _SAME_TYPE:
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
    a constant with one entry per feature.
    """
    kind = KINDS[node.op_type]
    has_bias = 0 <= kind.bias < len(node.input) and bool(node.input[kind.bias])
    readers = view.readers(tensor)
    if not kind.fold or has_bias or len(readers) != 1 or tensor in view.outputs:
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
    if kind.axis == CHANNELS:
        weight = layer_weight(view, node)
        rank = len(weight.dims) if weight else 0
        dims = (1,) * (rank - len(dims)) + dims if len(dims) <= rank else ()
    fits = -len(dims) <= kind.axis < len(dims) and dims[kind.axis] == width
    return add.output[0] if fits else None


def float_downstream(view: GraphView, tensor: str) -> str | None:
    """The float tensor an integer tensor is rescaled to: the place an adapter belongs."""
    waiting = deque([tensor])
    for _ in range(16):
        if not waiting:
            return None
        integer = waiting.popleft()
        for reader in view.readers(integer):
            outputs = [] if reader.op_type in VALUE_FREE else list(reader.output)
            floats = [name for name in outputs if view.type_of(name).elem_type in FLOATS]
            if floats:
                after = view.readers(floats[0])
                scaled = len(after) == 1 and after[0].op_type == "Mul" and after[0].output
                return str(after[0].output[0] if scaled else floats[0])
            waiting.extend(outputs)
    return None
