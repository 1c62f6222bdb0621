"""The measure of a base's own roundings."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_adapt.model.file import Model
from onnx_adapt.ort import CPU
from onnx_adapt.proof.roundings import beyond, perturbed
from onnx_adapt.proof.runner import Runner


def _rms_norm(dtype: type) -> Model:
    """`x / sqrt(mean(x ** 2) + epsilon) * gain`, as exporters write it."""
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["squared"]),
        helper.make_node("ReduceMean", ["squared"], ["mean"], axes=[-1]),
        helper.make_node("Add", ["mean", "epsilon"], ["variance"]),
        helper.make_node("Sqrt", ["variance"], ["deviation"]),
        helper.make_node("Div", ["x", "deviation"], ["normed"]),
        helper.make_node("Mul", ["normed", "gain"], ["y"]),
    ]
    stored = {"two": np.array(2), "epsilon": np.array(1e-5), "gain": np.linspace(1, 2, 8)}
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", elem_type, [2, 8])],
        [helper.make_tensor_value_info("y", elem_type, [2, 8])],
        [numpy_helper.from_array(v.astype(dtype), k) for k, v in stored.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return Model(helper.make_model(graph, opset_imports=opsets, ir_version=9))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_moved_base_keeps_its_exponents_so_its_outputs_stay_numbers(dtype):
    # A negative number to the power of 2.0000002 is NaN.
    base = _rms_norm(dtype)
    feeds = {"x": np.linspace(-1, 1, 16).reshape(2, 8).astype(dtype)}
    for seed in range(8):
        (y,) = Runner(perturbed(base, seed), CPU, optimised=True).run(feeds).values()
        assert np.isfinite(y).all()


def test_a_moved_base_moves_weights_of_sums():
    base = _rms_norm(np.float32)
    gain = {t.name: t for t in perturbed(base, 0).proto.graph.initializer}["gain"]
    assert (numpy_helper.to_array(gain) != np.linspace(1, 2, 8).astype(np.float32)).any()
    assert gain.data_type == TensorProto.FLOAT


def test_a_run_that_gives_no_number_where_others_do_widens_and_narrows_nothing():
    known = [[{"y": np.array([1.0, 2.0])}], [{"y": np.array([1.1, 2.0])}]]
    broken = [{"y": np.array([np.nan, np.nan])}]
    got = [{"y": np.array([1.05, 2.05])}]
    assert beyond([*known, broken], got) == beyond(known, got)
    assert beyond([*known, broken], got).within


def test_the_largest_number_of_a_mask_stays_when_weights_move_by_rounding() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float16[n,4] x) => (float16[n,4] y) { y = Add(x, mask) }""")
    mask = np.array([0, np.finfo(np.float16).min, 1, -np.inf], np.float16)
    proto.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    moved = [perturbed(Model(proto), seed).proto.graph.initializer[0] for seed in range(8)]
    values = np.array([numpy_helper.to_array(tensor) for tensor in moved])
    assert (values[:, [0, 3]] == mask[[0, 3]]).all()
    assert np.isfinite(values[:, 1]).all()
    assert len(set(values[:, 2])) > 1
    assert np.abs(values[:, 2] - 1).max() < 3e-3


def test_a_rounding_that_is_not_finite_explains_nothing() -> None:
    one, two, broken = ([{"y": np.array([v, 1.0])}] for v in (1.0, 1.5, np.nan))
    assert beyond([one, two, broken], [{"y": np.array([1.9, 1.0])}]).within
    assert not beyond([one, two, broken], [{"y": np.array([2.1, 1.0])}]).within
    assert not beyond([one, two], broken).within


def test_codes_are_those_of_some_rounding_and_amounts_lie_near() -> None:
    one, two = ([{"y": np.array([v, 7])}] for v in (1, 9))
    assert beyond([one, two], [{"y": np.array([9, 7])}]).within
    assert not beyond([one, two], [{"y": np.array([5, 7])}]).within
    assert not beyond([one, two], [{"y": np.array([[9, 7]])}]).within
    small = [[{"y": np.array([v, 7], np.uint8)}] for v in (1, 2)]
    assert beyond(small, [{"y": np.array([1, 8], np.uint8)}]).within
    assert not beyond(small, [{"y": np.array([1, 9], np.uint8)}]).within
