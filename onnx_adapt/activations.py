"""The activations of a slot, each twice: as ONNX nodes and as float64 numpy.

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
Compute = Callable[[Array], Array]

LEAKY_SLOPE = 0.01
_TANH_SCALE, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), 1 - 1 / (1 + np.exp(-np.abs(x))))


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


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
    "relu": (lambda e, x: e.node("Relu", x, label="act"), lambda x: np.maximum(x, 0)),
    "gelu": (_emit_gelu, lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5)))),
    "gelu_tanh": (
        _emit_gelu_tanh,
        lambda x: 0.5 * x * (1 + np.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x**3))),
    ),
    "silu": (lambda e, x: _gated(e, x, x), lambda x: x * _sigmoid(x)),
    "tanh": (lambda e, x: e.node("Tanh", x), np.tanh),
    "sigmoid": (lambda e, x: e.node("Sigmoid", x), _sigmoid),
    "leaky_relu": (_emit_leaky_relu, lambda x: np.where(x > 0, x, LEAKY_SLOPE * x)),
    "quick_gelu": (
        lambda e, x: _gated(e, x, e.times(x, 1.702)),
        lambda x: x * _sigmoid(1.702 * x),
    ),
    "relu2": (_emit_relu2, lambda x: np.maximum(x, 0) ** 2),
    "relu6": (_emit_relu6, lambda x: np.clip(x, 0, 6)),
    "mish": (_emit_mish, lambda x: x * np.tanh(_softplus(x))),
    "identity": (lambda e, x: x, lambda x: x),
}
"""Name -> (emit nodes, compute in numpy)."""
