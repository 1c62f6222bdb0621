"""A batch of no rows, and tensors of no positions: a slot runs wherever its base runs."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from adapter_models import adapted
from onnx import helper
from session_adapters import DE, FR
from slot_formula import (
    CASES,
    CHANNEL_CASES,
    RANK,
    SOURCE_WIDTH,
    WIDTH,
    base_norm,
    slot_of_case,
)
from slot_models import dense, model_of, run

import onnx_adapt as oa
from onnx_adapt.errors import RunError, SlotError
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.formula import slot_nodes
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.oracle import Norm, slot_value
from onnx_adapt.slot.weights import neutral_rows, part_shape, row_shape

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
EMPTY = {
    2: [(0,)],
    3: [(0, 2), (2, 0), (0, 0)],
    4: [(0, 2, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0), (0, 0, 3), (0, 0, 0)],
    5: [(0, 2, 3, 2), (2, 3, 2, 0), (2, 0, 3, 0), (0, 0, 0, 0)],
}
"""Sizes before the feature axis, by rank."""


def _session(
    nodes: list[onnx.NodeProto], opset: int, level: str, feeds: dict[str, Any]
) -> Any:
    """The nodes as a model of which only the ranks are known."""
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
        )
        for name, value in feeds.items()
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, None)]
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _feeds(slot: Slot, leading: tuple[int, ...], rows: int | None) -> dict[str, Any]:
    """Tensors and weights; of each row's own the default where `rows` is None."""
    rng = np.random.default_rng(5)

    def tensor(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def activation(width: int) -> np.ndarray:
        first, *rest = leading
        return tensor(first, width, *rest) if slot.axis == 1 else tensor(*leading, width)

    feeds = {"t": activation(WIDTH)}
    if slot.source == "x":
        feeds["x"] = activation(SOURCE_WIDTH)
    if slot.plus:
        feeds["z"] = activation(WIDTH)
    feeds |= {slot.weight(part): tensor(*part_shape(slot, part, RANK)) for part in slot.parts}
    own = neutral_rows(slot) if rows is None else {}
    for part in slot.row_parts:
        value = tensor(*row_shape(slot, part, rows, RANK)) if rows is not None else own[part]
        feeds[slot.weight(part)] = value
    return feeds


def _assert_runs(slot: Slot, opset: int, level: str, leading: tuple[int, ...]) -> None:
    """The nodes give the target's shape, and the oracle does, with rows and without."""
    norm, values = base_norm(np.float32, np.random.default_rng(1)) if slot.norm else (None, [])
    nodes = slot_nodes(slot, opset, norm)
    session = None
    for rows in (None, leading[0]) if slot.batched else (None,):
        feeds = _feeds(slot, leading, rows)
        given = feeds | dict(zip("gb", values, strict=False))
        session = session or _session(nodes, opset, level, given)
        assert session.run(None, given)[0].shape == feeds["t"].shape
        weights = {p: feeds[slot.weight(p)] for p in (*slot.parts, *slot.row_parts)}
        wide = Norm(*(v.astype(np.float64) for v in values), epsilon=1e-3) if values else None
        oracle = slot_value(
            slot, feeds["t"], feeds[slot.source], weights, wide, feeds.get("z")
        )
        assert oracle.shape == feeds["t"].shape


def _can_be(slot: Slot, opset: int) -> bool:
    try:
        check_slot(slot, opset)
    except SlotError:
        return False
    return True


BATCHED = [case for case in CASES if _can_be(slot_of_case(case, batched=True, rank=2), 17)]
GATED = [case for case in CASES if "gate" in slot_of_case(case).parts]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rank", EMPTY)
@pytest.mark.parametrize("case", BATCHED)
def test_a_batched_slot_runs_on_nothing(case: str, rank: int, level: str) -> None:
    for leading in EMPTY[rank]:
        _assert_runs(slot_of_case(case, batched=True, rank=rank), 17, level, leading)


@pytest.mark.parametrize("opset", [7, 11, 13, 14, 18, 24])
@pytest.mark.parametrize("rank", EMPTY)
def test_a_batched_slot_of_any_opset_runs_on_nothing(rank: int, opset: int) -> None:
    """Before opset 14 no Reshape can give two sizes of 0 where none was."""
    for leading in EMPTY[rank]:
        if opset >= 14 or leading.count(0) == 1 or rank < 4:
            parts = "down up down_bias up_bias scale"
            slot = slot_of_case("parallel", batched=True, rank=rank, parts=parts)
            _assert_runs(slot, opset, "ORT_ENABLE_ALL", leading)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(GATED)))
