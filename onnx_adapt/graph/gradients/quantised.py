"""Rules for quantised layers: rounding is passed straight through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.graph.bnb4 import BNB4_VALUES
from onnx_adapt.graph.gradients.convolutions import conv
from onnx_adapt.graph.gradients.products import gemm
from onnx_adapt.graph.gradients.rule import Grads, Rule, Step, only
from onnx_adapt.graph.gradients.tape import INT64, Tape

FLOAT = onnx.TensorProto.FLOAT

# Rounding has a derivative of zero nearly everywhere, so nothing behind it could train. The
# straight-through estimator (Bengio et al., 2013) takes it for 1: integers count as the
# numbers that were rounded. `q = x / scale + zero` gives `dx = dq / scale`, and
# `y = (q - zero) * scale` gives `dq = dy * scale`. Where a range was too narrow and q was cut
# off, x gets no gradient. Weights are constants, and are dequantised in the graph.


def _along(tape: Tape, step: Step, name: str) -> str:
    """A scale or zero point, laid over the axis of the tensor that it is for."""
    shape = tape.shape(name)
    if not shape or shape == (1,):
        return name
    if step.attribute("block_size", 0):
        raise step.refuse("it has a scale for each block")
    rank = tape.rank(step.input())
    axis = step.attribute("axis", 1) % rank
    return tape.add(
        "Reshape", name, tape.integers(*(-1 if k == axis else 1 for k in range(rank)))
    )


RANGES: dict[int, tuple[int, int]] = {
    onnx.TensorProto.INT8: (-128, 127),
    onnx.TensorProto.UINT8: (0, 255),
    onnx.TensorProto.INT16: (-32768, 32767),
    onnx.TensorProto.UINT16: (0, 65535),
}
"""The integers of each type; what rounds to others is cut off."""


def quantize(tape: Tape, step: Step) -> Grads:
    """QuantizeLinear: `dq / scale` where nothing was cut off."""
    x, scale, zero = (step.input(i) for i in range(3))
    kind = tape.elem_type(step.output)
    if kind not in RANGES:
        raise step.refuse("it makes another type than 8 or 16 bit")
    step_size = tape.cast(_along(tape, step, scale), tape.elem_type(x))
    place = tape.add("Div", x, step_size)
    if zero:
        place = tape.add("Add", place, tape.cast(_along(tape, step, zero), tape.elem_type(x)))
    low, high = RANGES[kind]
    inside = tape.add(
        "And",
        tape.compare("GreaterOrEqual", place, tape.number(low - 0.5, x)),
        tape.compare("LessOrEqual", place, tape.number(high + 0.5, x)),
    )
    return only(tape.kept_where(inside, tape.add("Div", step.grad, step_size)))


def dequantize(tape: Tape, step: Step) -> Grads:
    """DequantizeLinear: `dy * scale`."""
    return only(tape.add("Mul", step.grad, _along(tape, step, step.input(1))))


def dynamic_quantize(tape: Tape, step: Step) -> Grads:
    """DynamicQuantizeLinear, whose range is always wide enough: `dq / scale`."""
    return only(tape.add("Div", step.grad, str(step.node.output[1])))


def _centred(tape: Tape, name: str, zero: str, axis: int) -> str:
    """An integer weight as floats, without its zero point."""
    weight = tape.cast(name, FLOAT)
    if not zero:
        return weight
    offset = tape.cast(zero, FLOAT)
    if tape.shape(zero) not in ((), (1,)):
        sizes = [-1 if k == axis % tape.rank(name) else 1 for k in range(tape.rank(name))]
        offset = tape.add("Reshape", offset, tape.integers(*sizes))
    return tape.add("Sub", weight, offset)


def matmul_integer(tape: Tape, step: Step) -> Grads:
    """MatMulInteger with a constant weight: `dy @ (w - zero).T`."""
    weight = _centred(tape, step.input(1), step.input(3), -1)
    rank = tape.rank(step.input(1))
    if step.wants(1) or rank != 2:
        raise step.refuse("its second input is no constant matrix")
    return only(tape.add("MatMul", step.grad, tape.swapped(weight, rank)))


def conv_integer(tape: Tape, step: Step) -> Grads:
    """ConvInteger with a constant kernel."""
    weight = _centred(tape, step.input(1), step.input(3), 0)
    node = onnx.NodeProto()
    node.CopyFrom(step.node)
    return conv(tape, replace(step, node=node, wanted=(True, False)), weight=weight)


# MatMulNBits stores each row of the weight in blocks of a few bits; see
# `checkpoints/modules/weights.py`. Here the same is done by nodes, which ONNX Runtime computes
# once, when it loads the model.


def matmul_nbits(tape: Tape, step: Step) -> Grads:
    """MatMulNBits: `dy @ w` with the dequantised weight, `(out, in)`."""
    if step.input(4) or step.attribute("weight_prepacked", 0):
        raise step.refuse("its weight is stored in an order of its own")
    width, rows = step.attribute("K", 0), step.attribute("N", 0)
    bits, block = step.attribute("bits", 4), step.attribute("block_size", 32)
    kind = tape.elem_type(step.input(2))
    blocks = -(-width // block)
    numbers = tape.cast(_fields(tape, step.input(1), bits), kind)
    numbers = tape.add("Reshape", numbers, tape.integers(rows, blocks, -1))
    zero = tape.number(1 << (bits - 1), numbers)
    if name := step.input(3):
        zero = _zero_points(tape, name, bits, (rows, blocks), kind)
    scale = tape.add("Reshape", step.input(2), tape.integers(rows, blocks, 1))
    weight = tape.add("Mul", tape.add("Sub", numbers, zero), scale)
    flat = tape.add("Reshape", weight, tape.integers(rows, -1))
    cut = (tape.integers(0), tape.integers(width), tape.integers(1))
    matrix = tape.cast(tape.add("Slice", flat, *cut), tape.elem_type(step.grad))
    grads: list[str | None] = [tape.add("MatMul", step.grad, matrix), *[None] * 5]
    if step.wants(5):
        grads[5] = tape.unbroadcast(step.grad, step.input(5), step.output)
    return grads


def _zero_points(tape: Tape, name: str, bits: int, size: tuple[int, int], kind: int) -> str:
    """The zero points of the blocks, `(rows, blocks, 1)`; packed ones end in a whole byte."""
    rows, blocks = size
    if tape.elem_type(name) in FLOATS:
        return tape.cast(tape.add("Reshape", name, tape.integers(rows, blocks, 1)), kind)
    flat = tape.add("Reshape", name, tape.integers(rows, -1))
    fields = tape.add("Reshape", _fields(tape, flat, bits), tape.integers(rows, -1))
    cut = (tape.integers(0), tape.integers(blocks), tape.integers(1))
    kept = tape.add("Slice", fields, *cut)
    return tape.cast(tape.add("Reshape", kept, tape.integers(rows, blocks, 1)), kind)


def _fields(tape: Tape, name: str, bits: int, *, high_first: bool = False) -> str:
    """The numbers of a few bits in each byte, on a new last axis.

    A field is shifted to the left end of the byte, which cuts off what is above it, and back
    to the right end.
    """
    starts = list(range(0, 8, bits))
    fields = []
    for start in reversed(starts) if high_first else starts:
        left, right = (
            tape.constant(np.array(n, np.uint8)) for n in (8 - bits - start, 8 - bits)
        )
        top = tape.add("BitShift", name, left, direction="LEFT")
        field = tape.add("BitShift", top, right, direction="RIGHT")
        fields.append(tape.unsqueezed(field, -1))
    return tape.add("Concat", *fields, axis=-1)


def matmul_bnb4(tape: Tape, step: Step) -> Grads:
    """MatMulBnb4: `dy @ w` with the dequantised weight, `(out, in)`."""
    shape = step.attribute("N", 0), step.attribute("K", 0)
    block = step.attribute("block_size", 64)
    if shape[0] * shape[1] % block:
        raise step.refuse("its last block is not whole")
    dtype = tape.dtype(step.input(2))
    values = np.array(BNB4_VALUES[step.attribute("quant_type", 1)], dtype)
    fields = _fields(tape, step.input(1), 4, high_first=True)
    places = tape.cast(fields, INT64)
    numbers = tape.add("Gather", tape.constant(values), places, axis=0)
    numbers = tape.add("Reshape", numbers, tape.integers(-1, block))
    scale = tape.add("Reshape", step.input(2), tape.integers(-1, 1))
    scaled = tape.add("Mul", numbers, scale)
    matrix = tape.add("Reshape", scaled, tape.integers(*shape))
    return only(tape.add("MatMul", step.grad, tape.cast(matrix, tape.elem_type(step.grad))))


# FusedGemm and FusedConv of ONNX Runtime have an activation inside, which is undone first.


def _inner_grad(tape: Tape, step: Step) -> str:
    """The gradient before the activation inside a fused layer, from its output."""
    y, kind = step.output, step.attribute("activation", "")
    if kind == "Relu":
        return tape.kept_where(tape.compare("Greater", y, tape.number(0, y)), step.grad)
    one = tape.number(1, y)
    if kind == "Tanh":
        return tape.add("Mul", step.grad, tape.add("Sub", one, tape.add("Mul", y, y)))
    if kind == "Sigmoid":
        slope = tape.add("Mul", y, tape.add("Sub", one, y))
        return tape.add("Mul", step.grad, slope)
    raise step.refuse(f"its activation is {kind or 'not known'}")


def fused_gemm(tape: Tape, step: Step) -> Grads:
    """FusedGemm: a Gemm and an activation."""
    return gemm(tape, replace(step, grads=(_inner_grad(tape, step),)))


def fused_conv(tape: Tape, step: Step) -> Grads:
    """FusedConv: a Conv and an activation; a sum with another tensor may be between them."""
    inner = _inner_grad(tape, step) if step.attribute("activation", "") else step.grad
    grads = list(conv(tape, replace(step, grads=(inner,))))
    return [*grads, inner] if step.input(3) else grads


QUANTISED: dict[str, Rule] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLinear": dynamic_quantize,
    "MatMulInteger": matmul_integer,
    "ConvInteger": conv_integer,
    "MatMulNBits": matmul_nbits,
    "MatMulBnb4": matmul_bnb4,
    "FusedGemm": fused_gemm,
    "FusedConv": fused_conv,
}
"""The rules by operator."""
