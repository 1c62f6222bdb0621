"""Every activation, element type and opset against formulas written here."""

import math

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from slot_models import session

from onnx_adapt.slot.activations import ACTIVATIONS, Emitter
from onnx_adapt.slot.bounds import ARITHMETIC, exact

NEWEST = onnx.defs.onnx_opset_version()

# Element type -> numpy type, ONNX type, tolerance relative to 1 + |y|, and the first
# opset whose MatMul and Add take it: before that no slot can have it.
KINDS = {
    "float32": (np.float32, onnx.TensorProto.FLOAT, 2e-6, 7),
    "float16": (np.float16, onnx.TensorProto.FLOAT16, 2e-3, 7),
    "float64": (np.float64, onnx.TensorProto.DOUBLE, 1e-13, 7),
    "bfloat16": (ml_dtypes.bfloat16, onnx.TensorProto.BFLOAT16, 2.5e-2, 13),
}


def _sigmoid(v: float) -> float:
    return 0.5 * (1 + math.tanh(v / 2))


def _log1pexp(v: float) -> float:
    return max(v, 0.0) + math.log1p(math.exp(-abs(v)))


# The published definitions, one number at a time: torch.nn.functional, and
# transformers.activations for quick_gelu and relu2.
FORMULAS = {
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
    "gelu_tanh": lambda v: (
        0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    ),
    "silu": lambda v: v * _sigmoid(v),
    "tanh": math.tanh,
    "sigmoid": _sigmoid,
    "leaky_relu": lambda v: v if v >= 0 else 0.01 * v,
    "quick_gelu": lambda v: v * _sigmoid(1.702 * v),
    "relu2": lambda v: max(v, 0.0) ** 2,
    "relu6": lambda v: min(max(v, 0.0), 6.0),
    "mish": lambda v: v * math.tanh(_log1pexp(v)),
    "identity": lambda v: v,
}

GRID = [*np.linspace(-12, 12, 997), 0.0, -0.0, 1e-4, -1e-4, 30.0, -30.0, 200.0, -200.0]


def _model(name: str, dtype: str, opset: int) -> onnx.ModelProto:
    """`x` through one activation and an Identity to `y`, of any number of axes."""
    emit = Emitter("slot", opset, dtype)
    out = ACTIVATIONS[name][0](emit, "x")
    elem_type = KINDS[dtype][1]
    graph = helper.make_graph(
        [*emit.nodes, helper.make_node("Identity", [out], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", elem_type, ["n", "m"])],
        [helper.make_tensor_value_info("y", elem_type, ["n", "m"])],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _grid(numpy_type: type) -> np.ndarray:
    # onnx.reference computes exp(200) for a sigmoid, which warns in bfloat16's range.
    return np.array([GRID[:-2] if numpy_type is ml_dtypes.bfloat16 else GRID], numpy_type)


def _run(model: onnx.ModelProto, x: np.ndarray, *, optimised: bool = False) -> np.ndarray:
    if x.dtype == ml_dtypes.bfloat16:  # ONNX Runtime has no CPU kernels for it
        return ReferenceEvaluator(model).run(None, {"x": x})[0]
    return session(model, optimised=optimised).run(None, {"x": x})[0]


def _expected(name: str, x: np.ndarray) -> np.ndarray:
    flat = [FORMULAS[name](float(v)) for v in x.astype(np.float64).flat]
    return np.array(flat, np.float64).reshape(x.shape)


def test_the_activations_are_those_that_the_project_promises() -> None:
    promised = "relu gelu gelu_tanh silu tanh sigmoid leaky_relu quick_gelu relu2 relu6 mish"
    assert set(ACTIVATIONS) == {*promised.split(), "identity"}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", FORMULAS)
def test_nodes_are_valid_in_every_opset(name: str, dtype: str) -> None:
    for opset in range(KINDS[dtype][3], NEWEST + 1):
        model = _model(name, dtype, opset)
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
        used = {types[out] for node in model.graph.node[:-1] for out in node.output}
        assert used <= {KINDS[dtype][1]}, opset


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", FORMULAS)
def test_nodes_equal_the_formula_in_every_opset(name: str, dtype: str) -> None:
    numpy_type, _, tolerance, oldest = KINDS[dtype]
    x = _grid(numpy_type)
    wanted = _expected(name, x)
    for opset in range(oldest, NEWEST + 1):
        got = _run(_model(name, dtype, opset), x)
        assert got.dtype == x.dtype
        off = np.abs(got.astype(np.float64) - wanted) / (1 + np.abs(wanted))
        assert off.max() <= tolerance, (opset, x[0, off.argmax()])


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("name", FORMULAS)
def test_nodes_equal_the_formula_when_onnxruntime_optimises(name: str, dtype: str) -> None:
    numpy_type, _, tolerance, _ = KINDS[dtype]
    x = _grid(numpy_type)
    wanted = _expected(name, x)
    for opset in (7, 8, 9, 10, 11, 12, 13, 16, 17, 20, 22, NEWEST):
        got = _run(_model(name, dtype, opset), x, optimised=True).astype(np.float64)
        assert np.max(np.abs(got - wanted) / (1 + np.abs(wanted))) <= tolerance, opset


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_zero_size_bottleneck_passes_through(name: str, dtype: str) -> None:
    numpy_type, _, _, oldest = KINDS[dtype]
    for opset in range(oldest, NEWEST + 1):
        got = _run(_model(name, dtype, opset), np.zeros((3, 0), numpy_type))
        assert (got.shape, got.dtype) == ((3, 0), np.dtype(numpy_type)), opset


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("name", [n for n in FORMULAS if n != "relu2"])
def test_numbers_near_the_largest_do_not_overflow(name: str, dtype: str) -> None:
    numpy_type, _, tolerance, oldest = KINDS[dtype]
    largest = float(np.finfo(numpy_type).max) * 0.9
    x = np.array([[largest, -largest, 1000.0, -1000.0]], numpy_type)
    bounds = {"tanh": 1.0, "sigmoid": 1.0, "relu6": 6.0}
    above = np.minimum(x, bounds.get(name, np.inf)).astype(np.float64)
    below = {"tanh": -1.0, "leaky_relu": 0.01, "identity": 1.0}.get(name, 0.0)
    negative = below if name == "tanh" else below * x.astype(np.float64)
    wanted = np.where(x > 0, above, negative)
    for opset in range(oldest, NEWEST + 1):
        got = _run(_model(name, dtype, opset), x).astype(np.float64)
        assert np.max(np.abs(got - wanted) / (1 + np.abs(wanted))) <= tolerance, opset


@pytest.mark.parametrize("name", FORMULAS)
def test_the_float64_oracle_equals_the_formula(name: str) -> None:
    x = np.array([GRID])
    found = ACTIVATIONS[name][1](exact(x, ARITHMETIC["float64"]))
    np.testing.assert_allclose(found.value, _expected(name, x), 1e-14, 1e-14)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_nan_stays_a_nan(name: str) -> None:
    x = np.array([[np.nan, 1.0]], np.float32)
    got = _run(_model(name, "float32", 17), x)
    assert np.isnan(got[0, 0])
    assert np.isfinite(got[0, 1])
    assert np.isnan(ACTIVATIONS[name][1](exact(x, ARITHMETIC["float32"])).value[0, 0])
