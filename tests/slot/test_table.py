"""The table of parts says all of a part: a new row walks through everything but arithmetic."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from slot_formula import PLAIN, WIDTH

import onnx_adapt as oa
from onnx_adapt.adapter.own_weights import make_adapter
from onnx_adapt.errors import AdapterError, SlotError
from onnx_adapt.proof.probe import neutral_model
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.parts import PARTS, Blend, Draw, Part, RowForm, in_order
from onnx_adapt.slot.weights import (
    bottleneck_axis,
    fresh_weights,
    neutral_rows,
    neutral_weights,
    part_shape,
)

TINT = Part(
    shape=("source", 1),
    channels=("source", 1, "ones"),
    off=1,
    silences=True,
    optional=True,
    needs=("up",),
    coupling=False,
    projects=False,
    meets=False,
    blend=Blend.FACTOR,
    closed="",
    row=RowForm("row_tint", "Mul", "width", Draw.NEAR_ONE),
    draw=Draw.NEAR_ONE,
)
"""A part that no formula has. What remains to be written for a real one are its two lines: the
nodes in `slot/formula.py` and the same in numpy in `slot/oracle.py`."""

SLOT = replace(PLAIN, parts=("down", "up", "tint"))


@pytest.fixture
def _tint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "tint", TINT)


needs_tint = pytest.mark.usefixtures("_tint")


@pytest.mark.parametrize("column", [field.name for field in fields(Part)])
def test_a_row_without_one_of_its_columns_is_an_error(column: str) -> None:
    columns = {field.name: getattr(TINT, field.name) for field in fields(Part)}
    del columns[column]
    with pytest.raises(TypeError, match=column):
        Part(**columns)


def test_a_part_that_no_blend_has_tells_why_and_every_other_has_a_rule() -> None:
    for part in PARTS.values():
        assert (part.blend is Blend.CLOSED) == bool(part.closed)
        assert not (part.closed and part.row), "a row of its own is a share of a blend"
        assert set(part.needs) <= set(PARTS)


@needs_tint
def test_a_new_row_has_its_shape_off_value_and_place() -> None:
    check_slot(SLOT, 17)
    assert in_order(["tint", "up", "down"]) == ("down", "up", "tint")
    assert part_shape(SLOT, "tint", 3) == (WIDTH, 1)
    assert part_shape(replace(SLOT, axis=1, rank=4), "tint", 3) == (WIDTH, 1, 1, 1)
    assert bottleneck_axis(SLOT, "tint") is None
    assert np.all(neutral_weights(SLOT, 2)["tint"] == 1)
    assert np.all(fresh_weights(SLOT, 2, np.random.default_rng(0))["tint"] == 1)
    with pytest.raises(SlotError, match="'tint' of a slot needs 'up'"):
        check_slot(replace(SLOT, parts=("scale", "tint")), 17)
    with pytest.raises(SlotError, match="coupling has all of"):
        check_slot(replace(SLOT, parts=(*SLOT.parts, "f_down")), 17)


@needs_tint
def test_a_new_row_has_a_value_for_each_row_of_a_batch() -> None:
    batched = replace(SLOT, batched=True, rank=3)
    check_slot(batched, 17)
    assert batched.row_parts == ("mask", "row_tint")
    assert neutral_rows(batched)["row_tint"].tolist() == [[[1]]]


@needs_tint
def test_a_new_row_is_written_into_a_model_read_blended_and_saved(tmp_path: Path) -> None:
    base = oa.open_model(Path(__file__).parents[2] / "models" / "dnsmos-p808.onnx")
    adapted = oa.insert(base, after="conv2d_5", parts=("down", "up", "tint"))
    oa.save_model(adapted, tmp_path / "adapted.onnx")
    model = oa.open_model(tmp_path / "adapted.onnx")
    (slot,) = oa.list_slots(model)
    assert slot.parts == ("down", "up", "tint")
    shapes = {part: part_shape(slot, part, 2) for part in slot.parts}
    one, two = (
        make_adapter(
            model,
            str(n),
            {slot.name: {p: np.full(s, n, "float32") for p, s in shapes.items()}},
        )
        for n in (2, 3)
    )
    assert neutral_model(oa.fill(model, adapter=one)) is not model
    mixed = oa.blend([one, two], [0.5, 2.0])
    tint = mixed.weights[slot.name]["tint"]
    assert np.all(tint == 1 + 0.5 * 1 + 2.0 * 2)
    for suffix in ("safetensors", "onnx_adapter", "npz"):
        oa.save_adapter(one, tmp_path / f"one.{suffix}")
        again = oa.load_adapter(tmp_path / f"one.{suffix}")
        np.testing.assert_array_equal(
            again.weights[slot.name]["tint"], one.weights[slot.name]["tint"]
        )
    removed = oa.remove(model)
    assert removed.proto.SerializeToString() == base.proto.SerializeToString()


def test_a_part_without_a_row_is_refused_by_slots_and_blends() -> None:
    with pytest.raises(SlotError, match="unknown part"):
        check_slot(SLOT, 17)
    weights = {"s": {"tint": np.ones((2, 2), "float32")}}
    adapters = [oa.Adapter("a", weights), oa.Adapter("b", weights)]
    with pytest.raises(AdapterError, match="its part 'tint' is unknown") as caught:
        oa.blend(adapters, [0.5, 0.5])
    assert "down" in caught.value.hint


def test_shared_values_that_differ_and_have_no_place_to_go_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PARTS, "tint", replace(TINT, blend=Blend.SHARED, row=None))
    ones = {"s": {"tint": np.ones((2, 2), "float32")}}
    twos = {"s": {"tint": np.full((2, 2), 2, "float32")}}
    same = oa.blend([oa.Adapter("a", ones), oa.Adapter("b", ones)], [0.5, 0.5])
    assert np.all(same.weights["s"]["tint"] == 1)
    with pytest.raises(AdapterError, match="of its own"):
        oa.blend([oa.Adapter("a", ones), oa.Adapter("b", twos)], [0.5, 0.5])