def test_an_ordinary_slot_runs_on_nothing(case: str) -> None:
    for leading in ((0, 2), (2, 0), (0, 0)):
        _assert_runs(slot_of_case(case), 17, "ORT_ENABLE_ALL", leading)


@pytest.mark.parametrize("case", GATED)
def test_a_gate_runs_on_no_rows(case: str) -> None:
    """Its mean over no positions has no meaning."""
    _assert_runs(slot_of_case(case), 17, "ORT_ENABLE_ALL", (0, 2))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("case", CHANNEL_CASES)
def test_a_slot_on_channels_runs_on_no_rows(case: str, batched: bool) -> None:
    """ONNX Runtime has no convolution over no positions."""
    slot = slot_of_case(case, axis=1, rank=4, batched=batched)
    if _can_be(slot, 17):
        for level in LEVELS:
            _assert_runs(slot, 17, level, (0, 3, 2))


def test_a_slot_of_ids_runs_on_nothing() -> None:
    slot = slot_of_case("plain", parts="up table", source="ids", activation="identity")
    for rank, shapes in EMPTY.items():
        for leading in shapes:
            own = replace(slot, batched=True, rank=rank, source_width=9)
            for rows in (None, leading[0]):
                feeds = _feeds(own, leading, rows) | {"ids": np.zeros(leading, np.int64)}
                session = _session(slot_nodes(own, 17), 17, LEVELS[-1], feeds)
                assert session.run(None, feeds)[0].shape == (*leading, WIDTH)


# Whole models

NO_ROIS = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,8] x) => (float[n,6] y)
<{dense("w", 8)}, int64[2] start = {{0, 0}}, int64[2] stop = {{8, 6}}> {{
  v = Slice(w, start, stop)
  [fc] h = MatMul(x, v)
  y = Tanh(h) }}"""
IMAGES = f"""<ir_version: 8, opset_import: ["" : 13]>
g (float[n,h,w,4] x) => (float[n,h,w,4] y) <{dense("w1")}> {{
  [fc] h1 = MatMul(x, w1)
  y = Relu(h1) }}"""


@pytest.mark.parametrize(
    "options", [{}, {"batched": True}, {"bottleneck": 4}, {"bottleneck": 4, "baked": True}]
)
@pytest.mark.parametrize(
    ("text", "shape"), [(NO_ROIS, (0, 8)), (IMAGES, (0, 2, 3, 4)), (IMAGES, (2, 0, 3, 4))]
)
def test_an_adapted_model_runs_on_nothing_as_its_base_does(
    text: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    base = model_of(text)
    model = oa.insert(base, after="fc", bias=True, **options)
    feeds = {"x": np.zeros(shape, np.float32)}
    (wanted,), (found,) = run(base, feeds), run(model, feeds)
    assert found.shape == wanted.shape
    assert found.size == 0


def _random(model: oa.Model, size: int, seed: int) -> oa.Adapter:
    rng = np.random.default_rng(seed)
    weights = {
        slot.name: {
            p: rng.standard_normal(part_shape(slot, p, size)).astype(np.float32)
            for p in slot.parts
        }
        for slot in oa.list_slots(model)
    }
    return oa.make_adapter(model, str(seed), weights)


@pytest.mark.parametrize("text", [NO_ROIS, IMAGES])
@pytest.mark.parametrize("chosen", [None, "a", {"a": 0.5, "b": -1.0}, [], ()])
def test_a_session_runs_a_batch_of_no_rows_whatever_the_adapter(
    text: str, chosen: Any
) -> None:
    model = oa.insert(model_of(text), after="fc", batched=True, bias=True)
    adapters = {"a": _random(model, 3, 1), "b": _random(model, 2, 2)}
    shape = (0, 8) if text == NO_ROIS else (0, 2, 3, 4)
    with oa.AdapterSession(model, adapters) as session:
        found = session.run({"x": np.zeros(shape, np.float32)}, adapter=chosen)["y"]
    assert found.shape == ((0, 6) if text == NO_ROIS else shape)


def test_a_list_of_no_adapters_is_for_no_rows_only() -> None:
    with oa.AdapterSession(adapted(), {"fr": FR, "de": DE}) as session:
        assert session.run({"x": np.zeros((0, 4), np.float32)}, adapter=[])["y"].shape == (
            0,
            4,
        )
        with pytest.raises(RunError, match="adapters given is 0") as caught:
            session.run({"x": np.zeros((2, 4), np.float32)}, adapter=[])
    assert "each row" in caught.value.hint
