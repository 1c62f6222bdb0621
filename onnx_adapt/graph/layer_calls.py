"""Calls of a layer: the float tensors that it reads and makes, however its weight is stored.

An example. PyTorch's `fc = Linear(4, 8)` is exported as

    a = MatMul(x, W)     y = Add(a, fc.bias)

The call of `fc` has the MatMul as `node`, `x` as `source`, `W` as `weight`, `a` as `raw` and
`y` as `output`. A quantised model computes the same product with integers:

    xq, xs, xz = DynamicQuantizeLinear(x)    i = MatMulInteger(xq, Wq, xz, Wz)
    s = Mul(xs, Ws)     a = Mul(Cast(i), s)  y = Add(a, fc.bias)

Its call has the MatMulInteger as `node`, and `x`, `a` and `y` as before. An edit of the module
therefore sits on the same tensors in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_adapt.dtypes import FLOATS, Array
from onnx_adapt.graph.index import GraphView, text
from onnx_adapt.graph.layers import bias_add, find_weight, layer_sizes, weight_width
from onnx_adapt.graph.operators import OPERATORS


@dataclass(frozen=True, slots=True)
class Packing:
    """The modules that one layer computes side by side.

    Attributes:
        layer: The path of the layer itself.
        modules: The paths of the modules, in the order of their columns.
        columns: Where their columns start, and at last where they end.
    """

    layer: str
    modules: tuple[str, ...]
    columns: tuple[int, ...]

    def span(self, module: str) -> tuple[int, int]:
        """The columns of one of the modules."""
        at = self.modules.index(module)
        return self.columns[at], self.columns[at + 1]


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One call of a layer.

    Attributes:
        view: The graph it is in.
        node: The node with the weight.
        source: The float tensor that it reads; the ids for an embedding; '' if what it reads
            is nowhere a float.
        raw: The product as floats, before the bias if that is a separate Add.
        output: The output with the bias. It is `raw` if the bias is inside the node, there
            is none, or it is added further behind (`fused_bias`).
        span: The module's columns, where the node computes several modules side by side.
        packing: All modules that it computes then.
    """

    view: GraphView
    node: onnx.NodeProto
    source: str
    raw: str
    output: str
    span: tuple[int, int] | None = None
    packing: Packing | None = None

    @property
    def weight(self) -> str:
        """The name of the weight that the node reads."""
        return str(self.node.input[OPERATORS[self.node.op_type].weight])

    @property
    def label(self) -> str:
        """What to call the node in a message."""
        return text(self.node.name) or self.raw

    @property
    def activation(self) -> str:
        """The activation that an optimiser moved into the node, or ''."""
        found = (item.s for item in self.node.attribute if item.name == "activation")
        return next(found, b"").decode("utf-8", "replace")

    @property
    def alpha(self) -> float:
        """What an optimiser multiplied the product by inside the node."""
        if self.node.op_type != "FusedMatMul":
            return 1.0
        return next((item.f for item in self.node.attribute if item.name == "alpha"), 1.0)

    @property
    def sizes(self) -> tuple[int, int]:
        """The module's `(in, out)`; for an embedding `in` is the size of its vocabulary."""
        reads, computes = self._node_sizes
        return reads, computes if self.span is None else self.span[1] - self.span[0]

    def spread(self, array: Array, *, axis: int = 0, fill: float = 0) -> Array:
        """Widen an array over the module's columns to all columns that the node computes."""
        if self.span is None:
            return array
        pads = [(0, 0)] * array.ndim
        pads[axis] = self.span[0], self._node_sizes[1] - self.span[1]
        return np.pad(array, pads, constant_values=fill)

    @property
    def _node_sizes(self) -> tuple[int, int]:
        reads, computes = layer_sizes(self.view, self.node)
        return reads or 0, computes or 0

    @property
    def stored_in_out(self) -> bool:
        """Whether the weight is `(in, out)` at the node, the transpose of PyTorch's."""
        return OPERATORS[self.node.op_type].is_stored_in_out(self.node)


