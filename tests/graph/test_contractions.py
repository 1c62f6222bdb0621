"""Which axis of a stack of matrices a graph sums over."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_adapt as oa
from onnx_adapt.graph.contractions import summed_axis
from onnx_adapt.graph.index import index_model

node = helper.make_node


def axis_of(*nodes: onnx.NodeProto) -> int | None:
    """The axis of `w (3, 4, 4)` that nodes sum over, which make `y` of `x` and `w`."""
    stored = {"w": np.ones((3, 4, 4), "f4"), "i": np.array([1, 0]), "one": np.array(1)}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = oa.Model(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    return summed_axis(index_model(model).main, "w")


TURN: dict[str, Any] = {"perm": [0, 2, 1]}


@pytest.mark.parametrize(
    ("nodes", "axis"),
    [
        ([node("MatMul", ["x", "w"], ["y"])], -2),
        ([node("MatMul", ["w", "x"], ["y"])], -1),
        ([node("Transpose", ["w"], ["v"], **TURN), node("MatMul", ["x", "v"], ["y"])], -1),
        ([node("Transpose", ["w"], ["v"], **TURN), node("MatMul", ["v", "x"], ["y"])], -2),
        ([node("Gather", ["w", "i"], ["v"]), node("MatMul", ["x", "v"], ["y"])], -2),
        (
            [
                node("Gather", ["w", "one"], ["v"]),
                node("Transpose", ["v"], ["u"], perm=[1, 0]),
                node("MatMul", ["x", "u"], ["y"]),
            ],
            -1,
        ),
        (
            [node("Gather", ["w", "one"], ["v"]), node("Gemm", ["x", "v"], ["y"], transB=1)],
            -1,
        ),
        ([node("Gather", ["w", "one"], ["v"]), node("Gemm", ["x", "v"], ["y"])], -2),
        ([node("Einsum", ["x", "w"], ["y"], equation="td,edf->etf")], -2),
        ([node("Einsum", ["x", "w"], ["y"], equation="etf,edf->etd")], -1),
    ],
)
def test_the_readers_tell_the_axis(nodes: list[onnx.NodeProto], axis: int) -> None:
    assert axis_of(*nodes) == axis


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Add", ["x", "w"], ["y"])],
        [node("Einsum", ["x", "w"], ["y"], equation="td,edf->etdf")],
        [node("Einsum", ["x", "w"], ["y"], equation="t,edf->et")],
        [node("Gather", ["w", "i"], ["v"], axis=1), node("MatMul", ["x", "v"], ["y"])],
        [node("Transpose", ["w"], ["v"], perm=[2, 1, 0]), node("MatMul", ["x", "v"], ["y"])],
        [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["w", "a"], ["y"])],
    ],
)
def test_other_readers_tell_nothing(nodes: list[onnx.NodeProto]) -> None:
    assert axis_of(*nodes) is None
