"""Random models that know where the features of each of their tensors are.

A `Network` is a chain of pieces that exporters write: convolutions, GroupNorm as Reshape,
InstanceNormalization and Reshape, a channel shuffle, NHWC and back, a flattened image,
Linears whose bias is inside the next operator. It is made twice: as ONNX nodes and, node
by node, as numpy. Nothing in this file asks onnx_adapt where a feature axis is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray
Weights = tuple[Array, Array]
"""Of a plain slot: `down` as `(width, bottleneck)` and `up` as `(bottleneck, width)`."""

CONTRIB = "com.microsoft"
EPSILON = 1e-5


@dataclass(frozen=True)
class Features:
    """Where the features of a tensor are.

    Attributes:
        axis: The axis they are on, counted from the front; None if no axis holds them all.
        width: How many there are.
        biased: The tensor with the layer's bias, if the next operator adds it; else ''.
    """

    axis: int | None
    width: int = 0
    biased: str = ""


NOWHERE = Features(None)


def _instance_norm(a: dict[str, Any], x: Array, scale: Array, shift: Array) -> Array:
    axes = tuple(range(2, x.ndim))
    flat = (1, -1, *[1] * (x.ndim - 2))
    centred = x - x.mean(axes, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axes, keepdims=True) + EPSILON)
    return centred / deviation * scale.reshape(flat) + shift.reshape(flat)


def _layer_norm(a: dict[str, Any], x: Array, scale: Array, shift: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * scale + shift


def _conv(a: dict[str, Any], x: Array, w: Array, b: Array | None = None) -> Array:
    """A convolution with stride 1 that keeps the size: one shifted product per tap."""
    n = x.ndim - 2
    pads = [(k // 2, k // 2) for k in w.shape[2:]]
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    total = np.zeros((x.shape[0], w.shape[0], *x.shape[2:]))
    for tap in np.ndindex(*w.shape[2:]):
        window = tuple(slice(t, t + s) for t, s in zip(tap, x.shape[2:], strict=True))
        total += np.einsum("bi...,oi->bo...", padded[(..., *window)], w[(..., *tap)])
    return total if b is None else total + b.reshape(-1, *[1] * n)


def _pool(a: dict[str, Any], x: Array) -> Array:
    """The largest of each 3 x 3 window."""
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
    h, w = x.shape[2:]
    taps = [padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.max(taps, axis=0)


def _reshape(a: dict[str, Any], x: Array, shape: Array) -> Array:
    sizes = [x.shape[i] if s == 0 else int(s) for i, s in enumerate(shape)]
    if -1 in sizes:  # numpy cannot find the size where there are no rows
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = x.size // known if known else 0
    return x.reshape(sizes)


def _gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2


def _fast_gelu(a: dict[str, Any], x: Array, b: Array) -> Array:
    x = x + b
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _skip_norm(
    a: dict[str, Any], x: Array, skip: Array, scale: Array, shift: Array, bias: Array
) -> Array:
    return _layer_norm(a, x + skip + bias, scale, shift)


def _flatten(a: dict[str, Any], x: Array) -> Array:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


COMPUTE: dict[str, Callable[..., Array]] = {
    "Conv": _conv,
    "MaxPool": _pool,
    "GlobalAveragePool": lambda a, x: x.mean(tuple(range(2, x.ndim)), keepdims=True),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "BatchNormalization": lambda a, x, g, b, m, v: np.moveaxis(
        (np.moveaxis(x, 1, -1) - m) / np.sqrt(v + EPSILON) * g + b, -1, 1
    ),
    "MatMul": lambda a, x, w: x @ w,
    "Add": lambda a, x, y: x + y,
    "Mul": lambda a, x, y: x * y,
    "Relu": lambda a, x: np.maximum(x, 0),
    "Tanh": lambda a, x: np.tanh(x),
    "Sigmoid": lambda a, x: 1 / (1 + np.exp(-x)),
    "Transpose": lambda a, x: x.transpose(a["perm"]),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Shape": lambda a, x: np.array(x.shape),
    "Gather": lambda a, x, i: x[i],
    "Concat": lambda a, *x: np.concatenate(x),
    "BiasGelu": lambda a, x, b: _gelu(x + b),
    "FastGelu": _fast_gelu,
    "SkipLayerNormalization": _skip_norm,
}


@dataclass
class Network:
    """A model as nodes, as numpy, and with the truth about its tensors.

    Attributes:
        x: What the input is fed: rows first.
        symbols: The input's axes that are symbols, with their names.
        nodes: In order.
        weights: The initializers.
        features: Of a float tensor that a node makes, where its features are. A tensor that
            is not here has no one answer: a slot may stand there or not.
        values: Every tensor for `x`, in float64.
        at: The tensor that the next piece reads.
        outputs: The model's outputs beside `at`.
    """

    x: Array
    symbols: dict[int, str] = field(default_factory=lambda: {0: "n"})
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    features: dict[str, Features] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    at: str = "x"
    outputs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The input is the first tensor."""
        self.values["x"] = self.x.astype(float)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that the next piece reads."""
        return self.values[self.at].shape

    def weight(self, *shape: int, around: float = 0.0) -> str:
        """A new weight; those `around` 1 are scales and variances, and positive."""
        rng = np.random.default_rng([len(self.weights), *shape])
        fan_in = math.prod(shape[1:]) if len(shape) > 2 else shape[0]
        noise = rng.standard_normal(shape)
        value = around + noise / (4 if around or len(shape) == 1 else math.sqrt(fan_in))
        return self.constant(np.abs(value) if around else value)

    def constant(self, value: Array | Sequence[int]) -> str:
        """A new initializer: floats, or the integers of a shape."""
        array = np.asarray(value)
        name = f"w{len(self.weights)}"
        self.weights[name] = array.astype("float32" if array.dtype.kind == "f" else "int64")
        self.values[name] = self.weights[name]
        return name

    def put(
        self, op: str, *reads: str, features: Features | None = None, name: str = "", **a: Any
    ) -> str:
        """A new node; the next piece reads what it makes, unless that is a shape."""
        out = f"t{len(self.nodes)}"
        domain = CONTRIB if op in _CONTRIB_OPS else ""
        node = helper.make_node(op, reads, [out], name or f"node_{out}", domain=domain, **a)
        self.nodes.append(node)
        self.values[out] = _result(node, self.values)
        if op not in ("Shape", "Gather", "Concat"):
            self.at = out
        if features is not None:
            self.features[out] = features
        return out

    def channels(self, op: str, *reads: str, **a: Any) -> str:
        """A new node whose features are on axis 1."""
        out = self.put(op, *reads, **a)
        self.features[out] = Features(1, self.shape[1])
        return out

    def last(self, op: str, *reads: str, biased: str = "", **a: Any) -> str:
        """A new node whose features are on the last axis."""
        out = self.put(op, *reads, **a)
        self.features[out] = Features(len(self.shape) - 1, self.shape[-1], biased)
        return out

    def proto(self) -> onnx.ModelProto:
        """The model, as a careful exporter would write it."""
        shape = [self.symbols.get(i, size) for i, size in enumerate(self.x.shape)]
        outputs = [*self.outputs, self.at]
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
            [self._output(name) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def _output(self, name: str) -> onnx.ValueInfoProto:
        sizes = self.values[name].shape
        symbols = [f"{name}_{i}" for i in range(len(sizes))]
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, symbols)

    def compute(self, x: Array, slots: Mapping[str, Weights]) -> list[Array]:
        """The outputs, with a slot on the features of each tensor that has one."""
        found: dict[str, Array] = {**self.weights, "x": x.astype(float)}
        for node in self.nodes:
            value = _result(node, found)
            for out in node.output:
                known = self.features.get(out, NOWHERE)
                if out in slots and known.axis is not None:
                    value = bumped(value, known.axis, slots[out])
                found[out] = value
        return [found[name] for name in (*self.outputs, self.at)]


_CONTRIB_OPS = ("BiasGelu", "FastGelu", "SkipLayerNormalization")


def _result(node: onnx.NodeProto, found: Mapping[str, Array]) -> Array:
    given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return COMPUTE[node.op_type](given, *(found[name] for name in node.input))


def bumped(value: Array, axis: int, weights: Weights) -> Array:
    """What a plain slot makes of a tensor whose features are on an axis."""
    down, up = weights
    wide = np.moveaxis(value, axis, -1)
    return np.moveaxis(wide + np.maximum(wide @ down, 0) @ up, -1, axis)
