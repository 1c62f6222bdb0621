"""The formula of slots on weights: its nodes in ONNX Runtime and its oracle, against numpy."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from slot_models import session
from weight_slots import changed

from onnx_adapt.dtypes import DTYPES, ELEM_TYPES
from onnx_adapt.errors import SlotError
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.form import WeightTarget, new_weight_slot
from onnx_adapt.slot.formula import slot_nodes
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.oracle import slot_bounded
from onnx_adapt.slot.parts import in_order
from onnx_adapt.slot.weights import bottleneck_of, fresh_weights, neutral_weights, part_shape

CASES = {
    "matrix": ((6, 10), ("down", "up")),
    "matrix, all parts": ((6, 10), ("down", "up", "scale", "gain")),
    "matrix, scaled": ((6, 10), ("scale",)),
    "stack": ((3, 6, 10), ("down", "up")),
    "stack, all parts": ((3, 6, 10), ("down", "up", "scale", "gain")),
    "stack, scaled": ((3, 6, 10), ("scale",)),
    "vector": ((10,), ("scale",)),
}


def slot_of(case: str, dtype: str = "float32") -> Slot:
    shape, parts = CASES[case]
    target = WeightTarget("main", "w", shape, dtype, "node", ("main:y",))
    return new_weight_slot("s", target, in_order(parts))


def run_nodes(slot: Slot, opset: int, feeds: dict[str, np.ndarray]) -> np.ndarray:
    kind = ELEM_TYPES[slot.dtype]
    graph = helper.make_graph(
        slot_nodes(slot, opset),
        "g",
        [helper.make_tensor_value_info(n, kind, v.shape) for n, v in feeds.items()],
        [helper.make_tensor_value_info(slot.output, kind, None)],
    )
    opsets = [helper.make_opsetid("", opset)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return session(proto).run(None, feeds)[0]


def drawn(slot: Slot, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        part: rng.standard_normal(part_shape(slot, part, size)).astype(DTYPES[slot.dtype])
        for part in slot.parts
    }


def named(slot: Slot, value: np.ndarray, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    return {slot.inner: value, **{slot.weight(part): w for part, w in weights.items()}}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("opset", [7, 11, 13, 17, 21, onnx.defs.onnx_opset_version()])
@pytest.mark.parametrize("case", CASES)
def test_nodes_and_oracle_equal_the_formula(case: str, opset: int, dtype: str) -> None:
    slot = slot_of(case, dtype)
    check_slot(slot, opset)
    weights = drawn(slot, 4)
    value = np.random.default_rng(9).standard_normal(slot.weight_shape).astype(dtype)
    wanted = changed(slot, value, weights)
    oracle = slot_bounded(slot, value, value, weights)
    np.testing.assert_allclose(oracle.value, wanted, 1e-12, 1e-12)
    got = run_nodes(slot, opset, named(slot, value, weights))
    assert got.dtype == dtype
    assert (np.abs(got.astype(np.float64) - wanted) <= oracle.bound).all()
    assert oracle.bound.max() < {"float64": 1e-13, "float32": 1e-4, "float16": 0.2}[dtype]


@pytest.mark.parametrize("case", CASES)
def test_empty_weights_give_the_weight_exactly(case: str) -> None:
    slot = slot_of(case)
    value = np.random.default_rng(9).standard_normal(slot.weight_shape).astype("f4")
    for size in (0, 1, 7):
        got = run_nodes(slot, 17, named(slot, value, neutral_weights(slot, size)))
        np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize("case", [case for case in CASES if "up" in CASES[case][1]])
def test_training_starts_from_the_base_s_weight(case: str) -> None:
    slot = slot_of(case)
    weights = fresh_weights(slot, 4, np.random.default_rng(0))
    assert bottleneck_of(slot, weights) == 4
    rows = slot.weight_shape[-2]
    assert 0.8 * rows**-0.5 < np.abs(weights["down"]).max() <= rows**-0.5
    value = np.random.default_rng(9).standard_normal(slot.weight_shape).astype("f4")
    got = run_nodes(slot, 17, named(slot, value, weights))
    np.testing.assert_array_equal(got, value)


def test_a_wrong_update_is_outside_of_the_bound() -> None:
    slot = slot_of("stack")
    weights = drawn(slot, 4)
    value = np.random.default_rng(9).standard_normal(slot.weight_shape).astype("f4")
    oracle = slot_bounded(slot, value, value, weights)
    swapped = dict(weights, up=np.roll(weights["up"], 10, axis=1))  # of another matrix
    got = run_nodes(slot, 17, named(slot, value, swapped))
    assert (np.abs(got - oracle.value) > oracle.bound).any()


@pytest.mark.parametrize(
    "change",
    [
        {"parts": ("down", "up", "up_bias")},
        {"activation": "relu"},
        {"axis": 1},
        {"width": 7},
        {"source_width": 7},
        {"norm_after": "term"},
        {"plus": "z"},
        {"batched": True},
        {"weight_shape": (2, 3, 6, 10)},
        {"weight_shape": (10,)},
    ],
)
def test_a_record_that_no_slot_on_a_weight_has_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SlotError):
        check_slot(replace(slot_of("matrix"), **change), 17)
