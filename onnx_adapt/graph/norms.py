"""Normalisations in a graph: one node, or the arithmetic that older opsets need for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_adapt.errors import ModelFileError
from onnx_adapt.graph.index import GraphView, text
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.slot.manifest import slot_of

_WHOLE = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_EPSILON = 1e-5  # of these operators, where they do not say


@dataclass(frozen=True, slots=True, eq=False)
class BaseNorm:
    """A LayerNorm or RMSNorm of the base over the last axis.

    Attributes:
        view: The graph it is in.
        read: The tensor that is normalised.
        output: The result.
        weight: The node that reads the weight, and its position there.
        bias: The same for the bias, or None.
        epsilon: Added to the variance.
        centred: False for RMSNorm, which leaves the mean in.
    """

    view: GraphView
    read: str
    output: str
    weight: tuple[onnx.NodeProto, int]
    bias: tuple[onnx.NodeProto, int] | None
    epsilon: float
    centred: bool

    @property
    def weight_tensor(self) -> str:
        """The tensor that multiplies the normalised values."""
        return str(self.weight[0].input[self.weight[1]])

    @property
    def bias_tensor(self) -> str:
        """The tensor that is added at the end, or ''."""
        return str(self.bias[0].input[self.bias[1]]) if self.bias else ""


def find_norms(model: Model, view: GraphView) -> Iterator[BaseNorm]:
    """Every normalisation of one graph whose weight is constant, in graph order."""
    for node in view.nodes:
        found = None
        if slot_of(node):
            continue
        if node.op_type in _WHOLE and len(node.input) > 1:
            found = _whole(view, node)
        elif node.op_type == "Mul":
            found = decomposed_norm(model, view, node)
        if found is not None:
            yield found


def _whole(view: GraphView, node: onnx.NodeProto) -> BaseNorm | None:
    operator = OPERATORS[node.op_type]
    if find_weight(view, node.input[operator.weight]) is None:
        return None
    bias = None
    if operator.bias is not None and operator.has_bias(node):
        bias = node, operator.bias
    epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), _EPSILON)
    centred = node.op_type == "LayerNormalization"
    read, output = str(node.input[0]), str(node.output[0])
    return BaseNorm(view, read, output, (node, operator.weight), bias, epsilon, centred)


def decomposed_norm(model: Model, view: GraphView, node: onnx.NodeProto) -> BaseNorm | None:
    """The normalisation that ends with a Mul by its weight, and maybe an Add of its bias.

    That is `x / sqrt(mean(x * x) + epsilon) * weight`, with `x` minus its mean in a LayerNorm.
    It is followed from its end to its start. For example, of

        m = ReduceMean(x)    c = Sub(x, m)     p = Pow(c, 2)       v = ReduceMean(p)
        e = Add(v, 1e-5)     r = Sqrt(e)       d = Div(c, r)       y = Mul(d, weight)

    the Mul leads to the Div, this to `c` and by Sqrt and Add to the mean `v` of a square. What
    is squared must be what is divided, `c`. It is a Sub of a mean, so this is a LayerNorm of
    `x`; without the Sub it would be an RMSNorm of `c`.
    """
    position = next((i for i, name in enumerate(node.input) if _is_vector(view, name)), None)
    if position is None or len(node.input) != 2:
        return None
    scaled = str(node.input[1 - position])
    centre, root = _operands(view, scaled, "Div") or _by_reciprocal(model, view, scaled)
    (added,) = _operands(view, root, "Sqrt") or [""]
    shifted = _operands(view, added, "Add")
    for variance, constant in (shifted, shifted[::-1]) if len(shifted) == 2 else ():
        epsilon = _number(model, view, constant)
        square = _mean(model, view, variance)
        if epsilon is None or not square or not _is_square(model, view, square, centre):
            continue
        read = _uncentred(model, view, centre)
        width = find_weight(view, node.input[position])
        bias = _bias(view, str(node.output[0]), width.dims if width else ())
        output = str(bias[0].output[0] if bias else node.output[0])
        return BaseNorm(
            view, read or centre, output, (node, position), bias, epsilon, bool(read)
        )
    return None


def own_norm(nodes: Sequence[onnx.NodeProto]) -> onnx.NodeProto | None:
    """The base's normalisation that a slot re-applies, as one node, from the slot's nodes.

    None if there is none, or no longer as it was inserted.
    """
    last = next((node for node in nodes if text(node.name).endswith("/norm")), None)
    if last is None or last.op_type != "Mul":
        return last
    made = {node.output[0]: node for node in nodes if node.output}
    try:
        added = made[made[made[last.input[0]].input[1]].input[0]]  # Add under Sqrt under Div
        (value,) = onnx.numpy_helper.to_array(made[added.input[1]].attribute[0].t).reshape(-1)
        sums = [node for node in nodes if node.op_type == "Add"]
        biases = [node.input[1] for node in sums if node.input[0] == last.output[0]]
    except (LookupError, ValueError, TypeError):
        return None
    return one_node("", [str(last.input[1]), *map(str, biases)], str(last.name), float(value))


def one_node(read: str, weights: Sequence[str], output: str, epsilon: float) -> onnx.NodeProto:
    """A LayerNorm as the one node that opset 17 has for it."""
    return onnx.helper.make_node(
        "LayerNormalization", [read, *weights], [output], axis=-1, epsilon=epsilon
    )


def _is_vector(view: GraphView, name: str) -> bool:
    weight = find_weight(view, name)
    return weight is not None and len(weight.dims) == 1


def _operands(view: GraphView, tensor: str, op: str) -> list[str]:
    """What the node that makes a tensor reads, if it is of a type; else nothing."""
    made = view.producer(tensor)
    if made is None or made[0] is not view or made[1].op_type != op or slot_of(made[1]):
        return []
    return [str(name) for name in made[1].input]


def _by_reciprocal(model: Model, view: GraphView, tensor: str) -> tuple[str, str]:
    """The factors of `x * (1 / root)`, as RMSNorm is exported."""
    factors = _operands(view, tensor, "Mul")
    for x, inverse in (factors, factors[::-1]) if len(factors) == 2 else ():
        if root := _operands(view, inverse, "Reciprocal"):
            return x, root[0]
        ratio = _operands(view, inverse, "Div")
        if len(ratio) == 2 and _number(model, view, ratio[0]) == 1:
            return x, ratio[1]
    return "", ""


def _mean(model: Model, view: GraphView, tensor: str) -> str:
    """What a tensor is the mean of over the last axis, or ''."""
    made = view.producer(tensor)
    if made is None or made[1].op_type != "ReduceMean":
        return ""
    node = made[1]
    axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
    keeps = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
    if len(node.input) > 1 and node.input[1]:
        known = _array(model, view, str(node.input[1]))
        axes = None if known is None else known.reshape(-1).tolist()
    shape = view.type_of(node.input[0]).shape
    last = [[-1]] if shape is None else [[-1], [len(shape) - 1]]
    return str(node.input[0]) if axes in last and keeps else ""


def _is_square(model: Model, view: GraphView, tensor: str, root: str) -> bool:
    factors = _operands(view, tensor, "Mul")
    if len(factors) == 2 and factors[0] == factors[1]:
        return _same(model, view, factors[0], root)
    power = _operands(view, tensor, "Pow")
    if len(power) != 2 or _number(model, view, power[1]) != 2:
        return False
    return _same(model, view, power[0], root)


def _same(model: Model, view: GraphView, one: str, other: str) -> bool:
    """Whether two tensors are one, or both one tensor minus its mean."""
    if one == other:
        return True
    centred = _uncentred(model, view, one)
    return bool(centred) and centred == _uncentred(model, view, other)


def _uncentred(model: Model, view: GraphView, tensor: str) -> str:
    """The tensor from which its mean was taken to make this one, or ''."""
    parts = _operands(view, tensor, "Sub")
    return parts[0] if len(parts) == 2 and _mean(model, view, parts[1]) == parts[0] else ""


def _bias(
    view: GraphView, tensor: str, dims: tuple[int, ...]
) -> tuple[onnx.NodeProto, int] | None:
    readers = view.readers(tensor)
    if len(readers) != 1 or readers[0].op_type != "Add" or tensor in view.outputs:
        return None
    add = readers[0]
    position = 1 - list(add.input).index(tensor)
    weight = find_weight(view, add.input[position])
    fits = weight is not None and weight.dims == dims and not slot_of(add)
    return (add, position) if fits else None


def _array(model: Model, view: GraphView, name: str) -> np.ndarray | None:
    stored = view.constant(name)
    try:
        return None if stored is None else read_tensor(model, stored)
    except ModelFileError:
        return None


def _number(model: Model, view: GraphView, name: str) -> float | None:
    value = _array(model, view, name)
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None
