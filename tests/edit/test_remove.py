"""Removal: with the last slot the base is back, byte for byte; before that, the rest stays."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from fetch_models import fetch
from slot_models import (
    BRANCHES,
    COMMITTED,
    MLP,
    MODELS,
    adapter_feeds,
    bump,
    model_of,
    proto_of,
    run,
    saved,
    weight,
)

import onnx_adapt as oa
from onnx_adapt.edit.remove import base_notes
from onnx_adapt.errors import SlotError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


def _all_layers(base: oa.Model) -> list[str]:
    return [site.address for site in oa.find_sites(base) if site.refused is None]


def _there_and_back(path: Path, folder: Path, **options: object) -> bytes:
    """Through two files: insert after every layer, save, open, remove, save."""
    base = oa.open_model(path)
    adapted = oa.insert(base, after=_all_layers(base), **options)
    again = oa.open_model(saved(adapted, folder / "adapted.onnx"))
    assert len(oa.list_slots(again)) == len(_all_layers(base)) > 0
    return saved(oa.remove(again), folder / "removed.onnx").read_bytes()


@pytest.mark.parametrize("name", COMMITTED)
@pytest.mark.parametrize("baked", [False, True])
def test_every_layer_of_a_real_model_adapted_and_back(
    name: str, baked: bool, tmp_path: Path
) -> None:
    path = MODELS / f"{name}.onnx"
    got = _there_and_back(path, tmp_path, bias=True, activation="gelu", baked=baked)
    assert got == path.read_bytes()


@pytest.mark.parametrize("name", ["minilm-l3-fp16", "smart-turn"])
def test_fp16_and_quantised_models_come_back(name: str, tmp_path: Path) -> None:
    assert _there_and_back(fetch(name), tmp_path) == fetch(name).read_bytes()


@pytest.mark.parametrize("path", sorted((MODELS.parent / "tests/exports").glob("*.onnx")))
def test_exports_of_both_exporters_come_back(path: Path, tmp_path: Path) -> None:
    assert _there_and_back(path, tmp_path) == path.read_bytes()


def test_fields_that_no_slot_touches_survive(tmp_path: Path) -> None:
    proto = proto_of(MLP)
    proto.doc_string, proto.producer_name, proto.model_version = "text", "me", 7
    proto.metadata_props.add(key="licence", value="MIT")
    proto.graph.doc_string = "graph text"
    proto.graph.node[0].doc_string = "node text"
    proto.graph.node[0].metadata_props.add(key="namespace", value="a: b/c: d")
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("a", 1, ["n", 4]))
    proto.graph.quantization_annotation.add(tensor_name="a")
    proto.training_info.add().initialization.name = "init"
    info = proto.graph.input[0]
    info.doc_string = "input text"
    unknown = b"\xfa\x7f\x03abc"  # field 2047, of a later ONNX
    file = tmp_path / "base.onnx"
    file.write_bytes(proto.SerializeToString() + unknown)
    assert _there_and_back(file, tmp_path) == file.read_bytes()


def test_the_base_with_its_own_metadata_named_like_ours_is_not_confused() -> None:
    base = model_of(MLP)
    base.proto.graph.node[1].metadata_props.add(key="pkg.onnx_adapt.other", value="first")
    assert oa.remove(oa.insert(base, after="first")).proto == base.proto


def test_an_ir_version_that_was_raised_goes_back_with_the_last_slot() -> None:
    proto = proto_of(MLP)
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        value = onnx.helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims))
        proto.graph.input.append(value)
    before = proto.SerializeToString()
    adapted = oa.insert(oa.Model(proto), after=["first", "act"])
    assert oa.remove(adapted, slots=["first"]).proto.ir_version == 4
    assert oa.remove(adapted).proto.SerializeToString() == before


def test_a_model_without_an_ir_version_comes_back_without_one() -> None:
    base = model_of(MLP)
    base.proto.ClearField("ir_version")
    adapted = oa.insert(base, after="first")
    assert oa.remove(adapted).proto.SerializeToString() == base.proto.SerializeToString()


def test_removal_leaves_its_argument_as_it_was() -> None:
    adapted = oa.insert(model_of(MLP), after=["first", "act"])
    before = adapted.proto.SerializeToString()
    oa.remove(adapted, slots=["first"])
    oa.remove(adapted)
    assert adapted.proto.SerializeToString() == before


@pytest.mark.parametrize("gone", ["first", "act", "second"])
def test_removing_one_of_several_leaves_the_others_at_work(gone: str) -> None:
    base = model_of(MLP)
    less = oa.remove(oa.insert(base, after=["first", "act", "second"]), slots=[gone])
    slots = oa.list_slots(less)
    assert {slot.name for slot in slots} == {"first", "act", "second"} - {gone}
    names = [value.name for value in less.proto.graph.input]
    assert not [name for name in names if gone in name]
    feeds = adapter_feeds(slots, np.random.default_rng(0))
    t = X
    for name, step in (
        ("first", lambda v: v @ weight(base, "w1")),
        ("act", lambda v: np.maximum(v, 0)),
        ("second", lambda v: v @ weight(base, "w2")),
    ):
        t = step(t) if name == gone else bump(step(t), feeds, name)
    np.testing.assert_allclose(run(less, {"x": X, **feeds})[0], t, 1e-4, 1e-4)
    assert oa.remove(less).proto == base.proto


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_stacked_slots_come_out_in_any_order(order: tuple[int, ...]) -> None:
    base = model_of(MLP)
    model = oa.insert(oa.insert(base, after="first"), after=["first", "first"])
    names = [slot.name for slot in oa.list_slots(model)]
    assert len(set(names)) == 3
    for number, index in enumerate(order[:2]):
        model = oa.remove(model, slots=[names[index]])
        slots = oa.list_slots(model)
        assert [s.name for s in slots] == [
            n for i, n in enumerate(names) if i not in order[: number + 1]
        ]
        feeds = adapter_feeds(slots, np.random.default_rng(0))
        t = X @ weight(base, "w1")
        for slot in slots:
            t = bump(t, feeds, slot.name)
        wanted = np.maximum(t, 0) @ weight(base, "w2")
        np.testing.assert_allclose(run(model, {"x": X, **feeds})[0], wanted, 1e-4, 1e-4)
        assert oa.verify(base, model, inputs={"x": X}).passed
    assert oa.remove(model).proto == base.proto


@pytest.mark.parametrize("several", [(0, 1), (0, 2), (1, 2), (1, 0), (2, 0)])
def test_several_stacked_slots_come_out_at_once(several: tuple[int, int]) -> None:
    base = model_of(MLP)
    model = oa.insert(base, after=["first", "first", "first"])
    names = [slot.name for slot in oa.list_slots(model)]
    less = oa.remove(model, slots=[names[i] for i in several])
    (left,) = oa.list_slots(less)
    feeds = adapter_feeds([left], np.random.default_rng(0))
    wanted = np.maximum(bump(X @ weight(base, "w1"), feeds, left.name), 0) @ weight(base, "w2")
    np.testing.assert_allclose(run(less, {"x": X, **feeds})[0], wanted, 1e-4, 1e-4)
    assert oa.remove(less).proto == base.proto


def test_a_slot_can_go_in_again_where_one_came_out() -> None:
    base = model_of(MLP)
    model = oa.insert(base, after=["first", "act", "first"])
    model = oa.insert(oa.remove(model, slots=["first"]), after=["first"])
    assert len({slot.name for slot in oa.list_slots(model)}) == 3
    assert oa.verify(base, model, inputs={"x": X}).passed
    assert oa.remove(model).proto == base.proto


def test_slots_in_bodies_come_out_one_by_one() -> None:
    base = model_of(BRANCHES)
    model = oa.insert(oa.insert(base, after=["yes", "no"]), after=["before", "choice"])
    for name in ("before", "yes", "choice"):
        model = oa.remove(model, slots=[name])
    assert [slot.name for slot in oa.list_slots(model)] == ["no"]
    assert oa.remove(model).proto == base.proto


def test_a_slots_own_weights_go_and_the_bases_stay() -> None:
    base = model_of(MLP)
    less = oa.remove(oa.insert(base, after=["first", "act"], bias=True), slots=["act"])
    stored = {t.name for t in less.proto.graph.initializer}
    parts = ("down", "up", "down_bias", "up_bias")
    assert stored == {"w1", "w2", *(f"adapter.first.{part}" for part in parts)}


@pytest.mark.parametrize("inline", [True, False])
def test_notes_say_why_the_result_is_not_the_base(inline: bool) -> None:
    text = MLP.replace('"" : 17]', '"" : 17, "local" : 1]')
    text = text.replace("Relu(a)", "local.act(a)")
    function = '<domain: "local", opset_import: ["" : 17]> act (v) => (w) { w = Relu(v) }'
    base = model_of(text + function)
    adapted = oa.insert(base, after="first", inline_functions=inline)
    result = oa.remove(adapted)
    assert (result.proto == base.proto) == (not inline)
    notes = base_notes(adapted, result)
    assert [("inlined" in note) for note in notes] == ([True] if inline else [])


def test_there_is_nothing_to_note_while_slots_are_left() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "act"])
    assert base_notes(adapted, oa.remove(adapted, slots=["act"])) == []
    assert base_notes(base, base) == []


def test_a_base_weight_that_was_changed_is_noted_on_removal() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    adapted.proto.graph.initializer[0].float_data[0] += 1
    (note,) = base_notes(adapted, oa.remove(adapted))
    assert "changed after" in note


def test_a_file_with_another_encoding_comes_back_as_the_same_model(tmp_path: Path) -> None:
    proto = proto_of(MLP)
    data = proto.SerializeToString()
    file = tmp_path / "odd.onnx"
    head = b"\x08" + bytes([proto.ir_version])  # the first field, moved to the end
    assert data.startswith(head)
    file.write_bytes(data.removeprefix(head) + head)
    base = oa.open_model(file)
    assert not base.canonical
    adapted = oa.open_model(saved(oa.insert(base, after="first"), tmp_path / "a.onnx"))
    result = oa.remove(adapted)
    assert result.proto == proto
    (note,) = base_notes(adapted, result)
    assert "not encoded" in note
    again = oa.insert(result, after="act")
    assert base_notes(again, oa.remove(again)) == [note]


def test_a_base_that_came_back_can_come_back_once_more() -> None:
    base = oa.remove(oa.insert(model_of(MLP), after="first"))
    adapted = oa.insert(base, after="act")
    assert base_notes(adapted, oa.remove(adapted)) == []


def test_there_is_nothing_to_remove_from_a_base() -> None:
    with pytest.raises(SlotError, match="no slots") as caught:
        oa.remove(model_of(MLP))
    assert "nothing to remove" in caught.value.hint


def test_an_unknown_slot_is_refused_with_the_names_there_are() -> None:
    adapted = oa.insert(model_of(MLP), after=["first", "act"])
    with pytest.raises(SlotError, match="'frist'") as caught:
        oa.remove(adapted, slots=["frist"])
    assert "first, act" in caught.value.hint


def test_removing_no_slot_changes_nothing() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    assert oa.remove(adapted, slots=[]).proto == adapted.proto


def test_a_slot_named_twice_is_removed_once() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "act"])
    less = oa.remove(adapted, slots=["first", "first"])
    assert [slot.name for slot in oa.list_slots(less)] == ["act"]
