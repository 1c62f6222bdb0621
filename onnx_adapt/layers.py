"""Which nodes are layers: where their constant weight is, and what width it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from onnx_adapt.graph import FLOATS, GraphView, attribute, slot_of

LAST, CHANNELS = -1, 1


@dataclass(frozen=True, slots=True)
class Kind:
    """How one operator is a layer.

    Attributes:
        weight: Input that must be constant, or -1 if the operator alone tells.
        axis: Feature axis of the output.
        width: How the width is read: `last` or `first` axis of the weight (`gemm`: by
            transB; `deconv`: second axis times group), an attribute's name, or ''.
        bias: Input that may hold the bias inside the operator, or -1.
        fold: Whether a following Add of a constant is this layer's bias.
    """

    weight: int
    axis: int = LAST
    width: str = "last"
    bias: int = -1
    fold: bool = False


_MATMUL = Kind(1, fold=True)
_GEMM = Kind(1, width="gemm", bias=2, fold=True)
_CONV = Kind(1, CHANNELS, "first", bias=2, fold=True)
_NORM = Kind(-1)
_CHANNEL_NORM = Kind(1, CHANNELS)
_RECURRENT = Kind(-1, width="hidden_size")

KINDS: dict[str, Kind] = {
    "MatMul": _MATMUL,
    "FusedMatMul": Kind(1, width="gemm", fold=True),
    "MatMulInteger": _MATMUL,
    "MatMulIntegerToFloat": Kind(1, bias=6, fold=True),
    "DynamicQuantizeMatMul": Kind(1, bias=4, fold=True),
    "MatMulNBits": Kind(1, width="N", bias=5, fold=True),
    "MatMulBnb4": Kind(1, width="N", fold=True),
    "QLinearMatMul": Kind(3),
    "Gemm": _GEMM,
    "FusedGemm": _GEMM,
    "GemmFloat8": _GEMM,
    "QGemm": Kind(3, width="gemm"),
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
_TRANSPARENT = {"DequantizeLinear", "Identity", "Cast", "Transpose", "Mul"}


@dataclass(frozen=True, slots=True)
class Weight:
    """A layer's constant weight as the layer sees it.

    Attributes:
        tensor: The stored tensor, before any DequantizeLinear, Transpose or Cast.
        dims: Its shape at the layer.
        elem_type: Its element type at the layer.
    """

    tensor: onnx.TensorProto
    dims: tuple[int, ...]
    elem_type: int


def find_weight(view: GraphView, name: str) -> Weight | None:
    """Follow a layer's input back to the tensor it is stored as.

    Looks through DequantizeLinear, Identity, Cast, Transpose and Mul by a constant.
    """
    if not name:
        return None
    tensor = view.constant(name)
    if tensor is not None:
        return Weight(tensor, tuple(tensor.dims), tensor.data_type)
    made = view.producer(name)
    if made is None or made[1].op_type not in _TRANSPARENT or slot_of(made[1]):
        return None
    home, node = made
    inner = find_weight(home, node.input[0])
    if inner is None:
        return None
    if node.op_type == "Mul":
        other = find_weight(home, node.input[1])
        if other is None:
            return None
        return max(inner, other, key=lambda weight: len(weight.dims))
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        order = order or list(range(len(inner.dims)))[::-1]
        if sorted(order) != list(range(len(inner.dims))):
            return None
        return Weight(inner.tensor, tuple(inner.dims[i] for i in order), inner.elem_type)
    if node.op_type == "Cast":
        return Weight(inner.tensor, inner.dims, attribute(node, "to", inner.elem_type))
    if node.op_type == "DequantizeLinear" and len(node.input) > 1:
        scale = find_weight(home, node.input[1])
        return Weight(inner.tensor, inner.dims, scale.elem_type if scale else 0)
    return inner


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
    return by_row and floats and find_weight(view, node.input[1]) is None


def weight_width(view: GraphView, node: onnx.NodeProto) -> int | None:
    """The width of a layer's output as its constant weight tells it."""
    kind = KINDS[node.op_type]
    if kind.width not in ("last", "first", "gemm", "deconv"):
        return attribute(node, kind.width, 0) or None if kind.width else None
    weight = layer_weight(view, node)
    if weight is None or not weight.dims:
        return None
    if kind.width == "first":
        return weight.dims[0]
    if kind.width == "gemm":
        transposed = attribute(node, "transB", 0) and len(weight.dims) >= 2
        return weight.dims[-2] if transposed else weight.dims[-1]
    if kind.width == "deconv":
        return weight.dims[1] * attribute(node, "group", 1) if len(weight.dims) > 1 else None
    return weight.dims[-1]


def layer_elem_type(view: GraphView, node: onnx.NodeProto) -> int:
    """The element type of a layer's output where shape inference is silent, or 0."""
    scales = {"MatMulNBits": 2, "MatMulBnb4": 2, "GatherBlockQuantized": 2}
    position = scales.get(node.op_type)
    if position is not None and position < len(node.input):
        scale = find_weight(view, node.input[position])
        return scale.elem_type if scale else 0
    weight = layer_weight(view, node)
    return weight.elem_type if weight and weight.elem_type in FLOATS else 0


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
    other = find_weight(view, add.input[1 - list(add.input).index(tensor)])
    if other is None or width is None or math.prod(other.dims) != width:
        return None
    fits = width in other.dims if kind.axis == CHANNELS else other.dims[-1:] == (width,)
    return add.output[0] if fits else None


def float_downstream(view: GraphView, tensor: str) -> str | None:
    """The float tensor an integer tensor is rescaled to: the place an adapter belongs."""
    for _ in range(8):
        readers = view.readers(tensor)
        if not readers or not readers[0].output:
            return None
        tensor = readers[0].output[0]
        known = view.type_of(tensor).elem_type
        if known in FLOATS:
            after = view.readers(tensor)
            scaled = len(after) == 1 and after[0].op_type == "Mul"
            return after[0].output[0] if scaled else tensor
    return None
