"""A quantised model without the rounding of its activations, which moves in no steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_adapt.graph.gradients.backward import Way
from onnx_adapt.graph.gradients.quantised import RANGES
from onnx_adapt.graph.index import GraphView, index_model
from onnx_adapt.graph.names import free_name
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor

_ROUNDING = {
    *("DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv", "MatMulInteger"),
    *("ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QuantizeLinear"),
    *("QLinearAdd", "QLinearMul", "QGemm", "QAttention"),
}
"""Operators that round, so that a loss behind them moves in steps."""


def without_rounding(model: Model) -> tuple[Model, int]:
    """A model without the pairs of QuantizeLinear and DequantizeLinear on activations."""
    view = index_model(model).main
    result, found = model.copy(), 0
    for node, before in _pairs(view, result):
        _replace(node, "Identity", before.input[0])
        found += 1
    return result, found


def cut_off_alone(model: Model) -> Model | None:
    """A model whose pairs of QuantizeLinear and DequantizeLinear cut off, and do not round.

    Its gradient is the one that is passed straight through. An example: 8 bits with a step of
    0.1 and the zero point 0 become Clip from -12.85 to 12.75.

    Returns:
        The model, or None if it has no such pair with one range for all its numbers.
    """
    view = index_model(model).main
    result, found = model.copy(), False
    taken = {*view.producers, *view.constants}
    for node, before in _pairs(view, result):
        bounds = _bounds(model, view, before)
        if bounds is None:
            continue
        names = [free_name(f"{node.output[0]}_{end}", taken) for end in ("low", "high")]
        taken |= set(names)
        result.proto.graph.initializer.extend(
            numpy_helper.from_array(value, name)
            for name, value in zip(names, bounds, strict=True)
        )
        _replace(node, "Clip", before.input[0], *names)
        found = True
    return result if found else None


def _pairs(view: GraphView, result: Model) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Each DequantizeLinear of a copy on an activation, and the QuantizeLinear before it."""
    for node in result.proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in view.producers:
            continue
        before = view.nodes[view.producers[node.input[0]]]
        if before.op_type != "QuantizeLinear":
            continue
        if view.constant(before.input[0]) is not None:
            continue
        if view.type_of(before.input[0]).elem_type == view.type_of(node.output[0]).elem_type:
            yield node, before


def _replace(node: onnx.NodeProto, op: str, *inputs: str) -> None:
    node.op_type, node.domain = op, ""
    del node.attribute[:]
    del node.input[:]
    node.input.extend(inputs)


def _bounds(
    model: Model, view: GraphView, node: onnx.NodeProto
) -> tuple[np.ndarray, np.ndarray] | None:
    """What a QuantizeLinear cuts off at, if that is one range for all numbers."""
    stored = [view.constant(name) for name in node.input[1:3] if name]
    kind = view.type_of(node.output[0]).elem_type
    if None in stored or kind not in RANGES:
        return None
    scale, zero, *_ = [read_tensor(model, item) for item in stored if item] + [np.array(0)]
    if scale.size != 1 or zero.size != 1:
        return None
    low, high = (
        ((end - float(zero.item())) * scale.astype(np.float64)).astype(scale.dtype).reshape(())
        for end in (RANGES[kind][0] - 0.5, RANGES[kind][1] + 0.5)
    )
    return low, high


def node_that_rounds(way: Way) -> onnx.NodeProto | None:
    """The first node between weights and a loss that rounds."""
    return next((node for node in way.nodes if node.op_type in _ROUNDING), None)
