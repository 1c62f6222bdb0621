"""A batch of several adapters runs in the way that was measured to be faster."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from slot_models import dense, model_of

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError
from onnx_adapt.session.batches import find_batch
from onnx_adapt.session.choosing import base_size, is_one_run_faster, positions_in_a_row
from onnx_adapt.session.ort_adapter import OrtAdapter, read

LAYERS = 768 * 768 * 24 * 4, 2 * 768 * 24 * 4
MINILM = 21_300_000, 295_000 * 4 // 64
INT4 = 243_000_000, 9_732_000 * 4 // 16
"""The bytes of a base, and those of an adapter for each unit of its bottleneck."""


def _adapter(size: int) -> OrtAdapter:
    return read(oa.Adapter("a", {"s": {"down": np.zeros((size // 4, 1), np.float32)}}))[1]


@pytest.mark.parametrize(
    ("model", "rows", "positions", "adapters", "bottleneck", "one_run"),
    [
        (LAYERS, 8, 1, 2, 16, True),  # 1.16 against 1.52 of the base
        (LAYERS, 8, 1, 8, 64, True),  # 3.97 against 5.08
        (LAYERS, 32, 1, 8, 64, True),  # 3.15 against 3.91
        (LAYERS, 8, 16, 8, 16, True),  # 1.42 against 1.87
        (LAYERS, 8, 16, 8, 64, False),  # 2.56 against 2.18
        (LAYERS, 8, 128, 8, 16, False),  # 1.35 against 1.18
        (LAYERS, 8, 128, 8, 64, False),  # 2.35 against 1.35
        (MINILM, 8, 16, 8, 64, True),  # 1.51 against 1.60
        (MINILM, 32, 16, 8, 64, False),  # 1.46 against 1.18
        (INT4, 32, 1, 8, 16, True),  # 1.44 against 1.77
        (INT4, 8, 16, 8, 16, False),  # 1.26 against 1.14
    ],
)
def test_the_choice_is_what_was_measured_to_be_faster(
    model: tuple[int, int],
    rows: int,
    positions: int,
    adapters: int,
    bottleneck: int,
    one_run: bool,
) -> None:
    base, unit = model
    each = [_adapter(unit * bottleneck) for _ in range(adapters)]
    groups = {((a, 1.0),): list(range(i, rows, adapters)) for i, a in enumerate(each)}
    assert is_one_run_faster(base, positions, groups) == one_run


def test_rows_without_an_adapter_pay_for_those_of_others() -> None:
    fr = ((_adapter(4000), 1.0),)
    assert is_one_run_faster(4000, 4, {fr: [0], (): [1, 2]})  # 4 * 2 * 4000 < 40000
    assert not is_one_run_faster(4000, 5, {fr: [0], (): [1, 2]})


@pytest.mark.parametrize(
    ("inputs", "positions"),
    [
        ({"ids": (["batch", "seq"], np.ones((3, 7), np.int64))}, 7),
        ({"x": (["batch", "seq", 8], np.ones((3, 7, 8), np.float32))}, 7),
        ({"x": (["batch", 8], np.ones((3, 8), np.float32))}, 1),
        ({"sound": (["batch", "samples"], np.ones((3, 90), np.float32))}, 90),
        ({"image": (["batch", 3, 5, 5], np.ones((3, 3, 5, 5), np.float32))}, 15),
        (
            {
                "attention_mask": (["batch", "total"], np.ones((3, 9), np.int64)),
                "input_ids": (["batch", "seq"], np.ones((3, 1), np.int64)),
            },
            1,
        ),
        ({"frames": (["seq", "batch", 8], np.ones((7, 3, 8), np.float32))}, 7),
    ],
)
def test_positions_are_what_the_first_input_has(
    inputs: dict[str, tuple[list[Any], np.ndarray]], positions: int
) -> None:
    declared = {name: shape for name, (shape, _) in inputs.items()}
    feeds = {name: array for name, (_, array) in inputs.items()}
    axes = find_batch(declared, {}, None)
    assert positions_in_a_row(axes, declared, feeds) == positions


ROWS = ", ".join("1.0" for _ in range(400))
TABLE = f"""<ir_version: 8, opset_import: ["" : 17]>
g (int64[batch,seq] ids) => (float[batch,seq,4] y)
<float[100,4] table = {{{ROWS}}}, {dense("w")}>
{{ e = Gather(table, ids)  [first] y = MatMul(e, w) }}"""


def test_a_table_of_which_a_few_rows_are_read_does_not_count() -> None:
    model = oa.insert(model_of(TABLE), after="first", batched=True)
    assert base_size(model) == 4 * 4 * 4


def test_a_session_tells_its_runs_and_long_rows_run_by_adapter() -> None:
    model = oa.insert(model_of(TABLE), after="first", batched=True)
    (slot,) = oa.list_slots(model)
    weights = {"down": np.ones((4, 2)), "up": np.ones((2, 4))}
    fr, de = (oa.make_adapter(model, name, {slot.name: weights}) for name in ("fr", "de"))
    rows = ["fr", None, "de", "fr"]
    with oa.AdapterSession(model, {"fr": fr, "de": de}) as session:
        short, long = ({"ids": np.ones((4, n), np.int64)} for n in (1, 50))
        assert session.rows_of_runs(short, rows) == [[0, 1, 2, 3]]
        assert session.rows_of_runs(long, rows) == [[0, 3], [1], [2]]
        assert session.rows_of_runs(long, ["fr"] * 4) == [[0, 1, 2, 3]]


def test_an_ort_file_with_batched_slots_is_as_large_as_it_is(tmp_path: Path) -> None:
    model, file = tmp_path / "batched.onnx", tmp_path / "batched.ort"
    oa.save_model(oa.insert(model_of(TABLE), after="first", batched=True), model)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(file)
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(str(model), options)
    assert base_size(file) == file.stat().st_size
    with oa.AdapterSession(file) as session:
        feeds = {"ids": np.ones((2, 1), np.int64)}
        assert session.rows_of_runs(feeds, [None, None]) == [[0, 1]]


def test_one_adapter_is_no_list() -> None:
    with (
        oa.AdapterSession(oa.insert(model_of(TABLE), after="first")) as session,
        pytest.raises(AdapterError, match="'fr', no list"),
    ):
        session.rows_of_runs({"ids": np.ones((2, 1), np.int64)}, "fr")
