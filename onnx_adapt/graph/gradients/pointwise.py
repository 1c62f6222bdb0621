"""Rules for operators that work number by number, with broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable

from onnx_adapt.graph.gradients.rule import Grads, Rule, Step, only
from onnx_adapt.graph.gradients.tape import Tape

Derivative = Callable[[Tape, Step], str]
"""Adds the nodes for `dy / dx` of an operator with one input."""


def function(derivative: Derivative) -> Rule:
    """The rule of an operator with one input and a derivative."""

    def rule(tape: Tape, step: Step) -> Grads:
        return only(tape.add("Mul", step.grad, derivative(tape, step)))

    return rule


def mask(condition: Derivative) -> Rule:
    """The rule of an operator that passes a number on, or replaces it by a constant."""

    def rule(tape: Tape, step: Step) -> Grads:
        return only(tape.kept_where(condition(tape, step), step.grad))

    return rule


# Binary operators. Each operand may have been broadcast.


def add(tape: Tape, step: Step) -> Grads:
    """`x + y`, and Sum of any number of terms."""
    return [
        tape.unbroadcast(step.grad, name, step.output) if wanted else None
        for name, wanted in zip(step.node.input, step.wanted, strict=True)
    ]


def subtract(tape: Tape, step: Step) -> Grads:
    """`x - y`."""
    grads: list[str | None] = [None, None]
    if step.wants(0):
        grads[0] = tape.unbroadcast(step.grad, step.input(0), step.output)
    if step.wants(1):
        grads[1] = tape.unbroadcast(tape.add("Neg", step.grad), step.input(1), step.output)
    return grads


def multiply(tape: Tape, step: Step) -> Grads:
    """`x * y`."""
    return [
        tape.unbroadcast(tape.add("Mul", step.grad, step.input(1 - i)), name, step.output)
        if wanted
        else None
        for i, (name, wanted) in enumerate(zip(step.node.input, step.wanted, strict=True))
    ]


def divide(tape: Tape, step: Step) -> Grads:
    """`x / y`: `1 / y` and `-(x / y) / y`."""
    share = tape.add("Div", step.grad, step.input(1))
    grads: list[str | None] = [None, None]
    if step.wants(0):
        grads[0] = tape.unbroadcast(share, step.input(0), step.output)
    if step.wants(1):
        down = tape.add("Neg", tape.add("Mul", share, step.output))
        grads[1] = tape.unbroadcast(down, step.input(1), step.output)
    return grads


def power(tape: Tape, step: Step) -> Grads:
    """`x ** p`: `p x ** (p - 1)` and `y log x`.

    At `x = 0` with `p > 0` the gradient of `p` is 0, as in PyTorch.
    """
    base, exponent = step.input(0), step.input(1)
    number = tape.cast(exponent, tape.elem_type(base))
    grads: list[str | None] = [None, None]
    if step.wants(0):
        slope = tape.add("Mul", number, _power(tape, base, exponent, number))
        raised = tape.add("Mul", step.grad, slope)
        grads[0] = tape.unbroadcast(raised, base, step.output)
    if step.wants(1):
        positive = tape.compare("Greater", base, tape.number(0, base))
        log = tape.add("Log", tape.where(positive, base, tape.number(1, base)))
        grown = tape.add("Mul", step.grad, tape.add("Mul", step.output, log))
        grads[1] = tape.cast(
            tape.unbroadcast(grown, exponent, step.output), tape.elem_type(exponent)
        )
    return grads


def _power(tape: Tape, base: str, exponent: str, number: str) -> str:
    """`x ** (p - 1)`; for a square `x` itself, which is exact and faster."""
    value = tape.value(exponent)
    if value is not None and value.size == 1 and float(value.reshape(())) == 2:
        return base
    return tape.add("Pow", base, tape.plus(number, -1))


def choose(tape: Tape, step: Step) -> Grads:
    """Max and Min: the gradient goes to the chosen operand, in equal parts to equal ones."""
    chosen = [tape.compare("Equal", name, step.output) for name in step.node.input]
    kind = tape.elem_type(step.output)
    ones = [tape.cast(item, kind) for item in chosen]
    share = step.grad if len(ones) == 1 else tape.add("Div", step.grad, tape.add("Sum", *ones))
    return [
        tape.unbroadcast(tape.kept_where(item, share), name, step.output) if wanted else None
        for name, item, wanted in zip(step.node.input, chosen, step.wanted, strict=True)
    ]


def where(tape: Tape, step: Step) -> Grads:
    """`x` where a condition holds, `y` elsewhere."""
    zero = tape.number(0, step.grad)
    condition, yes, no = (step.input(i) for i in range(3))
    grads: list[str | None] = [None, None, None]
    if step.wants(1):
        kept = tape.where(condition, step.grad, zero)
        grads[1] = tape.unbroadcast(kept, yes, step.output)
    if step.wants(2):
        kept = tape.add("Where", condition, zero, step.grad, elem_type=tape.elem_type(no))
        grads[2] = tape.unbroadcast(kept, no, step.output)
    return grads


def prelu(tape: Tape, step: Step) -> Grads:
    """`x` above zero, `slope * x` below."""
    x, slope = step.input(0), step.input(1)
    above = tape.compare("Greater", x, tape.number(0, x))
    grads: list[str | None] = [None, None]
    if step.wants(0):
        grads[0] = tape.where(above, step.grad, tape.add("Mul", step.grad, slope))
    if step.wants(1):
        below = tape.where(above, tape.number(0, x), tape.add("Mul", step.grad, x))
        grads[1] = tape.unbroadcast(below, slope, step.output)
    return grads


# Functions of one number: what their derivative is.


def _one_minus(tape: Tape, tensor: str) -> str:
    return tape.add("Sub", tape.number(1, tensor), tensor)


def _square(tape: Tape, tensor: str) -> str:
    return tape.add("Mul", tensor, tensor)


def _erf(tape: Tape, step: Step) -> str:
    """`2 / sqrt(pi) * exp(-x ** 2)`."""
    bell = tape.add("Exp", tape.add("Neg", _square(tape, step.input())))
    return tape.times(bell, 2 / math.sqrt(math.pi))


def _sigmoid(tape: Tape, step: Step) -> str:
    return tape.add("Mul", step.output, _one_minus(tape, step.output))


def _tanh(tape: Tape, step: Step) -> str:
    return _one_minus(tape, _square(tape, step.output))


def _leaky(tape: Tape, step: Step) -> str:
    x = step.input()
    slope = tape.number(step.attribute("alpha", 0.01), x)
    return tape.where(_positive(tape, step), tape.number(1, x), slope)


_SELU = 1.67326319217681884765625, 1.05070102214813232421875
"""Alpha and gamma of Selu, as ONNX has them by default."""


def _elu(tape: Tape, step: Step) -> str:
    """Elu, Celu and Selu: `gamma` above zero, `gamma alpha / s exp(x / s)` below."""
    x, kind = step.input(), step.node.op_type
    alpha = step.attribute("alpha", _SELU[0] if kind == "Selu" else 1.0)
    gamma = step.attribute("gamma", _SELU[1]) if kind == "Selu" else 1.0
    scale = alpha if kind == "Celu" else 1.0
    grown = tape.add("Exp", tape.times(x, 1 / scale))
    below = tape.times(grown, gamma * alpha / scale)
    return tape.where(_positive(tape, step), tape.number(gamma, x), below)


def _gelu(tape: Tape, step: Step) -> str:
    """`Phi(x) + x phi(x)`, or the derivative of the approximation by Tanh."""
    if step.attribute("approximate", "none") == "tanh":
        return gelu_tanh_slope(tape, step.input())
    return gelu_slope(tape, step.input())


def gelu_slope(tape: Tape, x: str) -> str:
    """The derivative of Gelu (Hendrycks and Gimpel, 2016): `Phi(x) + x phi(x)`."""
    share = tape.plus(tape.add("Erf", tape.times(x, 1 / math.sqrt(2))), 1)
    bell = tape.add("Exp", tape.times(_square(tape, x), -0.5))
    density = tape.times(bell, 1 / math.sqrt(2 * math.pi))
    return tape.add("Add", tape.times(share, 0.5), tape.add("Mul", x, density))


def gelu_tanh_slope(tape: Tape, x: str) -> str:
    """The derivative of Gelu's approximation `x (1 + tanh(k (x + c x ** 3))) / 2`."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    square = _square(tape, x)
    inner = tape.add("Mul", x, tape.plus(tape.times(square, cubic), 1))
    tanh = tape.add("Tanh", tape.times(inner, scale))
    slope = tape.times(tape.plus(tape.times(square, 3 * cubic), 1), scale)
    change = tape.add("Mul", _one_minus(tape, _square(tape, tanh)), slope)
    both = tape.add("Add", tape.plus(tanh, 1), tape.add("Mul", x, change))
    return tape.times(both, 0.5)


