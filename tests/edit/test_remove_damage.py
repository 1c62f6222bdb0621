"""Adapted models that another tool damaged: an error that says so, or no harm."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from adapter_models import trained
from slot_models import BRANCHES, MLP, model_of

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.errors import AdaptError, ManifestError, SlotError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


def _manifest(model: oa.Model) -> onnx.StringStringEntryProto:
    return next(p for p in model.proto.metadata_props if p.key == "onnx_adapt")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "{}", '"text"', '{"format": 1}', '{"format": 1, "slots": 3}'],
)
def test_a_damaged_manifest_is_refused(text: str) -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    _manifest(adapted).value = text
    for use in (oa.remove, oa.list_slots, oa.find_sites):
        with pytest.raises(ManifestError, match="damaged") as caught:
            use(adapted)
        assert "insert into the base model again" in caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3),
        ("width", "4"),
        ("width", None),
        ("swappable", 1),
        ("parts", "down"),
        ("parts", [1]),
        ("parts", ["down", "sideways"]),
        ("dtype", "int8"),
        ("activation", "rleu"),
        ("inner", "nothing"),
        ("bottleneck", -1),
    ],
)
def test_a_manifest_with_a_wrong_value_is_an_error_of_ours(field: str, value: object) -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first")
    data = json.loads(_manifest(adapted).value)
    data["slots"][0][field] = value
    _manifest(adapted).value = json.dumps(data)
    with pytest.raises(AdaptError):
        oa.verify(base, adapted, inputs={"x": X}).raise_for_mismatch()


@pytest.mark.parametrize(
    "inputs", [[[0, "zz"]], [[0, "ff"]], [[2**70, ""]], [[-1, ""]], [[0]], ["ab"], 3], ids=str
)
def test_inputs_that_are_recorded_wrongly_are_an_error_of_ours(inputs: object) -> None:
    model = oa.insert(model_of(MLP), after="first")
    (entry,) = model.proto.metadata_props
    record = json.loads(entry.value)
    record["base"]["inputs"] = inputs
    entry.value = json.dumps(record)
    with pytest.raises(ManifestError):
        oa.remove(model)


def test_a_manifest_of_a_newer_format_is_refused() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    data = json.loads(_manifest(adapted).value)
    _manifest(adapted).value = json.dumps({**data, "format": data["format"] + 1, "slots": 0})
    for use in (oa.remove, oa.list_slots, lambda m: oa.insert(m, after="act")):
        with pytest.raises(ManifestError, match="format 3") as caught:
            use(adapted)
        assert "upgrade" in caught.value.hint


def test_two_slots_of_one_name_are_refused() -> None:
    adapted = oa.insert(model_of(MLP), after=["first", "act"])
    _manifest(adapted).value = _manifest(adapted).value.replace(
        '"name":"act"', '"name":"first"'
    )
    with pytest.raises(ManifestError, match="one name"):
        oa.remove(adapted)


def _uses(adapted: oa.Model, base: oa.Model | None = None) -> list[Callable[[], object]]:
    return [
        lambda: oa.remove(adapted),
        lambda: oa.insert(adapted, after="main:b"),
        lambda: oa.verify(base or model_of(MLP), adapted, inputs={"x": X}),
        lambda: oa.fill(adapted, oa.Adapter("a", {}), allow_partial=True),
        lambda: oa.bake(adapted),
        lambda: oa.extract(adapted),
    ]


def test_inputs_that_another_tool_stripped_are_an_error_everywhere() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    del adapted.proto.graph.input[1:]
    for use in _uses(adapted):
        with pytest.raises(SlotError, match="stripped") as caught:
            use()
        assert "simplifiers" in caught.value.hint


def test_weights_that_another_tool_deleted_are_an_error_everywhere() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    stored = adapted.proto.graph.initializer
    del stored[next(i for i, t in enumerate(stored) if t.name == "adapter.first.up")]
    for use in _uses(adapted):
        with pytest.raises(SlotError, match=r"adapter\.first\.up"):
            use()


def test_weights_of_another_shape_are_an_error_everywhere() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    tensor = next(t for t in adapted.proto.graph.initializer if t.name.endswith(".up"))
    tensor.dims[:] = [0, 5]
    for use in _uses(adapted):
        with pytest.raises(SlotError, match=r"\[0, 5\]"):
            use()


def test_weights_of_another_type_are_an_error_everywhere() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    tensor = next(t for t in adapted.proto.graph.initializer if t.name.endswith(".up"))
    tensor.data_type = onnx.TensorProto.FLOAT16
    for use in _uses(adapted):
        with pytest.raises(SlotError, match=r"adapter\.first\.up.* is not float32"):
            use()


@pytest.mark.parametrize("taken", ["input", "initializer"])
def test_a_replaceable_weight_that_another_tool_took_is_an_error_everywhere(
    taken: str, tmp_path: Path
) -> None:
    base, checkpoint = trained(tmp_path)
    adapted = oa.fill(oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    items = getattr(adapted.proto.graph, taken)
    del items[[item.name for item in items].index("base.fc2.bias")]
    for use in (*_uses(adapted, base), lambda: oa.fill(adapted, checkpoint.adapter)):
        with pytest.raises(SlotError, match=r"'base\.fc2\.bias' is not replaceable") as caught:
            use()
        assert "simplifiers" in caught.value.hint


def test_slots_whose_nodes_are_gone_are_damaged() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    nodes = [n for n in adapted.proto.graph.node if not n.metadata_props]
    del adapted.proto.graph.node[:]
    adapted.proto.graph.node.extend(nodes)
    adapted.proto.graph.node[0].output[0] = "a"
    with pytest.raises(SlotError, match="damaged") as caught:
        oa.remove(adapted)
    assert "base model" in caught.value.hint


def test_renamed_nodes_do_not_hide_slots() -> None:
    base = model_of(BRANCHES)
    adapted = oa.insert(base, after="yes")
    for graph in (adapted.proto.graph, adapted.proto.graph.node[1].attribute[0].g):
        for number, node in enumerate(graph.node):
            node.name = f"renamed_{number}"
    report = oa.verify(base, adapted, inputs={"x": X, "c": np.array(True)})
    assert [check.name for check in report.checks if not check.passed] == ["graph"]
    stacked = oa.insert(adapted, after="main:h")
    removed = oa.remove(stacked)
    assert not oa.list_slots(removed)
    names = [n.name for n in removed.proto.graph.node]
    assert names == ["renamed_0", "renamed_1"]


def test_a_slot_that_is_said_to_make_what_the_base_has_is_kept_in() -> None:
    adapted = oa.insert(model_of(MLP), after="main:y")
    entry = _manifest(adapted)
    record = json.loads(entry.value)
    record["slots"][0]["output"] = "x"  # the model's input
    entry.value = json.dumps(record)
    assert any("does not make its output 'x'" in said for said in damages(adapted))
    with pytest.raises(SlotError, match="damaged"):
        oa.remove(adapted)
