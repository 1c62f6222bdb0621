"""The activations of a slot, each as ONNX nodes and in float64 with an error bound.

Nodes are built from operators that the model's own opset has (7 to 26) and that ONNX
Runtime has kernels for. Names follow PyTorch; `gelu_tanh` is PyTorch's
`gelu(approximate="tanh")`, `quick_gelu` and `relu2` are from transformers' ACT2FN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.slot.bounds import Bounded

if TYPE_CHECKING:
    import onnx


@dataclass(slots=True)
class Emitter:
    """Collects nodes, and names them and their tensors under one prefix.

    Attributes:
        prefix: Start of every name.
        opset: Version of the default operator set.
        dtype: Element type of the arithmetic.
        nodes: The nodes so far.
    """

    prefix: str
    opset: int
    dtype: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[float, str] = field(default_factory=dict)

    def node(self, op: str, *inputs: str, label: str = "", **attributes: Any) -> str:
        """Add a node and return its output, `<prefix>/<label>`."""
        from onnx import helper

        name = f"{self.prefix}/{label or op.lower()}"
        if not label or any(name == node.name for node in self.nodes):
            name += f"_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def number(self, value: float) -> str:
        """A scalar constant in the slot's element type."""
        from onnx import numpy_helper

        if value not in self.constants:
            tensor = numpy_helper.from_array(np.array(value, DTYPES[self.dtype]))
            label = f"constant_{len(self.constants)}"
            self.constants[value] = self.node("Constant", label=label, value=tensor)
        return self.constants[value]

    def times(self, tensor: str, value: float) -> str:
        """`tensor * value`."""
        return self.node("Mul", tensor, self.number(value))


Emit = Callable[[Emitter, str], str]
Compute = Callable[[Bounded], Bounded]

LEAKY_SLOPE = 0.01
_TANH_SCALE, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _erf(x: Bounded) -> Bounded:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return x.function("erf", erf, lambda a: 2 / math.sqrt(math.pi) * np.exp(-a * a))


def _tanh(x: Bounded) -> Bounded:
    return x.function("tanh", np.tanh, lambda a: 1 - np.tanh(a) ** 2)


def _sigmoid(x: Bounded) -> Bounded:
    def sigmoid(v: Array) -> Array:
        small = 1 / (1 + np.exp(-np.abs(v)))
        return np.where(v >= 0, small, 1 - small)

    return x.function("sigmoid", sigmoid, lambda a: sigmoid(a) * (1 - sigmoid(a)))


def _softplus(x: Bounded) -> Bounded:
    """`relu(x) + log(1 + exp(-|x|))`; the slope of both functions is at most 1 there."""
    decay = (-x.abs()).function("exp", np.exp, np.ones_like)
    return x.relu() + (decay + 1.0).function("log", np.log, np.ones_like)


def _gelu(x: Bounded) -> Bounded:
    return x * 0.5 * (_erf(x * math.sqrt(0.5)) + 1.0)


def _gelu_tanh(x: Bounded) -> Bounded:
    inner = (x + x * x * (x * _TANH_CUBIC)) * _TANH_SCALE
    return x * 0.5 * (_tanh(inner) + 1.0)


def _emit_gelu(emit: Emitter, x: str) -> str:
    if emit.opset < 9 or emit.dtype == "float64":  # no Erf operator, or no kernel for it
        return _emit_gelu_from_exp(emit, x)
    erf = emit.node("Erf", emit.times(x, math.sqrt(0.5)))
    return emit.node("Mul", emit.times(x, 0.5), emit.node("Add", erf, emit.number(1.0)))


def _emit_gelu_from_exp(emit: Emitter, x: str) -> str:
    """`relu(x) - |x|/2 * erfc(|x|/sqrt(2))`, with `erfc(a) = exp(-a*a) * p(s)`.

    `p` interpolates the scaled complementary error function at Chebyshev points in
    `s`, a rational image of `a` (W. J. Cody, Math. Comp. 23, 1969, uses the same split).
    """
    size = emit.node("Abs", x)
    a = emit.times(size, math.sqrt(0.5))
    t = emit.node("Div", emit.number(2.0), emit.node("Add", a, emit.number(2.0)))
    s = emit.node("Sub", emit.times(t, 1 / 0.375), emit.number(5 / 3))
    poly = emit.number(float(_ERFCX[-1]))
    for coefficient in _ERFCX[-2::-1]:
        poly = emit.node("Add", emit.node("Mul", poly, s), emit.number(float(coefficient)))
    decay = emit.node("Exp", emit.node("Neg", emit.node("Mul", a, a)))
    tail = emit.node("Mul", emit.times(size, 0.5), emit.node("Mul", decay, poly))
    return emit.node("Sub", emit.node("Relu", x), tail)


