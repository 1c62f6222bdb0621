"""Every rule and every lowering gives the gradients that PyTorch gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from gradient_checks import as_model
from onnx import helper, numpy_helper, parser

from onnx_adapt.dtypes import Array
from onnx_adapt.graph.gradients.lowering import LOWERED
from onnx_adapt.graph.gradients.prepare import index_for_gradients, prepare
from onnx_adapt.graph.gradients.reverse import differentiate
from onnx_adapt.graph.gradients.table import RULES

with np.load(Path(__file__).with_name("truths.npz")) as stored:
    CASES = {item["name"]: item for item in json.loads(stored["index"].tobytes())}
    FLOATS, COUNTS = stored["floats"], stored["counts"]


def _array(place: list[Any]) -> Array:
    start, shape, kind = place
    flat = (FLOATS if kind == "float32" else COUNTS)[start : start + int(np.prod(shape))]
    return flat.astype(kind).reshape(shape)


def _nodes(item: dict[str, Any], inputs: list[str]) -> list[onnx.NodeProto]:
    if item["text"]:
        return list(parser.parse_graph(f"g () => () {{ {item['text']} }}").node)
    outputs = [f"y{k}" for k in range(item["outputs"])]
    return [
        helper.make_node(
            item["op"], inputs, outputs, "node", domain=item["domain"], **item["attributes"]
        )
    ]


def _model(item: dict[str, Any]) -> onnx.ModelProto:
    """The node, and a loss: the sum of its outputs times the gradient given to PyTorch."""
    inputs, constants, names = [], [], []
    for k, place in enumerate(item["inputs"]):
        names.append("" if place is None else f"x{k}")
        if k in item["wrt"]:
            shape = [f"x{k}_{axis}" for axis in range(len(place[1]))]
            shape = place[1] if item["op"] in _FIXED else shape
            inputs.append(helper.make_tensor_value_info(f"x{k}", 1, shape))
        elif place is not None:
            constants.append(numpy_helper.from_array(_array(place), f"x{k}"))
    nodes, terms = _nodes(item, names), []
    for number, place in zip(item["shown"], item["given"], strict=True):
        constants.append(numpy_helper.from_array(_array(place), f"given{number}"))
        product, term = f"product{number}", f"term{number}"
        nodes.append(helper.make_node("Mul", [f"y{number}", f"given{number}"], [product]))
        nodes.append(helper.make_node("ReduceSum", [product], [term], keepdims=0))
        terms.append(term)
    nodes.append(helper.make_node("Sum", terms, ["loss"]))
    outputs = [helper.make_tensor_value_info("loss", 1, [])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    sets = [helper.make_opsetid("", item["opset"]), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10)


_FIXED = {
    *("Conv", "ConvTranspose", "FusedConv", "ConvInteger", "QLinearConv"),
    *("QLinearAveragePool", "Attention", "MultiHeadAttention", "GroupQueryAttention"),
    *("LSTM", "GRU", "RNN", "GroupNormalization", "FusedMatMul"),
}
"""Operators whose cases have inputs of a fixed size, because a rule needs some size."""


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_that_of_pytorch(name: str) -> None:
    item = CASES[name]
    weights = [f"x{k}" for k in item["wrt"]]
    prepared = prepare(as_model(_model(item)), ["loss"], weights)
    found = differentiate(index_for_gradients(prepared, "loss", weights, {}), "loss", weights)
    proto = prepared.proto
    proto.graph.node.extend(found.nodes)
    proto.graph.initializer.extend(found.constants)
    proto.graph.output.extend(
        helper.make_empty_tensor_value_info(found.grads[weight]) for weight in weights
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {f"x{k}": _array(item["inputs"][k]) for k in item["wrt"]}
    read = {value.name for value in session.get_inputs()}
    made = session.run(None, {key: value for key, value in feeds.items() if key in read})[1:]
    for grad, place in zip(made, item["grads"], strict=True):
        wanted = _array(place)
        assert grad.shape == wanted.shape
        np.testing.assert_allclose(grad, wanted, rtol=2e-5, atol=2e-5)


def test_every_operator_of_the_tables_has_values_of_pytorch() -> None:
    held = {node.op_type for item in CASES.values() for node in _nodes(item, [])}
    assert (RULES.keys() | LOWERED.keys()) - held == set()