def _swish(tape: Tape, step: Step) -> str:
    """Swish and QuickGelu, `x sigmoid(a x)`: `s + a x s (1 - s)`."""
    default = 1.702 if step.node.op_type == "QuickGelu" else 1.0
    scaled = tape.times(step.input(), step.attribute("alpha", default))
    share = tape.add("Sigmoid", scaled)
    bent = tape.add("Mul", scaled, _one_minus(tape, share))
    return tape.add("Mul", share, tape.plus(bent, 1))


def _mish(tape: Tape, step: Step) -> str:
    """Mish, `x t` with `t = tanh(softplus(x))`: `t + x (1 - t ** 2) sigmoid(x)`."""
    x = step.input()
    tanh = tape.add("Tanh", tape.add("Softplus", x))
    bent = tape.add("Mul", _one_minus(tape, _square(tape, tanh)), tape.add("Sigmoid", x))
    return tape.add("Add", tanh, tape.add("Mul", x, bent))


def _hard_swish(tape: Tape, step: Step) -> str:
    """0 below -3, 1 above 3, `x / 3 + 1 / 2` between."""
    x = step.input()
    slope = tape.plus(tape.times(x, 1 / 3), 0.5)
    low = tape.compare("Less", x, tape.number(-3, x))
    high = tape.compare("Greater", x, tape.number(3, x))
    slope = tape.where(low, tape.number(0, x), slope)
    return tape.where(high, tape.number(1, x), slope)


