"""Every rule agrees with central differences in float64, however its inputs are broadcast."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from gradient_checks import differences, evaluator, gradient_model, open_rows, small_model

from onnx_adapt.dtypes import Array

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape)


def positive(*shape: int) -> Array:
    return np.abs(RNG.standard_normal(shape)) + 0.3


def apart(*shape: int) -> Array:
    """Numbers of which no two are close, none near 0, 1 or 3."""
    count = int(np.prod(shape))
    return (RNG.permutation(count) - count / 2 + 0.37).reshape(shape) / 3


def integers(*values: int) -> Array:
    return np.array(values, np.int64)


X, Y = normal(2, 3, 4), normal(3, 1)
BOOLS = np.array([[True, False, True, True]])
MATRIX = normal(5, 4)

POINTWISE = {
    **{
        op: ([normal(2, 3)], {})
        for op in ("Neg", "Exp", "Sin", "Cos", "Erf", "Sigmoid", "Tanh")
    },
    **{op: ([apart(3, 4)], {}) for op in ("Abs", "Relu", "LeakyRelu", "Elu", "Celu", "Selu")},
    **{op: ([normal(3, 4)], {}) for op in ("Softplus", "Softsign", "Mish", "Atan", "Asinh")},
    **{op: ([normal(4)], {}) for op in ("Identity", "Tan", "Sinh", "Cosh")},
    **{op: ([np.array([-0.5, 0.1, 0.7])], {}) for op in ("Asin", "Acos")},
    **{op: ([positive(3, 2)], {}) for op in ("Reciprocal", "Log", "Sqrt")},
    "Dropout": ([normal(3, 4)], {}),
    "HardSigmoid": ([apart(4, 4)], {}),
    "HardSwish": ([apart(4, 5)], {}),
    "ThresholdedRelu": ([apart(4, 4)], {"alpha": 0.5}),
    "Clip": ([apart(4, 4), np.array(-1.0), np.array(1.2)], {}),
    "Gelu": ([normal(3, 4)], {}),
    "Gelu tanh": ([normal(3, 4)], {"approximate": "tanh"}),
    "Swish": ([normal(3, 4)], {"alpha": 1.3, "opset": 24}),
}
BINARY = {
    **{
        f"{op} {kind}": (arrays, {})
        for op in ("Add", "Sub", "Mul", "Max", "Min")
        for kind, arrays in {
            "alike": [normal(2, 3), normal(2, 3)],
            "broadcast": [X, Y],
            "the other way": [normal(4), X],
            "number": [normal(), X],
        }.items()
    },
    "Div": ([X, positive(3, 1)], {}),
    "Div number": ([normal(), positive(2, 3)], {}),
    "Pow": ([positive(2, 3), normal(3)], {}),
    "Pow number": ([positive(2, 3), np.array(2.0)], {}),
    "Sum": ([X, Y, normal(4)], {}),
    "Max of three": ([X, Y, normal(4)], {}),
    "Where": ([BOOLS, X, Y], {}),
    "PRelu": ([apart(2, 3, 4), positive(3, 1)], {}),
}
PRODUCTS = {
    "MatMul": ([normal(3, 4), normal(4, 2)], {}),
    "MatMul stack by matrix": ([normal(2, 3, 4), normal(4, 5)], {}),
    "MatMul stacks": ([normal(2, 3, 4), normal(2, 4, 5)], {}),
    "MatMul broadcast": ([normal(2, 1, 3, 4), normal(5, 4, 2)], {}),
    "MatMul matrix by stack": ([normal(3, 4), normal(2, 4, 5)], {}),
    "MatMul vectors": ([normal(4), normal(4)], {}),
    "MatMul by vector": ([normal(2, 3, 4), normal(4)], {}),
    "MatMul of vector": ([normal(4), normal(2, 4, 3)], {}),
    **{
        f"Gemm {a}{b}": (
            [
                normal(*((4, 3) if a else (3, 4))),
                normal(*((5, 4) if b else (4, 5))),
                normal(5),
            ],
            {"transA": a, "transB": b, "alpha": 0.5, "beta": 2.0},
        )
        for a in (0, 1)
        for b in (0, 1)
    },
    "Einsum": ([normal(2, 3, 4), normal(2, 4, 5)], {"equation": "bij,bjk->bik"}),
    "Einsum summed": ([normal(2, 3, 4), normal(4, 5)], {"equation": "bij,jk->ik"}),
    "Einsum three": ([normal(2, 3), normal(3, 4), normal(4)], {"equation": "ij,jk,k->i"}),
}
REDUCTIONS = {
    **{
        f"{op} {kind}": ([positive(2, 3, 4), axes], more)
        for op in (
            *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceLogSumExp"),
            *("ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum"),
        )
        for kind, axes, more in (
            ("all", None, {"keepdims": 0}),
            ("one", integers(1), {"keepdims": 0}),
            ("two", integers(0, -1), {}),
            ("none", None, {"noop_with_empty_axes": 1}),
        )
        if kind != "none" or op in ("ReduceSum", "ReduceMean")
    },
    "Softmax": ([normal(2, 3, 4)], {}),
    "Softmax axis": ([normal(2, 3, 4)], {"axis": 1}),
    "LogSoftmax": ([normal(2, 3)], {}),
    "CumSum": ([normal(3, 4), np.array(1)], {}),
    "CumSum reverse": ([normal(3, 4), np.array(0)], {"reverse": 1, "exclusive": 1}),
    "TopK": ([apart(3, 5), integers(2)], {"axis": 1, "outputs": 2}),
}
NORMS = {
    "LayerNormalization": ([normal(2, 3, 4), normal(4), normal(4)], {}),
    "LayerNormalization two axes": (
        [normal(2, 3, 4), normal(3, 4), normal(3, 4)],
        {"axis": 1, "epsilon": 1e-3},
    ),
    "LayerNormalization no bias": ([normal(2, 4), normal(4)], {}),
    "RMSNormalization": ([normal(2, 3, 4), normal(4)], {"opset": 23}),
    "BatchNormalization": (
        [normal(2, 3, 4), normal(3), normal(3), normal(3), positive(3)],
        {"trains": (0, 1, 2)},
    ),
    "InstanceNormalization": ([normal(2, 3, 4, 2), normal(3), normal(3)], {}),
    "LpNormalization": ([normal(2, 3, 4)], {"axis": 1}),
}
MOVING = {
    "Reshape": ([normal(2, 6), integers(3, -1)], {}),
    "Flatten": ([normal(2, 3, 4)], {}),
    "Squeeze": ([normal(2, 1, 3), integers(1)], {}),
    "Unsqueeze": ([normal(2, 3), integers(0, 2)], {}),
    "Transpose": ([normal(2, 3, 4)], {"perm": [2, 0, 1]}),
    "Transpose all": ([normal(2, 3, 4)], {}),
    "Expand": ([normal(3, 1), integers(2, 3, 4)], {}),
    "Tile": ([normal(2, 3), integers(2, 3)], {}),
    "Concat": ([normal(2, 3), normal(2, 1), normal(2, 2)], {"axis": -1}),
    "Split": ([normal(2, 6), integers(1, 5)], {"axis": 1, "outputs": 2}),
    "Pad": ([normal(2, 3), integers(0, 1, 2, 0)], {}),
    "Pad cuts": ([normal(4, 3), integers(-1, 1, -1, 0)], {}),
    "Pad axes": ([normal(2, 3), integers(1, 2), None, integers(1)], {}),
    "Gather": ([normal(5, 3), np.array([[0, 4], [4, -1]])], {}),
    "Gather axis": ([normal(2, 5, 3), integers(3, 3, 0)], {"axis": 1}),
    "Gather one": ([normal(2, 5, 3), np.array(0)], {"axis": 1}),
    "GatherElements": ([normal(3, 4), np.array([[0, 2], [1, 1], [3, 0]])], {"axis": 1}),
    "GatherND": ([normal(3, 4), np.array([[0, 1], [0, 1], [2, 3]])], {}),
    "ScatterND": ([normal(4, 3), np.array([[0], [2]]), normal(2, 3)], {}),
    "ScatterND add": (
        [normal(4, 3), np.array([[0], [0]]), normal(2, 3)],
        {"reduction": "add"},
    ),
    "ScatterElements": (
        [normal(3, 4), np.array([[0, 2], [1, 3]]), normal(2, 2)],
        {"axis": 1},
    ),
    "Slice": ([normal(4, 5), integers(1, 0), integers(3, 4), integers(0, 1)], {}),
    "Slice steps": (
        [normal(4, 7), integers(-1, 1), integers(-9, 9), integers(0, 1), integers(-2, 3)],
        {},
    ),
    "Slice first axes": ([normal(4, 5), integers(1), integers(9)], {}),
    "DepthToSpace": ([normal(1, 8, 2, 3)], {"blocksize": 2}),
    "SpaceToDepth": ([normal(1, 2, 4, 6)], {"blocksize": 2}),
}
CONVOLUTIONS = {
    "Conv": ([normal(2, 3, 5), normal(4, 3, 3), normal(4)], {"pads": [1, 1]}),
    "Conv strides": (
        [normal(1, 2, 6, 7), normal(3, 2, 3, 2)],
        {"strides": [2, 3], "pads": [1, 0, 0, 1]},
    ),
    "Conv dilations": (
        [normal(1, 2, 7, 6), normal(3, 2, 2, 3)],
        {"dilations": [3, 2], "strides": [2, 1]},
    ),
    "Conv groups": (
        [normal(1, 4, 5), normal(6, 2, 3)],
        {"group": 2, "strides": [2], "trains": (0,)},
    ),
    "Conv same": (
        [normal(1, 2, 6, 5), normal(3, 2, 3, 3)],
        {"auto_pad": "SAME_UPPER", "strides": [2, 2], "trains": (0,)},
    ),
    "Conv same lower": (
        [normal(1, 2, 6), normal(3, 2, 4)],
        {"auto_pad": "SAME_LOWER", "trains": (0,)},
    ),
    "ConvTranspose": (
        [normal(1, 2, 4), normal(2, 3, 3)],
        {"strides": [2], "pads": [1, 0], "output_padding": [1], "trains": (0,)},
    ),
    "MaxPool": ([apart(1, 2, 6, 5)], {"kernel_shape": [3, 2], "strides": [2, 1]}),
    "MaxPool padded": ([apart(1, 2, 5, 4)], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0]}),
    "AveragePool": (
        [normal(1, 2, 6, 5)],
        {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]},
    ),
    "AveragePool counted": (
        [normal(1, 2, 6)],
        {"kernel_shape": [3], "pads": [1, 1], "count_include_pad": 1},
    ),
    "GlobalAveragePool": ([normal(2, 3, 4, 2)], {}),
    "GlobalMaxPool": ([apart(2, 3, 4, 2)], {}),
}
CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    **POINTWISE,
    **BINARY,
    **PRODUCTS,
    **REDUCTIONS,
    **NORMS,
    **CONVOLUTIONS,
    **MOVING,
}


def _trained(case: str) -> tuple[Any, list[str], dict[str, Array], dict[str, Any]]:
    arrays, more = CASES[case]
    more = dict(more)
    floats = [i for i, a in enumerate(arrays) if a is not None and a.dtype.kind == "f"]
    trains = more.pop("trains", floats)
    if case.split()[0] in ("Clip",):
        trains = [0]
    feeds = {f"x{i}": arrays[i] for i in floats}
    return arrays, [f"x{i}" for i in trains], feeds, more


@pytest.mark.parametrize("case", [case for case in CASES if case not in CONVOLUTIONS])
@pytest.mark.parametrize("open_axes", [False, True], ids=["fixed", "open"])
def test_a_rule_agrees_with_differences(case: str, open_axes: bool) -> None:
    arrays, weights, feeds, more = _trained(case)
    proto = small_model(case.split()[0], arrays, open_axes=open_axes, **more)
    model, _ = gradient_model(proto, weights)
    grads = evaluator(model).run(None, feeds)[1:]
    for name, grad in zip(weights, grads, strict=True):
        wanted = differences(proto, feeds, name)
        assert grad.shape == wanted.shape
        np.testing.assert_allclose(grad, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_a_rule_agrees_with_differences_in_onnx_runtime(case: str) -> None:
    """In float32; ONNX's own evaluator has no whole convolutions."""
    arrays, weights, feeds, more = _trained(case)
    exact = small_model(case.split()[0], arrays, **more)
    single = [
        a.astype(np.float32) if a is not None and a.dtype.kind == "f" else a for a in arrays
    ]
    proto = small_model(case.split()[0], single, open_axes=case not in CONVOLUTIONS, **more)
    if case in CONVOLUTIONS:
        open_rows(proto)
    model, _ = gradient_model(proto, weights)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = {value.name for value in session.get_inputs()}
    given = {k: v.astype(np.float32) for k, v in feeds.items() if k in names}
    for name, grad in zip(weights, session.run(None, given)[1:], strict=True):
        wanted = differences(exact, feeds, name)
        assert grad.shape == wanted.shape
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=2e-5)
