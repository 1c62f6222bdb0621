"""The slot formula: its nodes in ONNX Runtime and its oracle, against plain numpy."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from slot_formula import (
    CASES,
    CHANNEL_CASES,
    EPSILON,
    NORMS,
    PLAIN,
    RANK,
    SOURCE_WIDTH,
    WIDTH,
    base_norm,
    formula,
    run_nodes,
    shape,
    slot_of_case,
)

from onnx_adapt.errors import SlotError
from onnx_adapt.slot.bounds import ARITHMETIC, exact
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.formula import slot_nodes
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.oracle import Norm, slot_value
from onnx_adapt.slot.parts import PARTS, coupling_parts
from onnx_adapt.slot.weights import bottleneck_axis, fresh_weights, neutral_weights, part_shape


def _check(slot: Slot, opset: int, tolerance: float, dtype: Any = np.float32) -> None:
    """Nodes == formula == oracle, for random weights."""
    check_slot(slot, opset)
    rng = np.random.default_rng(opset)
    feeds = {"t": rng.standard_normal(shape(slot, WIDTH)).astype(dtype)}
    if slot.source == "x":
        feeds["x"] = rng.standard_normal(shape(slot, SOURCE_WIDTH)).astype(dtype)
    if slot.plus:
        feeds["z"] = rng.standard_normal(shape(slot, WIDTH)).astype(dtype)
    weights = {
        part: rng.standard_normal(part_shape(slot, part, RANK)).astype(dtype)
        for part in slot.parts
    }
    feeds |= {f"adapter.s.{part}": value for part, value in weights.items()}
    norm, given, oracle_norm = None, dict(feeds), None
    if slot.norm:
        norm, values = base_norm(dtype, rng)
        given |= dict(zip("gb", values, strict=True))
        oracle_norm = Norm(*(v.astype(np.float64) for v in values), epsilon=EPSILON)
    wanted = formula(slot, feeds, values if slot.norm else None)
    source, plus = feeds[slot.source], feeds.get(slot.plus)
    oracle = slot_value(slot, feeds["t"], source, weights, oracle_norm, plus)
    assert oracle.dtype == np.float64
    np.testing.assert_allclose(oracle, wanted, 1e-12, 1e-12)
    got = run_nodes(slot, opset, given, norm)
    assert got.dtype == dtype
    off = np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max()
    assert off <= tolerance


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 23, onnx.defs.onnx_opset_version()])
@pytest.mark.parametrize("case", CASES)
def test_nodes_and_oracle_equal_the_formula(case: str, opset: int) -> None:
    _check(slot_of_case(case), opset, 3e-6)


@pytest.mark.parametrize("opset", [7, 8, 9, 10])
@pytest.mark.parametrize("case", [case for case in CASES if case not in (*NORMS, "coupling")])
def test_old_opsets_have_everything_but_norms(case: str, opset: int) -> None:
    _check(slot_of_case(case), opset, 3e-6)


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("case", CASES)
def test_float64_slots_compute_in_float64(case: str, opset: int) -> None:
    _check(slot_of_case(case, dtype="float64"), opset, 2e-12, np.float64)


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("case", CASES)
def test_float16_slots_stay_in_float16(case: str, opset: int) -> None:
    _check(slot_of_case(case, dtype="float16"), opset, 1e-2, np.float16)


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_slots_stay_in_bfloat16(case: str, opset: int) -> None:
    _check(slot_of_case(case, dtype="bfloat16"), opset, 8e-2, ml_dtypes.bfloat16)


@pytest.mark.parametrize("opset", [7, 11, 17, 22])
@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("case", CHANNEL_CASES)
def test_on_a_channel_axis_the_formula_is_a_1x1_convolution(
    case: str, rank: int, opset: int
) -> None:
    slot = slot_of_case(case, axis=1, rank=rank)
    _check(slot, opset, 3e-6)
    assert {n.op_type for n in slot_nodes(slot, opset)} <= {
        "Conv",
        "Relu",
        "Tanh",
        "Mul",
        "Add",
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_neutral_weights_give_the_target_exactly(case: str, dtype: str) -> None:
    slot = slot_of_case(case, dtype=dtype)
    rng = np.random.default_rng(3)
    norm, values = base_norm(dtype, rng) if slot.norm else (None, [])
    for size in (0, 1, 7):
        feeds = {"t": (rng.standard_normal((2, 4, WIDTH)) * 100).astype(dtype)}
        if slot.source == "x":
            feeds["x"] = rng.standard_normal((2, 4, SOURCE_WIDTH)).astype(dtype)
        if slot.plus:
            feeds["z"] = rng.standard_normal((2, 4, WIDTH)).astype(dtype)
        neutral = neutral_weights(slot, size)
        assert {part: v.shape for part, v in neutral.items()} == {
            part: part_shape(slot, part, size) for part in slot.parts
        }
        feeds |= {f"adapter.s.{part}": value for part, value in neutral.items()}
        got = run_nodes(slot, 17, feeds | dict(zip("gb", values, strict=False)), norm)
        assert got.tobytes() == feeds["t"].tobytes()
        norm_oracle = Norm(*values, epsilon=EPSILON) if slot.norm else None
        read = feeds[slot.source], neutral, norm_oracle, feeds.get(slot.plus)
        assert np.array_equal(slot_value(slot, feeds["t"], *read), feeds["t"])


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("case", CHANNEL_CASES)
def test_neutral_channel_slots_give_the_target_exactly(case: str, rank: int) -> None:
    slot = slot_of_case(case, axis=1, rank=rank)
    rng = np.random.default_rng(4)
    for size in (0, 5):
        feeds = {"t": rng.standard_normal(shape(slot, WIDTH)).astype(np.float32)}
        if slot.source == "x":
            feeds["x"] = rng.standard_normal(shape(slot, SOURCE_WIDTH)).astype(np.float32)
        neutral = neutral_weights(slot, size)
        feeds |= {f"adapter.s.{part}": value for part, value in neutral.items()}
        assert run_nodes(slot, 13, feeds).tobytes() == feeds["t"].tobytes()


def test_the_plain_slot_is_exactly_four_nodes() -> None:
    nodes = slot_nodes(PLAIN, 17)
    assert [node.op_type for node in nodes] == ["MatMul", "Relu", "MatMul", "Add"]
    assert [list(node.input) for node in nodes] == [
        ["t", "adapter.s.down"],
        ["adapter.s/down"],
        ["adapter.s/act", "adapter.s.up"],
        ["t", "adapter.s/up"],
    ]
    assert nodes[-1].output == ["y"]
    assert all(node.metadata_props[0].key == "pkg.onnx_adapt.slot" for node in nodes)
    assert {node.metadata_props[0].value for node in nodes} == {"s"}


@pytest.mark.parametrize(
    ("case", "ops"),
    [
        ("ia3", "Mul"),
        ("lora", "MatMul MatMul Add"),
        ("dora", "Mul MatMul MatMul Add"),
        ("gain", "MatMul Relu MatMul Mul Add"),
        ("down_bias", "MatMul Add Relu MatMul Add"),
        ("own_norm", "LayerNormalization MatMul Relu MatMul Add"),
        ("after_sum", "MatMul Relu MatMul Add LayerNormalization Sub Mul Add"),
    ],
)
def test_an_absent_part_emits_no_node(case: str, ops: str) -> None:
    assert [node.op_type for node in slot_nodes(slot_of_case(case), 17)] == ops.split()


TERM = "down down_biased act up up_biased gained gate gated after sum"


@pytest.mark.parametrize(
    ("case", "changes", "opset", "steps"),
    [
        ("everything", {}, 17, f"scaled read norm norm_own {TERM}"),
        ("everything", {}, 14, f"scaled read norm norm_own {TERM}"),
        ("after_sum_bias", {}, 17, "scaled down act up sum after switched"),
        ("biases", {"axis": 1, "rank": 4}, 17, "down act up sum"),
        (
            "biases",
            {"batched": True, "rank": 2},
            17,
            "by_row down down_biased act masked up up_biased sum reshaped",
        ),
    ],
)
def test_steps_are_named_for_what_they_compute(
    case: str, changes: dict[str, Any], opset: int, steps: str
) -> None:
    """Profiles show the names; what else a step needs is named by operator and place."""
    slot = slot_of_case(case, **changes)
    norm, _ = base_norm(np.float32, np.random.default_rng(0))
    nodes = slot_nodes(slot, opset, norm if slot.norm else None)
    assert len({node.name for node in nodes}) == len(nodes)
    names = [node.name.removeprefix("adapter.s/") for node in nodes]
    assert " ".join(name for name in names if not name[-1].isdigit()) == steps


def test_the_base_normalisation_is_copied_with_its_attributes_and_first_output_only() -> None:
    node, _ = base_norm(np.float32, np.random.default_rng(0))
    before = node.SerializeToString()
    copy = slot_nodes(slot_of_case("base_norm"), 17, node)[0]
    assert (copy.op_type, list(copy.input)) == ("LayerNormalization", ["t", "g", "b"])
    assert (copy.name, list(copy.output)) == ("adapter.s/norm", ["adapter.s/norm"])
    assert copy.attribute[0].f == pytest.approx(1e-3)
    assert [(p.key, p.value) for p in copy.metadata_props] == [("pkg.onnx_adapt.slot", "s")]
    assert node.SerializeToString() == before


def test_rms_normalisation_of_the_base_leaves_the_mean_in() -> None:
    rng = np.random.default_rng(5)
    t, g = rng.standard_normal((2, 4, WIDTH)) + 3, rng.standard_normal(WIDTH)
    wanted = t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-6) * g
    normed = Norm(g, epsilon=1e-6, centred=False)(exact(t, ARITHMETIC["float64"]))
    np.testing.assert_allclose(normed.value, wanted, 1e-13)
    node = helper.make_node("RMSNormalization", ["s", "g"], ["n"], "rms", epsilon=1e-6)
    weights = {p: rng.standard_normal(part_shape(PLAIN, p, RANK)) for p in PLAIN.parts}
    slot = slot_of_case("base_norm", dtype="float64")
    feeds = {"t": t, "g": g} | {f"adapter.s.{p}": v for p, v in weights.items()}
    got = run_nodes(slot, 23, feeds, node)
    target = t + np.maximum(wanted @ weights["down"], 0) @ weights["up"]
    np.testing.assert_allclose(got, target, 1e-12)


@pytest.mark.parametrize("case", ["biases", "gate_bias", "everything_parallel", "dora"])
def test_fresh_weights_start_as_the_identity(case: str) -> None:
    slot = slot_of_case(case, source="t", source_width=WIDTH)
    weights = fresh_weights(slot, 64, np.random.default_rng(0))
    assert {p: v.shape for p, v in weights.items()} == {
        p: part_shape(slot, p, 64) for p in slot.parts
    }
    t = np.random.default_rng(1).standard_normal((2, 4, WIDTH)).astype(np.float32)
    feeds = {"t": t} | {f"adapter.s.{p}": v for p, v in weights.items()}
    assert run_nodes(slot, 17, feeds).tobytes() == t.tobytes()


UP = {name for name in CASES if {"up", "f_up"} & set(slot_of_case(name).parts)}


@pytest.mark.parametrize("case", sorted(UP - {n for n in CASES if "switch" in str(CASES[n])}))
def test_fresh_weights_move_the_output_as_soon_as_up_does(case: str) -> None:
    slot = slot_of_case(case)
    ups = [part for part in slot.parts if part == "up" or part.endswith("_up")]
    weights = fresh_weights(slot, 8, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    t, x, z = (rng.standard_normal((2, 4, n)) for n in (WIDTH, slot.source_width, WIDTH))
    norm = Norm(np.ones(slot.source_width)) if slot.norm else None
    for up in ups:
        learned = {**weights, up: rng.standard_normal(weights[up].shape)}
        read = (x if slot.source == "x" else t), learned, norm, (z if slot.plus else None)
        assert np.abs(slot_value(slot, t, *read) - t).max() > 1e-3


COUPLING = coupling_parts()
ON_CHANNELS = [name for name, part in PARTS.items() if part.channels]


@pytest.mark.parametrize(
    ("parts", "part", "summed"),
    [
        (("down", "up"), "down", 400),
        (("table", "up"), "table", 1),
        (COUPLING, "f_down", 200),
        (COUPLING, "g_down", 200),
    ],
)
def test_a_fresh_projection_is_kaiming_uniform_as_in_torch(
    parts: tuple[str, ...], part: str, summed: int
) -> None:
    slot = replace(PLAIN, width=400, source_width=400, parts=parts)
    down = fresh_weights(slot, 300, np.random.default_rng(0))[part]
    # torch: kaiming_uniform_(a=sqrt(5)) has bound sqrt(6 / ((1 + 5) * fan_in)).
    bound = np.sqrt(6 / ((1 + 5) * summed))
    assert 0.999 * bound < np.abs(down).max() <= bound * (1 + 1e-6)
    assert down.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    assert abs(down.mean()) < bound / 100


def test_the_bottleneck_axis_is_where_the_shapes_of_two_bottlenecks_differ() -> None:
    on_channels = replace(PLAIN, axis=1, rank=4)
    for slot, parts in ((PLAIN, PARTS), (on_channels, ON_CHANNELS)):
        for part in parts:
            three, seven = part_shape(slot, part, 3), part_shape(slot, part, 7)
            differ = [i for i, (a, b) in enumerate(zip(three, seven, strict=True)) if a != b]
            assert differ == [a for a in [bottleneck_axis(slot, part)] if a is not None]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_weight_of_more_than_2_gb_is_refused_before_it_is_made(dtype: str) -> None:
    slot = slot_of_case("plain", dtype=dtype, width=4, source_width=4)
    most = 2**31 // (4 * np.dtype(dtype).itemsize)
    with pytest.raises(SlotError, match=rf"shape \[4, {most + 1}\]") as caught:
        neutral_weights(slot, most + 1)
    assert "2 GB" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "opset", "message", "hint"),
    [
        ({"activation": "rleu"}, 17, "unknown activation 'rleu'", "relu"),
        ({"parts": ("down", "up", "middle")}, 17, "middle", "down_bias"),
        ({"parts": ("down",)}, 17, "'down' of a slot needs 'up'", ""),
        ({"parts": ("up",)}, 17, "'up' of a slot needs 'down'", ""),
        ({"parts": ("scale", "down_bias")}, 17, "'down_bias' of a slot needs 'down'", ""),
        ({"parts": ("scale", "up_bias")}, 17, "'up_bias' of a slot needs 'up'", ""),
        ({"parts": ("scale", "gain")}, 17, "'gain' of a slot needs 'up'", ""),
        ({"parts": ("scale", "gate")}, 17, "'gate' of a slot needs", ""),
        ({"parts": ("scale", "skip")}, 17, "skip", ""),
        ({"parts": ("scale", "norm_weight")}, 17, "'norm_weight' of a slot needs 'down'", ""),
        ({"parts": ("table",)}, 17, "'table' of a slot needs 'up'", ""),
        ({"parts": ("table", "up", "down_bias")}, 17, "needs 'down'", ""),
        ({"parts": ("table", "up", "down")}, 17, "both 'table' and 'down'", ""),
        (
            {"parts": ("scale", "after_weight", "switch"), "norm_after": "sum"},
            17,
            "'after_weight' of a slot needs 'up'",
            "",
        ),
        ({"parts": ("down", "up", "residual")}, 17, "fit", ""),
        ({"parts": ("f_down", "f_up")}, 17, "coupling", ""),
        ({"parts": COUPLING, "width": 9}, 17, "even", ""),
        ({"parts": COUPLING}, 10, "needs opset 11", ""),
        ({"parts": COUPLING, "axis": 1, "rank": 4}, 17, "on the last axis", ""),
        ({"parts": ("down", "up", "gate_bias")}, 17, "needs 'gate'", ""),
        ({"parts": ("down", "up", "norm_bias")}, 17, "needs 'norm_weight'", ""),
        (
            {"parts": ("down", "up", "after_bias"), "norm_after": "term"},
            17,
            "after_weight",
            "",
        ),
        ({"parts": ()}, 17, "no parts", ""),
        ({"norm_after": "term"}, 17, "fit", ""),
        ({"parts": ("down", "up", "after_weight")}, 17, "fit", ""),
        (
            {"parts": ("down", "up", "after_weight"), "norm_after": "somewhere"},
            17,
            "norm|fit",
            "",
        ),
        ({"parts": ("scale",), "norm": "ln"}, 17, "fit", ""),
        ({"parts": ("down", "up", "after_weight"), "norm_after": "sum"}, 17, "fit", ""),
        ({"parts": ("down", "up", "switch")}, 17, "fit", ""),
        ({"axis": 1, "rank": 4, "parts": ("down", "up", "gate")}, 17, "channels", ""),
        ({"axis": 1, "rank": 4, "parts": ("down", "up", "norm_weight")}, 17, "channels", ""),
        ({"axis": 1, "rank": 4, "norm": "ln"}, 17, "channels", ""),
        ({}, 6, "opset 6", "version_converter"),
    ],
)
def test_a_slot_without_meaning_is_refused(
    changes: dict[str, Any], opset: int, message: str, hint: str
) -> None:
    with pytest.raises(SlotError, match=message) as caught:
        check_slot(replace(PLAIN, **changes), opset)
    assert hint in caught.value.hint


def test_rows_of_a_table_take_the_place_of_a_projection() -> None:
    slot = replace(PLAIN, parts=("table", "up"), source="ids", source_width=9)
    check_slot(slot, 17)
    rng = np.random.default_rng(2)
    table, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((9, 3), (3, 6)))
    ids = rng.integers(0, 9, (2, 4))
    t = rng.standard_normal((2, 4, WIDTH)).astype(np.float32)
    feeds = {"t": t, "ids": ids, slot.weight("table"): table, slot.weight("up"): up}
    assert slot_nodes(slot, 17)[0].name == "adapter.s/down"
    wanted = t + np.maximum(table[ids], 0) @ up
    np.testing.assert_allclose(run_nodes(slot, 17, feeds), wanted, 1e-5, 1e-5)


@pytest.mark.parametrize("case", ["own_norm", "after_term"])
def test_a_norm_inside_a_slot_needs_opset_11(case: str) -> None:
    with pytest.raises(SlotError, match="opset 11; the model uses 10") as caught:
        slot_nodes(slot_of_case(case), 10)
    assert "version_converter" in caught.value.hint


def test_constants_are_in_the_type_of_the_slot() -> None:
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        nodes = slot_nodes(slot_of_case("own_norm", dtype=dtype, activation="gelu_tanh"), 13)
        values = [numpy_helper.to_array(n.attribute[0].t) for n in nodes if not n.input]
        assert {str(v.dtype) for v in values} == {dtype}
        assert {v.shape for v in values} == {()}
