"""Constants of a graph: those stored, and those behind operators such as Cast or Transpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_adapt.slot.manifest import slot_of
from onnx_adapt.slot.names import changed_weight, node_name


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant as its reader sees it.

    Attributes:
        tensor: The stored tensor, before any DequantizeLinear, Transpose or Cast; of two
            that are multiplied the larger.
        dims: Its shape at the reader.
        elem_type: Its element type at the reader.
    """

    tensor: onnx.TensorProto
    dims: tuple[int, ...]
    elem_type: int


_NUMBERS = {
    "value_float": (onnx.TensorProto.FLOAT, onnx.AttributeProto.FLOAT),
    "value_floats": (onnx.TensorProto.FLOAT, onnx.AttributeProto.FLOATS),
    "value_int": (onnx.TensorProto.INT64, onnx.AttributeProto.INT),
    "value_ints": (onnx.TensorProto.INT64, onnx.AttributeProto.INTS),
}
"""The attributes of a Constant that are numbers: element type, and type of the attribute."""


def constant_of(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node; None for other nodes, strings and sparse tensors."""
    if node.op_type != "Constant":
        return None
    for item in node.attribute:
        if item.name == "value" and item.HasField("t"):
            value: onnx.TensorProto = item.t
            return value
        elem_type, kind = _NUMBERS.get(item.name, (0, None))
        if item.type == kind:
            value = onnx.helper.get_attribute_value(item)
            dims = [len(value)] if item.name.endswith("s") else []
            values = value if dims else [value]
            return onnx.helper.make_tensor("", elem_type, dims, values)
    return None


def stored(tensor: onnx.TensorProto) -> Weight:
    """A stored tensor read as it is."""
    return Weight(tensor, tuple(tensor.dims), tensor.data_type)


_KEEPERS = {"Identity", "Cast", "Transpose", "Reshape", "DequantizeLinear", "Mul"}
"""Operators that weights are kept behind: exporters and quantisers put them there."""


def derived(node: onnx.NodeProto, find: Callable[[str], Weight | None]) -> Weight | None:
    """What a node makes of constants, if it is one that weights are kept behind.

    What a slot on a weight makes counts as the base's weight.

    Args:
        node: The node.
        find: Gives the constant that can be read by a name, or None.
    """
    if slot := slot_of(node):  # `Add(weight, product)`, or `Add(scaled, product)`
        own = {changed_weight(slot), node_name(slot, "scaled")}
        return None if own.isdisjoint(node.output) else find(node.input[0])
    if node.op_type not in _KEEPERS or not node.input:
        return None
    weight, *others = (find(name) for name in node.input)
    other = others[0] if others else None
    if weight is None or node.op_type == "Identity":
        return weight
    if node.op_type == "Transpose":
        return _transposed(weight, node)
    if node.op_type == "Reshape":
        return _reshaped(weight, other) if other else None
    if node.op_type == "Mul":
        return _multiplied(weight, other) if other else None
    if node.op_type == "Cast":
        types = [item.i for item in node.attribute if item.name == "to"]
        return replace(weight, elem_type=types[0] if types else 0)
    return replace(weight, elem_type=other.elem_type if other else 0)


def _transposed(weight: Weight, node: onnx.NodeProto) -> Weight | None:
    axes = list(range(len(weight.dims)))
    orders = [list(item.ints) for item in node.attribute if item.name == "perm"]
    order = orders[0] if orders else axes[::-1]
    if sorted(order) != axes:
        return None
    return replace(weight, dims=tuple(weight.dims[axis] for axis in order))


def _reshaped(weight: Weight, shape: Weight) -> Weight | None:
    if math.prod(shape.dims) > _MOST_AXES or shape.tensor.data_location:
        return None
    sizes = [int(size) for size in onnx.numpy_helper.to_array(shape.tensor).ravel()]
    if 0 in sizes:
        return None  # a size of the weight, or none: nobody stores a weight so
    count, rest = math.prod(weight.dims), math.prod(size for size in sizes if size > 0)
    dims = tuple(count // max(rest, 1) if size < 0 else size for size in sizes)
    return replace(weight, dims=dims) if math.prod(dims) == count else None


_MOST_AXES = 64
"""More than any runtime takes; a damaged tensor can have millions."""


def _multiplied(weight: Weight, other: Weight) -> Weight | None:
    try:
        dims = np.broadcast_shapes(weight.dims, other.dims)
    except ValueError:
        return None
    larger = max(weight, other, key=lambda item: math.prod(item.dims))
    return replace(larger, dims=tuple(dims))
