"""Layers whose bias an optimiser moved into a later node.

A tensor between the two is the layer's product without its bias. For example, in
`h = MatMul(x, w)`, `y = SkipLayerNormalization(h, x, gamma, beta, bias)` the Linear's output
`h + bias` is nowhere in the graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_adapt.graph.index import GraphView, ModelIndex, text
from onnx_adapt.graph.layers import find_weight, is_layer
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.slot.manifest import slot_of
from onnx_adapt.slot.names import inner_name

BIAS_INPUTS = {
    **dict.fromkeys(("BiasGelu", "FastGelu", "BiasAdd", "BiasSplitGelu"), (1, 1)),
    **dict.fromkeys(("BiasDropout", "BiasSoftmax"), (1, 1)),
    "SkipLayerNormalization": (4, 2),
    "SkipSimplifiedLayerNormalization": (3, 2),
    "SkipGroupNorm": (4, 1),
    **dict.fromkeys(("MultiHeadAttention", "PackedMultiHeadAttention"), (3, 3)),
    "DecoderMaskedMultiHeadAttention": (10, 3),
}
"""Operators that add a bias to what they read: its input, and how many they add it to."""

_MOVING = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast"}
_RESCALING = {*_MOVING, "Mul", "DequantizeLinear"}
_MOST = 16
_SUMMANDS = 2
"""How many inputs a node adds up together with the bias; those of an attention have parts."""


@dataclass(frozen=True, slots=True)
class FusedBias:
    """A layer's bias that is added inside a node behind the layer's product.

    Attributes:
        tensor: What it is added to.
        bias: The tensor of the bias.
        node: The node that adds it.
        position: Which of the node's inputs it is.
        moved: Whether a Reshape or the like is between the product and the node.
        unsure: Whether it may be the bias of another layer, whose product the node adds too.
    """

    tensor: str
    bias: str
    node: onnx.NodeProto
    position: int
    moved: bool = False
    unsure: bool = False

    def __str__(self) -> str:
        """Why an adapter after the product is not one after the layer."""
        label = text(self.node.name) or text(self.node.output[0])
        adds = f"bias {self.bias!r}, which {label!r} ({self.node.op_type}) adds"
        if self.unsure:
            return f"nothing tells whether the {adds}, is its own or of the other layer there"
        return f"it is before its {adds}"


def bias_behind(
    index: ModelIndex, view: GraphView, tensor: str, width: int | None
) -> FusedBias | None:
    """Find a layer's bias, if that is added inside a node behind the layer's product.

    Args:
        index: The model's index.
        view: The graph that makes the tensor.
        tensor: What is behind the layer, or a product that is rescaled behind it.
        width: Its width.

    Returns:
        The bias; None if the tensor has its bias, or there is none.
    """
    if width is None or not _is_bare(view, tensor):
        return None
    product = tensor
    for _ in range(_MOST):
        readers = view.readers(tensor)
        if len(readers) != 1 or tensor in view.outputs:
            return None
        node = readers[0]
        position, sides = BIAS_INPUTS.get(node.op_type, (0, 0))
        if tensor in node.input[:sides] and position < len(node.input):
            side = list(node.input).index(tensor)
            name = str(node.input[position])
            if not _adds(index, view, name, side, width):
                return None
            other = node.input[1 - side] if sides == _SUMMANDS else ""
            unsure = bool(other) and _is_bare(view, other)
            return FusedBias(tensor, name, node, position, tensor != product, unsure)
        if node.op_type not in _MOVING or not node.output:
            return None
        tensor = node.output[0]
    return None


def unfused_hint(address: str) -> str:
    """What to do where a layer has no output of its own with its bias."""
    return (
        "insert into the model as it was exported and optimise the result; to adapt the "
        f"product before the bias, name the tensor: --after '{address}'"
    )


def _is_bare(view: GraphView, tensor: str) -> bool:
    """Whether a tensor is a layer's product, perhaps rescaled, without a bias."""
    for _ in range(_MOST):
        made = view.producer(tensor)
        if made is None:
            return False
        view, node = made
        if is_layer(view, node):
            operator = OPERATORS[node.op_type]
            return operator.bias_add and not operator.has_bias(node)
        if slot := slot_of(node):
            tensor = inner_name(slot)  # what the slot made of it is as bare
        elif node.op_type not in _RESCALING or not node.input:
            return False
        else:
            tensor = _rescaled(view, node)
    return False


def _rescaled(view: GraphView, node: onnx.NodeProto) -> str:
    """The input of a node that is no scale."""
    names = [str(name) for name in node.input]
    return next((name for name in names if not _is_scale(view, name)), names[0])


def _is_scale(view: GraphView, name: str) -> bool:
    if find_weight(view, name) is not None:
        return True
    made = view.producer(name)
    return made is not None and made[1].op_type in ("Mul", "DynamicQuantizeLinear")


def _adds(index: ModelIndex, view: GraphView, name: str, side: int, width: int) -> bool:
    """Whether a bias changes what it is added to; an optimiser writes zeros for none."""
    weight = find_weight(view, name) if name else None
    if weight is None:  # computed, or an input of the model
        shape = view.type_of(name).shape if name else None
        return shape is not None and len(shape) == 1 and shape[0] in (width, 3 * width)
    if math.prod(weight.dims) < width:
        return False
    if weight.tensor is not view.constant(name):
        return True
    values = np.ravel(read_tensor(index.model, weight.tensor))
    if values.size == width:
        return bool(np.any(values))
    # Those of queries, keys and values are one after the other.
    start = (0, width, values.size - width)[side]
    return bool(np.any(values[start : start + width]))