def layer_call(
    view: GraphView, node: onnx.NodeProto, after: Mapping[str, str]
) -> LayerCall | None:
    """Describe the call that a layer's node makes, with the Add of its bias.

    Args:
        view: The graph of the node.
        node: A layer.
        after: The tensors that slots are on, each with the output of the last slot on it.

    Returns:
        The call; None if the product is nowhere a float.
    """
    raw = float_product(view, node, str(node.output[0]))
    if raw is None:
        return None
    shown = after.get(raw, raw)
    bias = bias_add(view, node, shown, weight_width(view, node))
    output = shown if bias is None else after.get(bias, bias)
    return LayerCall(view, node, _float_source(view, node), raw, output)


def _float_source(view: GraphView, node: onnx.NodeProto) -> str:
    """The float tensor whose quantised values a node reads, or what it reads itself."""
    name = str(node.input[OPERATORS[node.op_type].data])
    made = view.producer(name)
    if made is not None and made[1].op_type in _QUANTISERS:
        return str(made[1].input[0])
    embeds = OPERATORS[node.op_type].embeds
    return name if embeds or view.type_of(name).elem_type in (0, *FLOATS) else ""


_QUANTISERS = ("DynamicQuantizeLinear", "QuantizeLinear")


def float_product(view: GraphView, node: onnx.NodeProto, output: str) -> str | None:
    """The float tensor that a layer's output is, or that an output of integers becomes.

    Two scales belong to a product of integers, that of the data and that of the weight.
    Quantisers multiply them with each other first, or one after the other. A third
    factor is a part of the model.

    Args:
        view: The graph of the node.
        node: A layer.
        output: One of its outputs.

    Returns:
        The float tensor; None if something reads the integers before they are floats.
    """
    elem_type = view.type_of(output).elem_type
    if OPERATORS[node.op_type].embeds and elem_type and elem_type not in FLOATS:
        reader = _only_reader(view, output)
        return str(reader.output[0]) if _is(reader, "DequantizeLinear") and reader else None
    if OPERATORS[node.op_type].keeps_type:
        return output
    scales, cast = 0, False
    while scales < 2:
        reader = _only_reader(view, output)
        if reader is None or not reader.output:
            return None
        if reader.op_type == "Cast" and not cast:
            cast = True
        elif reader.op_type == "Mul" and cast and len(reader.input) == 2:
            other = reader.input[1 - list(reader.input).index(output)]
            scales += _count_scales(view, str(other))
        else:
            return None
        output = str(reader.output[0])
    return output if scales == 2 else None


def weight_scales(call: LayerCall) -> list[str]:
    """The tensors that may be the scale of a call's quantised weight.

    It is an input of the node, or one of the constants that the product is multiplied by.
    """
    operator = OPERATORS[call.node.op_type]
    if operator.weight_scale is not None:
        return [str(name) for name in call.node.input[operator.weight_scale :][:1]]
    found: list[str] = []
    tensor = str(call.node.output[0])
    while tensor != call.raw:
        (reader,) = call.view.readers(tensor)
        if reader.op_type == "Mul":
            other = reader.input[1 - list(reader.input).index(tensor)]
            found += _constant_factors(call.view, str(other))
        tensor = str(reader.output[0])
    return found


def _constant_factors(view: GraphView, name: str) -> list[str]:
    made = view.producer(name)
    if made is not None and made[1].op_type == "Mul":
        return [n for item in made[1].input for n in _constant_factors(made[0], str(item))]
    return [name] if find_weight(view, name) is not None else []


def _is(node: onnx.NodeProto | None, op: str) -> bool:
    return node is not None and node.op_type == op


def _only_reader(view: GraphView, tensor: str) -> onnx.NodeProto | None:
    readers = view.readers(tensor)
    return readers[0] if len(readers) == 1 and tensor not in view.outputs else None


def _count_scales(view: GraphView, name: str, depth: int = 4) -> int:
    """How many scales are multiplied in a tensor; more than two for what is no scale."""
    made = view.producer(name)
    if made is None or made[1].op_type == "Constant":
        return 1 if find_weight(view, name) is not None else 3
    home, node = made
    if node.op_type == "DynamicQuantizeLinear":
        return 1
    if node.op_type == "Mul" and depth:
        return sum(_count_scales(home, str(item), depth - 1) for item in node.input)
    return 3