def _erfcx_coefficients() -> Array:
    """Coefficients in `s` of `exp(a*a) * erfc(a)`, `t = 2 / (2 + a)` in [0.25, 1]."""

    def scaled(s: Any) -> Any:
        a = 2 / (0.625 + 0.375 * s) - 2
        return np.array([math.exp(v * v) * math.erfc(v) for v in a])

    chebyshev = np.polynomial.chebyshev.chebinterpolate(scaled, 22)
    return np.asarray(np.polynomial.chebyshev.cheb2poly(chebyshev))


_ERFCX = _erfcx_coefficients()


def _emit_gelu_tanh(emit: Emitter, x: str) -> str:
    cube = emit.node("Mul", emit.node("Mul", x, x), emit.times(x, _TANH_CUBIC))
    inner = emit.times(emit.node("Add", x, cube), _TANH_SCALE)
    tanh = emit.node("Add", emit.node("Tanh", inner), emit.number(1.0))
    return emit.node("Mul", emit.times(x, 0.5), tanh)


def _emit_leaky_relu(emit: Emitter, x: str) -> str:
    if emit.dtype == "float64" or (emit.dtype == "bfloat16" and emit.opset < 16):
        below = emit.times(emit.node("Relu", emit.node("Neg", x)), LEAKY_SLOPE)
        return emit.node("Sub", emit.node("Relu", x), below)
    return emit.node("LeakyRelu", x, alpha=LEAKY_SLOPE)


def _emit_relu6(emit: Emitter, x: str) -> str:
    if emit.opset < 12 and emit.dtype == "float64":  # no Clip kernel
        room = emit.node("Relu", emit.node("Sub", emit.number(6.0), x))
        return emit.node("Relu", emit.node("Sub", emit.number(6.0), room))
    if emit.opset < 11:
        return emit.node("Clip", x, min=0.0, max=6.0)
    return emit.node("Clip", x, emit.number(0.0), emit.number(6.0))


def _emit_relu2(emit: Emitter, x: str) -> str:
    positive = emit.node("Relu", x)
    return emit.node("Mul", positive, positive)


def _emit_mish(emit: Emitter, x: str) -> str:
    if emit.dtype in ("float64", "bfloat16"):  # no Softplus kernel, or not in its types
        decay = emit.node("Exp", emit.node("Neg", emit.node("Abs", x)))
        log = emit.node("Log", emit.node("Add", decay, emit.number(1.0)))
        softplus = emit.node("Add", emit.node("Relu", x), log)
    else:
        softplus = emit.node("Softplus", x)
    return emit.node("Mul", x, emit.node("Tanh", softplus))


def _gated(emit: Emitter, x: str, inner: str) -> str:
    return emit.node("Mul", x, emit.node("Sigmoid", inner))


ACTIVATIONS: dict[str, tuple[Emit, Compute]] = {
    "relu": (lambda e, x: e.node("Relu", x, label="act"), lambda x: x.relu()),
    "gelu": (_emit_gelu, _gelu),
    "gelu_tanh": (_emit_gelu_tanh, _gelu_tanh),
    "silu": (lambda e, x: _gated(e, x, x), lambda x: x * _sigmoid(x)),
    "tanh": (lambda e, x: e.node("Tanh", x), _tanh),
    "sigmoid": (lambda e, x: e.node("Sigmoid", x), _sigmoid),
    "leaky_relu": (_emit_leaky_relu, lambda x: x.relu() - (-x).relu() * LEAKY_SLOPE),
    "quick_gelu": (
        lambda e, x: _gated(e, x, e.times(x, 1.702)),
        lambda x: x * _sigmoid(x * 1.702),
    ),
    "relu2": (_emit_relu2, lambda x: x.relu() * x.relu()),
    "relu6": (_emit_relu6, lambda x: (6.0 - (6.0 - x).relu()).relu()),
    "mish": (_emit_mish, lambda x: x * _tanh(_softplus(x))),
    "identity": (lambda e, x: x, lambda x: x),
}
"""Name -> (emit nodes, compute in float64 with a bound of the nodes' roundings)."""
