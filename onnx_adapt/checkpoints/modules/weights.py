"""Read the weight of a layer as PyTorch has it, whatever the graph stores it as."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from onnx_adapt.dtypes import FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.bnb4 import BNB4_VALUES
from onnx_adapt.graph.index import GraphView, attribute
from onnx_adapt.graph.layer_calls import LayerCall, weight_scales
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.graph.operators import OPERATORS, WeightLayout
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.slot.manifest import slot_of


def read_weight(model: Model, view: GraphView, name: str) -> Array:
    """Read a constant of the graph as its reader sees it, in float64.

    Raises:
        CheckpointError: If it is not constant, or is computed by an unknown operator.
    """
    stored = view.constant(name)
    if stored is not None:
        return read_tensor(model, stored).astype(np.float64)
    made = view.producer(name)
    if made is None:
        raise CheckpointError(f"weight {name!r} is not constant")
    home, node = made
    if slot_of(node):  # on the weight: the base's own comes first, scaled or not
        return read_weight(model, home, node.input[0])
    inputs = [read_weight(model, home, item) for item in node.input if item]
    value = inputs[0]
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return np.transpose(value, order)
    if node.op_type == "Reshape":
        return value.reshape(find_weight(view, name).dims)  # type: ignore[union-attr]
    if node.op_type == "DequantizeLinear":
        axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        scale, *zero = (_along(item, value, axis, block) for item in inputs[1:])
        return np.asarray((value - (zero[0] if zero else 0)) * scale)
    if node.op_type == "Mul":
        return np.asarray(value * inputs[1])
    if node.op_type in ("Cast", "Identity"):
        return value
    raise CheckpointError(f"weight {name!r} is computed by {node.op_type}")


def _along(scale: Array, value: Array, axis: int, block: int) -> Array:
    """Lay a scale or zero point over the axis of a weight that it is for."""
    if scale.size == 1:
        return scale.reshape(())
    if block:
        whole = np.repeat(scale, block, axis)
        return np.take(whole, range(value.shape[axis]), axis)
    shape = [1] * value.ndim
    shape[axis] = scale.size
    return scale.reshape(shape)


def read_matrix(model: Model, call: LayerCall) -> Array:
    """Read a call's weight in PyTorch's layout: `(out, in)`, or Conv's own.

    Raises:
        CheckpointError: If it cannot be read.
    """
    decode = _DECODERS.get(OPERATORS[call.node.op_type].layout)
    if decode is not None:
        matrix = decode(model, call)
    else:
        value = _unscaled(model, call)
        matrix = value.T if call.stored_in_out else value
        if call.node.op_type == "Gemm":
            alpha = next((a.f for a in call.node.attribute if a.name == "alpha"), 1.0)
            matrix = matrix * alpha
    return matrix if call.span is None else matrix[slice(*call.span)]


def _unscaled(model: Model, call: LayerCall) -> Array:
    """Read a weight with its zero point and scale applied, if they are inputs of its node."""
    operator = OPERATORS[call.node.op_type]
    weight = find_weight(call.view, call.weight)
    value = read_weight(model, call.view, call.weight)
    # Exporters keep the axes in front of a matrix that is one of a stack of one.
    alone = math.prod(value.shape[:-2]) == 1
    if operator.axis == -1 and not operator.embeds and value.ndim > 2 and alone:
        value = value.reshape(value.shape[-2:])
    if weight is None or weight.elem_type in FLOATS:
        return value
    if operator.embeds:
        (after,) = call.view.readers(str(call.node.output[0]))
        scale, *zeros = (read_weight(model, call.view, name) for name in after.input[1:])
        return np.asarray((value - (zeros[0] if zeros else 0)) * scale)
    zero = _input(call, operator.weight_zero)
    scales = weight_scales(call)
    if len(scales) != 1:
        raise CheckpointError(
            f"the scale of the quantised weight {call.weight!r} was not found behind node "
            f"{call.label!r}",
            hint="insert the adapter into the model in float32 or float16",
        )
    shape = (-1, *(1,) * (value.ndim - 1)) if operator.convolves else (-1,)
    if zero:
        value = value - read_weight(model, call.view, zero).reshape(shape)
    return np.asarray(value * read_weight(model, call.view, scales[0]).reshape(shape))


def _input(call: LayerCall, position: int | None) -> str:
    return "".join(call.node.input[position : position + 1]) if position is not None else ""


def read_bias(model: Model, call: LayerCall) -> Array | None:
    """Read the bias inside a call's own node; None if it has none there.

    Raises:
        CheckpointError: If it is computed.
    """
    operator = OPERATORS[call.node.op_type]
    if operator.bias is None or not operator.has_bias(call.node):
        return None
    bias = call.node.input[operator.bias]
    if find_weight(call.view, bias) is None:
        raise CheckpointError(
            f"the bias {bias!r} of node {call.label!r} is computed, not stored",
            hint="fold the constants of the graph first (a simplifier does), or export with "
            "optimize=True",
        )
    return read_weight(model, call.view, bias)


# How MatMulNBits stores a matrix, by example: (out=2, in=64) in 4 bits and blocks of 32 is
# `(2, 2, 16)` bytes: each row has two blocks of 16 bytes, each byte two numbers, the lower one
# first. A number q of a block is worth (q - zero) * scale, with the block's scale and zero
# point. Where no zero point is stored it is 8. The last block of a row is padded.


def _read_blocks(model: Model, call: LayerCall) -> Array:
    """Read the weight of a MatMulNBits: `(out, in)`."""
    reads, makes = attribute(call.node, "K", 0), attribute(call.node, "N", 0)
    bits, block = attribute(call.node, "bits", 4), attribute(call.node, "block_size", 0)
    blocks = -(-reads // block)
    if _input(call, 4) or attribute(call.node, "weight_prepacked", 0):
        raise CheckpointError(
            f"the weight {call.weight!r} of node {call.label!r} is stored in an order of its "
            "own (g_idx or weight_prepacked), which is not read",
            hint="insert the adapter into the model in float32 or float16",
        )
    numbers = _unpacked(_stored(model, call, call.weight), bits).reshape(makes, blocks, -1)
    scales = read_weight(model, call.view, _input(call, 2)).reshape(makes, blocks, 1)
    zero: Array = np.array(1 << (bits - 1))
    if name := _input(call, 3):
        stored = _stored(model, call, name)
        if stored.dtype == np.uint8:
            stored = _unpacked(stored.reshape(makes, -1), bits)[:, :blocks]
        zero = stored.reshape(makes, blocks, 1).astype(np.float64)
    return np.asarray(((numbers - zero) * scales).reshape(makes, -1)[:, :reads])


def _unpacked(array: Array, bits: int) -> Array:
    """Take the numbers of a few bits out of bytes, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (array[..., None] >> shifts) & ((1 << bits) - 1)
    return numbers.reshape(*array.shape[:-1], -1).astype(np.float64)


def _read_bnb4(model: Model, call: LayerCall) -> Array:
    """Read the weight of a MatMulBnb4: `(out, in)`, in blocks that run over its rows."""
    shape = attribute(call.node, "N", 0), attribute(call.node, "K", 0)
    block, kind = attribute(call.node, "block_size", 0), attribute(call.node, "quant_type", 1)
    packed = _stored(model, call, call.weight)
    numbers = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: math.prod(shape)]
    scales = np.repeat(read_weight(model, call.view, _input(call, 2)).reshape(-1), block)
    return np.asarray(
        (np.array(BNB4_VALUES[kind])[numbers] * scales[: numbers.size]).reshape(shape)
    )


def _stored(model: Model, call: LayerCall, name: str) -> Array:
    tensor: onnx.TensorProto | None = call.view.constant(name)
    if tensor is None:
        raise CheckpointError(f"weight {name!r} is not constant")
    return read_tensor(model, tensor)


_DECODERS: dict[WeightLayout, Callable[[Model, LayerCall], Array]] = {
    WeightLayout.BLOCKS: _read_blocks,
    WeightLayout.BNB4: _read_bnb4,
}
"""How to read a weight that is not stored as an array of its own shape."""