def _hard_sigmoid(tape: Tape, step: Step) -> str:
    y = step.output
    inside = tape.add(
        "And",
        tape.compare("Greater", y, tape.number(0, y)),
        tape.compare("Less", y, tape.number(1, y)),
    )
    slope = tape.number(step.attribute("alpha", 0.2), y)
    return tape.where(inside, slope, tape.number(0, y))


def _softsign(tape: Tape, step: Step) -> str:
    """`1 / (1 + |x|) ** 2`."""
    root = tape.plus(tape.add("Abs", step.input()), 1)
    return tape.add("Reciprocal", _square(tape, root))


def _circle(kind: str, sign: int) -> Derivative:
    """`sign / sqrt(1 + kind * x ** 2)`: Asin, Acos, Asinh."""

    def derivative(tape: Tape, step: Step) -> str:
        square = _square(tape, step.input())
        under = tape.plus(square, 1) if kind == "+" else _one_minus(tape, square)
        return tape.times(tape.add("Reciprocal", tape.add("Sqrt", under)), sign)

    return derivative


def _positive(tape: Tape, step: Step) -> str:
    return tape.compare("Greater", step.input(), tape.number(0, step.input()))


def _unchanged(tape: Tape, step: Step) -> str:
    """Clip and ThresholdedRelu: where the output is the input."""
    return tape.compare("Equal", step.input(), step.output)


def _made_positive(tape: Tape, step: Step) -> str:
    return tape.compare("Greater", step.output, tape.number(0, step.output))


def negate(tape: Tape, step: Step) -> Grads:
    """`-x`."""
    return only(tape.add("Neg", step.grad))


def pass_on(tape: Tape, step: Step) -> Grads:
    """Identity, and Dropout outside of training."""
    return only(step.grad)


def biased_gelu(tape: Tape, step: Step) -> Grads:
    """BiasGelu and FastGelu of ONNX Runtime: Gelu of `x + bias`."""
    x, bias = step.input(0), step.input(1)
    inner = tape.add("Add", x, bias) if bias else x
    slope = gelu_tanh_slope if step.node.op_type == "FastGelu" else gelu_slope
    grad = tape.add("Mul", step.grad, slope(tape, inner))
    return [grad, tape.unbroadcast(grad, bias, step.output) if step.wants(1) else None]


POINTWISE: dict[str, Rule] = {
    **dict.fromkeys(("Add", "Sum"), add),
    "Sub": subtract,
    "Mul": multiply,
    "Div": divide,
    "Pow": power,
    **dict.fromkeys(("Max", "Min"), choose),
    "Where": where,
    "PRelu": prelu,
    "Neg": negate,
    **dict.fromkeys(("Identity", "Dropout"), pass_on),
    "Abs": function(lambda tape, step: tape.add("Sign", step.input())),
    "Reciprocal": function(lambda tape, step: tape.add("Neg", _square(tape, step.output))),
    "Exp": function(lambda tape, step: step.output),
    "Log": function(lambda tape, step: tape.add("Reciprocal", step.input())),
    "Sqrt": function(lambda tape, step: tape.times(tape.add("Reciprocal", step.output), 0.5)),
    "Sin": function(lambda tape, step: tape.add("Cos", step.input())),
    "Cos": function(lambda tape, step: tape.add("Neg", tape.add("Sin", step.input()))),
    "Tan": function(lambda tape, step: tape.plus(_square(tape, step.output), 1)),
    "Sinh": function(lambda tape, step: tape.add("Cosh", step.input())),
    "Cosh": function(lambda tape, step: tape.add("Sinh", step.input())),
    "Asin": function(_circle("-", 1)),
    "Acos": function(_circle("-", -1)),
    "Asinh": function(_circle("+", 1)),
    "Atan": function(
        lambda tape, step: tape.add("Reciprocal", tape.plus(_square(tape, step.input()), 1))
    ),
    "Erf": function(_erf),
    "Sigmoid": function(_sigmoid),
    "Tanh": function(_tanh),
    "Relu": mask(_made_positive),
    "LeakyRelu": function(_leaky),
    **dict.fromkeys(("Elu", "Celu", "Selu"), function(_elu)),
    "Softplus": function(lambda tape, step: tape.add("Sigmoid", step.input())),
    "Softsign": function(_softsign),
    "HardSigmoid": function(_hard_sigmoid),
    "HardSwish": function(_hard_swish),
    "Mish": function(_mish),
    **dict.fromkeys(("Clip", "ThresholdedRelu"), mask(_unchanged)),
    "Gelu": function(_gelu),
    **dict.fromkeys(("Swish", "QuickGelu"), function(_swish)),
    **dict.fromkeys(("BiasGelu", "FastGelu"), biased_gelu),
}
"""The rules by operator."""
