"""A quantised model without the rounding of its activations, which moves in no steps."""

from __future__ import annotations

import onnx

from onnx_adapt.graph.gradients.backward import Way
from onnx_adapt.graph.index import index_model
from onnx_adapt.model.file import Model

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
    for node in result.proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in view.producers:
            continue
        before = view.nodes[view.producers[node.input[0]]]
        if before.op_type != "QuantizeLinear":
            continue
        if view.constant(before.input[0]) is not None:
            continue
        if view.type_of(before.input[0]).elem_type != view.type_of(node.output[0]).elem_type:
            continue
        node.op_type, node.domain = "Identity", ""
        del node.attribute[:]
        del node.input[:]
        node.input.append(before.input[0])
        found += 1
    return result, found


def node_that_rounds(way: Way) -> onnx.NodeProto | None:
    """The first node between weights and a loss that rounds."""
    return next((node for node in way.nodes if node.op_type in _ROUNDING), None)
