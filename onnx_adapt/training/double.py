"""A model in float64 on the way from weights to a loss, for differences that are sharp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from onnx_adapt.dtypes import Array
from onnx_adapt.graph.gradients.reverse import find_way
from onnx_adapt.graph.index import GraphView, index_model
from onnx_adapt.model.file import Model
from onnx_adapt.ort import CPU
from onnx_adapt.proof.runner import Runner
from onnx_adapt.training.frozen import cut

DOUBLE = onnx.TensorProto.DOUBLE

_NARROW = {
    *(onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16),
}
"""The element types that become float64."""

IN_DOUBLE = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Pow", "Sqrt", "Reciprocal", "Sum"),
        *("Exp", "Log", "Sin", "Cos", "Tanh", "Sigmoid", "Relu", "Celu", "Clip", "Max", "Min"),
        *("MatMul", "Gemm", "Einsum", "LSTM", "GRU", "Where", "Identity", "Cast", "CumSum"),
        *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1"),
        *("ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
        *("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization"),
        *("BatchNormalization", "LpNormalization", "MaxPool", "Dropout", "TopK"),
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile"),
        *("Concat", "Split", "Slice", "Pad", "Gather", "GatherElements", "GatherND"),
        *("ScatterElements", "ScatterND", "Trilu", "DepthToSpace", "SpaceToDepth"),
    }
)
"""Operators that ONNX Runtime has in float64 on the CPU; others stay in float32."""


def double_name(tensor: str) -> str:
    """The name of a tensor in float64."""
    return f"{tensor}:float64"


def in_double(model: Model, loss: str, weights: Sequence[str]) -> Model:
    """A model that computes a loss in float64 from weights in float64.

    Every node between them is computed in float64 if ONNX Runtime can. What does not depend
    on the weights stays as it is. An example, with `Erf` in float32 only:

        h = MatMul(x, w)   ->   w = Cast(w:float64), x:float64 = Cast(x),
                                h:float64 = MatMul(x:float64, w:float64), h = Cast(h:float64)
        y = Erf(h)         ->   y = Erf(h)
        loss = ReduceSum(y) ->  y:float64 = Cast(y), loss:float64 = ReduceSum(y:float64), ...

    Args:
        model: The forward model.
        loss: A tensor of its main graph with one number.
        weights: Inputs of its main graph.

    Returns:
        The model, whose inputs and output of these have the names of `double_name`.
    """
    view = index_model(model).main
    way = find_way(view, loss, weights)
    wide = _Widening(view)
    made = {node.output[0] for node in way.nodes}
    for weight in weights:
        wide.known.add(weight)
        wide.narrow(weight)
    result = model.copy()
    graph = result.proto.graph
    for node in graph.node:
        on_way = bool(node.output) and node.output[0] in made
        if on_way and node.op_type in IN_DOUBLE and node.domain in ("", "ai.onnx"):
            wide.widen(node)
        else:
            wide.nodes.append(node)
    wide.double(loss)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in wide.nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in graph.input:
        if value.name in weights:
            value.name = double_name(value.name)
            value.type.tensor_type.elem_type = DOUBLE
    del graph.output[:], result.proto.metadata_props[:]  # the slots have other inputs now
    graph.output.append(helper.make_tensor_value_info(double_name(loss), DOUBLE, []))
    return result


class DoubleLoss:
    """A loss in float64 with one set of inputs, for many values of the weights.

    What is before the first of the weights is computed once.

    Args:
        model: The forward model.
        loss: A tensor of its main graph with one number.
        weights: Inputs of its main graph, which move.
        feeds: The inputs, and all weights.
    """

    def __init__(
        self, model: Model, loss: str, weights: Sequence[str], feeds: Mapping[str, Array]
    ) -> None:
        self._loss = double_name(loss)
        moving = [double_name(name) for name in weights]
        wide = in_double(model, loss, weights)
        self._feeds = {
            double_name(name) if name in weights else name: (
                value.astype(np.float64) if name in weights else value
            )
            for name, value in feeds.items()
        }
        parts = cut(wide, [self._loss], moving)
        if parts is not None:
            frozen = Runner(parts.frozen, CPU, optimised=True, fuse_quantised=False)
            values = frozen.run(_read(parts.frozen, self._feeds), parts.kept)
            wide = parts.rest(values)
            self._feeds |= values
        self._feeds = _read(wide, self._feeds)
        self._runner = Runner(wide, CPU, optimised=True, fuse_quantised=False)

    def weight(self, name: str) -> Array:
        """The value of a weight that does not move."""
        return self._feeds[double_name(name)]

    def at(self, name: str, value: Array) -> float:
        """The loss with one weight moved."""
        feeds = {**self._feeds, double_name(name): value}
        return float(self._runner.run(feeds, [self._loss])[self._loss])


def _read(model: Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What a model reads of some feeds."""
    inputs = {value.name for value in model.proto.graph.input}
    return {name: value for name, value in feeds.items() if name in inputs}


@dataclass(slots=True)
class _Widening:
    """The nodes of a graph while some are rewritten.

    Attributes:
        view: The graph before.
        nodes: The nodes so far.
        known: The tensors that are there in float64.
    """

    view: GraphView
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    def widen(self, node: onnx.NodeProto) -> None:
        """Add a node in float64."""
        wide = onnx.NodeProto()
        wide.CopyFrom(node)
        for position, name in enumerate(node.input):
            if self._is_narrow(name):
                wide.input[position] = self.double(name)
        for item in wide.attribute:
            if node.op_type == "Cast" and item.name == "to" and item.i in _NARROW:
                item.i = DOUBLE
        outputs = [name for name in node.output if self._is_narrow(name)]
        for position, name in enumerate(node.output):
            if name in outputs:
                wide.output[position] = double_name(name)
        self.nodes.append(wide)
        for name in outputs:
            self.known.add(name)
            self.narrow(name)

    def double(self, name: str) -> str:
        """A tensor in float64."""
        if name not in self.known:
            self.known.add(name)
            self._cast(name, double_name(name), DOUBLE)
        return double_name(name)

    def narrow(self, name: str) -> None:
        """Make a tensor in its own type again, for those that read it so."""
        self._cast(double_name(name), name, self.view.type_of(name).elem_type)

    def _is_narrow(self, name: str) -> bool:
        return bool(name) and self.view.type_of(name).elem_type in _NARROW

    def _cast(self, source: str, result: str, elem_type: int) -> None:
        label = f"cast:{result}:{len(self.nodes)}"
        node = helper.make_node("Cast", [source], [result], label, to=elem_type)
        self.nodes.append(node)
