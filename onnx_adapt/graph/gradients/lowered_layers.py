"""Fused layers of ONNX Runtime, quantised ones first, as plain nodes.

A quantised layer reads and makes 8-bit integers. The same in plain nodes dequantises what it
reads, computes in floats and quantises the result. An example: QLinearMatMul is

    a = DequantizeLinear(x, a_scale, a_zero)     b = DequantizeLinear(w, b_scale, b_zero)
    y = QuantizeLinear(MatMul(a, b), y_scale, y_zero)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnx_adapt.graph.gradients.rotary import rotary_embedding
from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.gradients.tape import FLOAT, INT64, UINT8, Tape


def dequantised(tape: Tape, step: Step, where: Sequence[int], axis: int | None = None) -> str:
    """The input at the first of some places, with scale and zero point at the other two."""
    given = [step.input(place) for place in where]
    while not given[-1]:
        del given[-1]
    kind = tape.elem_type(given[1])
    return tape.add("DequantizeLinear", *given, axis=axis, elem_type=kind)


def quantised(tape: Tape, step: Step, made: str, scale: int) -> str:
    """A result as integers, with the scale at a place and the zero point behind it."""
    given = [name for name in (step.input(scale), step.input(scale + 1)) if name]
    kind = tape.elem_type(given[1]) if len(given) > 1 else UINT8
    return tape.add("QuantizeLinear", made, *given, elem_type=kind)


def _kept(step: Step, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := step.attribute(name, None)) is not None}


def quantised_product(tape: Tape, step: Step) -> str:
    """QLinearMatMul."""
    x = dequantised(tape, step, (0, 1, 2))
    w = dequantised(tape, step, (3, 4, 5), axis=-1)
    return quantised(tape, step, tape.add("MatMul", x, w), 6)


_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def quantised_conv(tape: Tape, step: Step) -> str:
    """QLinearConv; its bias counts in products of the two scales."""
    x = dequantised(tape, step, (0, 1, 2))
    w = dequantised(tape, step, (3, 4, 5), axis=0)
    bias = []
    if step.input(8):
        unit = tape.add("Mul", step.input(1), step.input(4))
        bias = [tape.add("Mul", tape.cast(step.input(8), FLOAT), unit)]
    if step.attribute("channels_last", 0):
        raise step.refuse("its channels are last")
    made = tape.add("Conv", x, w, *bias, **_kept(step, *_CONV))
    return quantised(tape, step, made, 6)


def quantised_gemm(tape: Tape, step: Step) -> str:
    """QGemm, whose result is float if it has no scale."""
    x = dequantised(tape, step, (0, 1, 2))
    turned = step.attribute("transB", 0)
    w = dequantised(tape, step, (3, 4, 5), axis=0 if turned else 1)
    bias = []
    if step.input(6):
        unit = tape.add("Mul", step.input(1), step.input(4))
        unit = tape.times(unit, step.attribute("alpha", 1.0))
        bias = [tape.add("Mul", tape.cast(step.input(6), FLOAT), unit)]
    made = tape.add("Gemm", x, w, *bias, **_kept(step, "alpha", "transA", "transB"))
    return quantised(tape, step, made, 7) if step.input(7) else made


def _quantised_pair(op: str) -> Callable[[Tape, Step], str]:
    """QLinearAdd and QLinearMul."""

    def lowering(tape: Tape, step: Step) -> str:
        sides = [dequantised(tape, step, places) for places in ((0, 1, 2), (3, 4, 5))]
        return quantised(tape, step, tape.add(op, *sides), 6)

    return lowering


def _quantised_function(op: str, *names: str) -> Callable[[Tape, Step], str]:
    """An operator of one quantised tensor."""

    def lowering(tape: Tape, step: Step) -> str:
        if step.attribute("channels_last", 0):
            raise step.refuse("its channels are last")
        if step.attribute("opset", 13) < 13:
            raise step.refuse("it is that of an old opset")
        x = dequantised(tape, step, (0, 1, 2))
        return quantised(tape, step, tape.add(op, x, **_kept(step, *names)), 3)

    return lowering


def quantised_concat(tape: Tape, step: Step) -> str:
    """QLinearConcat: the scale and zero point of the result come first."""
    places = range(2, len(step.node.input), 3)
    parts = [dequantised(tape, step, (i, i + 1, i + 2)) for i in places]
    made = tape.add("Concat", *parts, axis=step.attribute("axis", 0))
    return quantised(tape, step, made, 0)


def dynamic_product(tape: Tape, step: Step) -> str:
    """DynamicQuantizeMatMul: the rounding of what it reads is passed straight through."""
    w = dequantised(tape, step, (1, 2, 3), axis=1)
    made = tape.add("MatMul", step.input(0), w)
    return tape.add("Add", made, step.input(4)) if step.input(4) else made


def integer_product(tape: Tape, step: Step) -> str:
    """MatMulIntegerToFloat."""
    x = dequantised(tape, step, (0, 2, 4))
    w = dequantised(tape, step, (1, 3, 5), axis=1)
    made = tape.add("MatMul", x, w)
    return tape.add("Add", made, step.input(6)) if step.input(6) else made


def fused_product(tape: Tape, step: Step) -> str:
    """FusedMatMul: `alpha * x @ y`, with their matrices transposed or not."""
    if step.attribute("transBatchA", 0) or step.attribute("transBatchB", 0):
        raise step.refuse("it moves axes of its stacks")
    sides = []
    for position, name in enumerate(("transA", "transB")):
        side = step.input(position)
        turned = step.attribute(name, 0) and tape.rank(side) > 1
        sides.append(tape.swapped(side, tape.rank(side)) if turned else side)
    return tape.times(tape.add("MatMul", *sides), step.attribute("alpha", 1.0))


def gemm_gelu(tape: Tape, step: Step) -> str:
    """GemmFastGelu: a product, a bias and the fast Gelu."""
    made = tape.add("MatMul", step.input(0), step.input(1))
    bias = [step.input(2)] if step.input(2) else []
    return tape.add("FastGelu", made, *bias, domain="com.microsoft")


def bias_add(tape: Tape, step: Step) -> str:
    """BiasAdd: two sums."""
    return tape.add("Add", tape.add("Add", step.input(0), step.input(1)), step.input(2))


def bias_split_gelu(tape: Tape, step: Step) -> str:
    """BiasSplitGelu: the left half times the Gelu of the right half."""
    biased = tape.add("Add", step.input(0), step.input(1))
    size = tape.add("Shape", biased, start=2, end=3, elem_type=INT64)
    half, last = tape.add("Div", size, tape.integers(2)), tape.integers(2)
    left = tape.add("Slice", biased, tape.integers(0), half, last)
    right = tape.add("Slice", biased, half, size, last)
    return tape.add("Mul", left, tape.add("Gelu", right, domain="com.microsoft"))


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")

LAYERS: dict[str, Callable[[Tape, Step], str]] = {
    "QLinearMatMul": quantised_product,
    "QLinearConv": quantised_conv,
    "QGemm": quantised_gemm,
    "QLinearAdd": _quantised_pair("Add"),
    "QLinearMul": _quantised_pair("Mul"),
    "QLinearConcat": quantised_concat,
    "QLinearSigmoid": _quantised_function("Sigmoid"),
    "QLinearLeakyRelu": _quantised_function("LeakyRelu", "alpha"),
    "QLinearSoftmax": _quantised_function("Softmax", "axis"),
    "QLinearAveragePool": _quantised_function("AveragePool", *_POOL),
    "QLinearGlobalAveragePool": _quantised_function("GlobalAveragePool"),
    "DynamicQuantizeMatMul": dynamic_product,
    "MatMulIntegerToFloat": integer_product,
    "FusedMatMul": fused_product,
    "GemmFastGelu": gemm_gelu,
    "BiasAdd": bias_add,
    "BiasSplitGelu": bias_split_gelu,
    "RotaryEmbedding": rotary_embedding,
}
"""How layers are lowered, by operator."""
