"""Rules for quantised layers use the weight that ONNX Runtime multiplies by."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from gradient_checks import gradient_model
from onnx import helper, numpy_helper

from onnx_adapt.dtypes import Array
from onnx_adapt.graph.gradients.quantised import QUANTISED

RNG = np.random.default_rng(5)
X = RNG.standard_normal((3, 32)).astype(np.float32)
WEIGHTS = {
    "scale": np.abs(RNG.standard_normal(8 * 2)).astype(np.float32),
    "packed": RNG.integers(0, 256, (8, 2, 8), dtype=np.uint8),
    "absmax": np.abs(RNG.standard_normal(16)).astype(np.float32),
    "flat": RNG.integers(0, 256, 8 * 32 // 2, dtype=np.uint8),
    "zeros": RNG.integers(0, 256, 8, dtype=np.uint8),
    "int8": RNG.integers(-99, 99, (32, 8), dtype=np.int8),
    "step": np.abs(RNG.standard_normal(8)).astype(np.float32) / 50,
    "x_step": np.array(0.5, np.float32),
    "x_zero": np.array(3, np.int8),
    "matrix": RNG.standard_normal((32, 8)).astype(np.float32),
    "row": RNG.standard_normal(8).astype(np.float32),
    "kernel": RNG.standard_normal((4, 2, 3)).astype(np.float32),
    "int8_kernel": RNG.integers(-99, 99, (4, 2, 3), dtype=np.int8),
    "apart": np.array([3, 2, 16], np.int64),
}
NBITS = {"K": 32, "N": 8, "bits": 4, "block_size": 16}
BNB4 = {"K": 32, "N": 8, "block_size": 16}


def model_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Nodes from `x` to `y`, and a loss: the sum of the outputs, each with a weight."""
    uses = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(WEIGHTS[k], k) for k in sorted(uses & WEIGHTS.keys())]
    graph = helper.make_graph(
        [*nodes],
        "g",
        [helper.make_tensor_value_info("x", 1, X.shape)],
        [helper.make_empty_tensor_value_info("y")],
        constants,
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10)


def run(model: onnx.ModelProto, x: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})


def grads_of(model: onnx.ModelProto, x: Array) -> tuple[Array, Array]:
    """The weights of the outputs in the loss, and the gradient of the input."""
    (y,) = run(model, x)
    weights = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    del model.graph.output[:]
    model.graph.initializer.append(numpy_helper.from_array(weights, "in_loss"))
    model.graph.node.extend(
        [
            helper.make_node("Mul", ["y", "in_loss"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted"], ["loss"], keepdims=0),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("loss", 1, []))
    _, grad = run(gradient_model(model, ["x"])[0], x)
    return weights, grad


def node(op: str, inputs: str, outputs: str = "y", **attributes: object) -> onnx.NodeProto:
    domain = "com.microsoft" if op.startswith(("MatMulN", "MatMulB", "Fused")) else ""
    return helper.make_node(op, inputs.split(), outputs.split(), domain=domain, **attributes)


@pytest.mark.parametrize(
    "layer",
    [
        node("MatMulNBits", "x packed scale", **NBITS),
        node("MatMulNBits", "x packed scale zeros", **NBITS),
        node("MatMulBnb4", "x flat absmax", quant_type=0, **BNB4),
        node("MatMulBnb4", "x flat absmax", quant_type=1, **BNB4),
    ],
    ids=["nbits", "nbits with zero points", "fp4", "nf4"],
)
def test_a_packed_layer_passes_gradients_through_the_weight_it_multiplies_by(
    layer: onnx.NodeProto,
) -> None:
    """A linear layer of an identity matrix shows its weight."""
    shown = model_of(layer)
    shown.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
    (weight,) = run(shown, np.eye(32, dtype=np.float32))
    dy, grad = grads_of(model_of(layer), X)
    np.testing.assert_allclose(grad, dy @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_weight_in_int8_passes_gradients_through_as_its_floats_do() -> None:
    model = model_of(
        node("DequantizeLinear", "int8 step", "w", axis=1), node("MatMul", "x w", "y")
    )
    dy, grad = grads_of(model, X)
    floats = WEIGHTS["int8"].astype(np.float32) * WEIGHTS["step"]
    np.testing.assert_allclose(grad, dy @ floats.T, rtol=1e-5, atol=1e-5)


def test_rounded_numbers_get_the_gradient_of_what_was_rounded_and_cut_off_ones_none() -> None:
    model = model_of(
        node("QuantizeLinear", "x x_step x_zero", "q"),
        node("DequantizeLinear", "q x_step x_zero", "y"),
    )
    x = X * 40
    dy, grad = grads_of(model, x)
    inside = (np.rint(x / 0.5) + 3 >= -128) & (np.rint(x / 0.5) + 3 <= 127)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(grad, np.where(inside, dy, 0))


def test_a_matmul_of_integers_counts_as_one_of_the_numbers_that_were_rounded() -> None:
    model = model_of(
        node("DynamicQuantizeLinear", "x", "q size zero"),
        node("MatMulInteger", "q int8 zero", "sum"),
        helper.make_node("Cast", ["sum"], ["floats"], to=1),
        node("Mul", "floats size", "scaled"),
        node("Mul", "scaled step", "y"),
    )
    dy, grad = grads_of(model, X)
    floats = WEIGHTS["int8"].astype(np.float32) * WEIGHTS["step"]
    np.testing.assert_allclose(grad, dy @ floats.T, rtol=1e-4, atol=1e-4)


def test_a_convolution_of_integers_counts_as_one_of_the_numbers_that_were_rounded() -> None:
    whole = model_of(
        node("Reshape", "x apart", "rows"),
        node("DynamicQuantizeLinear", "rows", "q size zero"),
        node("ConvInteger", "q int8_kernel zero", "sum", pads=[1, 1]),
        helper.make_node("Cast", ["sum"], ["floats"], to=1),
        node("Mul", "floats size", "y"),
    )
    floats = model_of(
        node("Reshape", "x apart", "rows"),
        helper.make_node("Cast", ["int8_kernel"], ["k"], to=1),
        node("Conv", "rows k", "y", pads=[1, 1]),
    )
    np.testing.assert_allclose(
        grads_of(whole, X)[1], grads_of(floats, X)[1], rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "Sigmoid"])
@pytest.mark.parametrize("op", ["Gemm", "Conv"])
def test_an_activation_inside_a_layer_counts_as_one_behind_it(
    op: str, activation: str
) -> None:
    before = [node("Reshape", "x apart", "rows")] if op == "Conv" else []
    inputs = "rows kernel" if op == "Conv" else "x matrix row"
    fused = model_of(*before, node(f"Fused{op}", inputs, activation=activation))
    plain = model_of(*before, node(op, inputs, "inner"), node(activation, "inner"))
    np.testing.assert_allclose(
        grads_of(fused, X)[1], grads_of(plain, X)[1], rtol=1e-4, atol=1e-5
    )


def test_every_rule_for_a_quantised_or_fused_layer_is_tried_here() -> None:
    tried = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"}
    tried |= {"ConvInteger", "MatMulNBits", "MatMulBnb4", "FusedGemm", "FusedConv"}
    assert tried == QUANTISED.keys()
