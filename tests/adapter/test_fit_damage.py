"""What other tools do to slots, and that `check` names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from adapter_models import adapted, bumped, trained, two_layers, weights
from onnx import helper, shape_inference, version_converter
from onnxruntime.quantization import quantize_dynamic
from slot_models import cli, saved, session

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.errors import SlotError
from onnx_adapt.slot.manifest import SLOT_KEY

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
Proto = onnx.ModelProto


def _check(capsys: pytest.CaptureFixture[str], path: Path, *files: Path) -> tuple[int, str]:
    """Exit status of `check`, and what it says; as JSON it says the same."""
    names = [str(path), *map(str, files)]
    code, out, err = cli(capsys, "check", *names)
    again, document, _ = cli(capsys, "check", *names, "--json")
    problems = json.loads(document)["problems"]
    assert again == code
    assert all(text in out for found in problems.values() for text in found)
    return code, out + err


def _drop(items: Any, names: set[str]) -> None:
    kept = [item for item in items if item.name not in names]
    del items[:]
    items.extend(kept)


def _slot_weights(proto: Proto) -> set[str]:
    return {t.name for t in proto.graph.initializer if t.name.startswith("adapter.")}


def _strip_inputs(proto: Proto) -> None:
    """As onnxsim, onnxslim and onnx_ir: an input with a default is no input."""
    _drop(proto.graph.input, {tensor.name for tensor in proto.graph.initializer})


def _strip_defaults(proto: Proto) -> None:
    _drop(proto.graph.initializer, _slot_weights(proto))


def _strip_one_default(proto: Proto) -> None:
    _drop(proto.graph.initializer, {"adapter.fc2.up"})


def _strip_marks(proto: Proto, slots: str = "fc1 fc2") -> None:
    for node in proto.graph.node:
        if node.metadata_props and node.metadata_props[0].value in slots.split():
            del node.metadata_props[:]


def _fold(proto: Proto) -> None:
    """As onnxslim: the empty slot computes nothing, so it goes."""
    keep = [n for n in proto.graph.node if not n.name.startswith("adapter.")]
    for node in keep:
        outputs = {"adapter.fc1/target": "a", "adapter.fc2/target": "y"}
        node.output[0] = outputs.get(node.output[0], node.output[0])
    del proto.graph.node[:]
    proto.graph.node.extend(keep)


def _rename_weight(proto: Proto) -> None:
    for item in (*proto.graph.initializer, *proto.graph.input):
        item.name = item.name.replace("adapter.fc1.down", "fc1_down")
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = name.replace("adapter.fc1.down", "fc1_down")


def _dims(proto: Proto) -> list[onnx.TensorShapeProto.Dimension]:
    values = [value for value in proto.graph.input if value.name.startswith("adapter.")]
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim]
    return [dim for dim in dims if dim.dim_param]


def _share_symbols(proto: Proto) -> None:
    for dim in _dims(proto):
        dim.dim_param = "lora_r"


def _fix_symbols(proto: Proto, size: int = 0) -> None:
    """As onnxruntime.tools.make_dynamic_shape_fixed."""
    for dim in _dims(proto):
        dim.dim_value = size


def _record(proto: Proto, size: int) -> None:
    """As symbolic_shape_infer of ONNX Runtime: the default's size is recorded inside."""
    proto.graph.value_info.append(helper.make_tensor_value_info("b", 1, ["n", 4]))
    for name in ("fc1/down", "fc1/act", "fc2/down", "fc2/act"):
        kind = helper.make_tensor_value_info(f"adapter.{name}", 1, ["n", size])
        proto.graph.value_info.append(kind)


def _other_type(proto: Proto) -> None:
    for value in proto.graph.input:
        if value.name == "adapter.fc1.up":
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def _other_default(proto: Proto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name == "adapter.fc1.up":
            tensor.CopyFrom(helper.make_tensor(tensor.name, 1, [0, 7], []))


DAMAGES: dict[str, tuple[Callable[[Proto], None], list[str]]] = {
    "inputs stripped": (_strip_inputs, ["'fc1' is not swappable", "adapter.fc1.down"]),
    "defaults stripped": (_strip_defaults, ["'fc1' is damaged", "gone"]),
    "one default stripped": (_strip_one_default, ["'fc2'", "adapter.fc2.up"]),
    "marks stripped": (_strip_marks, ["'fc1'", "'fc2'", "mark"]),
    "folded": (_fold, ["'fc1'", "'fc2'", "nodes"]),
    "weight renamed": (_rename_weight, ["'fc1'", "adapter.fc1.down"]),
    "symbols shared": (_share_symbols, ["'fc1'", "'fc2'", "lora_r"]),
    "symbols fixed at 0": (_fix_symbols, ["'fc1'", "'fc2'", "swappable"]),
    "symbols fixed at 8": (lambda p: _fix_symbols(p, 8), ["'fc1'", "'fc2'"]),
    "empty shapes recorded": (lambda p: _record(p, 0), ["fc1/down", "fc2/act", "value_info"]),
    "shapes of one unit recorded": (lambda p: _record(p, 1), ["fc1/down", "fc2/down"]),
    "as many units as the slot is wide": (lambda p: _record(p, 4), ["fc1/down", "fc2/down"]),
    "another type declared": (_other_type, ["adapter.fc1.up", "float16"]),
    "another shape stored": (_other_default, ["adapter.fc1.up", "[0, 7]"]),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named_with_exit_1(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted()
    assert damages(model) == []
    hurt, words = DAMAGES[what]
    hurt(model.proto)
    onnx.save(model.proto, tmp_path / "m.onnx")
    code, said = _check(capsys, tmp_path / "m.onnx")
    assert code == 1
    assert [word for word in words if word not in said] == []


def test_a_slot_is_told_from_a_whole_one_before_it() -> None:
    model = adapted()
    _strip_marks(model.proto, "fc2")
    (said,) = damages(model)
    assert said.startswith("slot 'fc2' can still be fed")


@pytest.mark.parametrize("what", ["folded", "baked"])
def test_only_a_slot_whose_inputs_are_read_can_still_be_fed(what: str) -> None:
    model = adapted(baked=what == "baked", bottleneck=2)
    DAMAGES["folded" if what == "folded" else "marks stripped"][0](model.proto)
    said = damages(model)
    assert [text.split(": ")[0] for text in said] == ["slot 'fc1'", "slot 'fc2'"]
    assert not [text for text in said if "can still be fed" in text]


def test_slots_whose_record_is_gone_are_told_from_the_names_of_their_nodes() -> None:
    base = two_layers()
    base.graph.node[1].name = "block/act/Relu"
    model = oa.insert(oa.Model(base), after=["fc2", "block/act/Relu"])
    del model.proto.metadata_props[:]
    (said,) = damages(model)
    assert "with it 'block/act/Relu', 'fc2' (" in said


@pytest.mark.parametrize("inputs", [[], ["gone", "gone"]])
def test_a_normalisation_of_a_slot_that_is_not_whole_is_named(inputs: list[str]) -> None:
    model = adapted()
    node = model.proto.graph.node.add(op_type="Mul", input=inputs, name="adapter.fc1/norm")
    node.metadata_props.add(key=SLOT_KEY, value="fc1")
    assert "slot 'fc1' has other operators than were inserted" in " ".join(damages(model))


def test_one_damage_does_not_hide_another() -> None:
    model = adapted()
    _drop(model.proto.graph.input, {"adapter.fc1.down"})
    _other_type(model.proto)
    said = " ".join(damages(model))
    assert "'adapter.fc1.down' was stripped" in said
    assert "'adapter.fc1.up' is declared as float16" in said

    model = adapted()
    (record,) = model.proto.metadata_props
    record.value = record.value.replace('["down","up"]', '["down"]', 1)
    next(n for n in model.proto.graph.node if n.name == "adapter.fc2/act").op_type = "Tanh"
    said = " ".join(damages(model))
    assert "part 'down' of a slot needs 'up'" in said
    assert "slot 'fc2' has other operators" in said


@pytest.mark.parametrize("batched", [False, True])
def test_inputs_without_a_shape_take_any_size(batched: bool) -> None:
    model = adapted(batched=batched)
    for value in model.proto.graph.input:
        value.type.tensor_type.ClearField("shape")
    assert damages(model) == []


def test_a_whole_model_passes_with_exit_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model in (("a", adapted()), ("b", adapted(baked=True, bottleneck=2))):
        path = saved(model, tmp_path / f"{name}.onnx")
        code, said = _check(capsys, path)
        assert code == 0
        assert said.startswith(f"{path}: ok\nnext: ")
    base, checkpoint = trained(tmp_path)
    path = saved(oa.insert_checkpoint(base, checkpoint), tmp_path / "c.onnx")
    file = oa.save_adapter(checkpoint.adapter, tmp_path / "c.npz")
    code, said = _check(capsys, path, file)
    assert code == 0
    assert said.startswith(f"{path}: ok\n{file}: ok\nnext: ")


def _works(path: Path, *sizes: tuple[int, int]) -> bool:
    """Whether adapters of these sizes, one after the other, compute what they should."""
    runtime = session(path, optimised=True)
    for one, two in sizes:
        adapter = oa.Adapter("a", {"fc1": weights(one), "fc2": weights(two, seed=1)})
        (found,) = runtime.run(None, {"x": X, **adapter.feeds()})
        if not np.allclose(found, bumped(X, adapter), 1e-4, 1e-3):
            return False
    return True


def test_shapes_recorded_from_a_filled_adapter_are_stale_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"fc1": weights(3), "fc2": weights(3)}
    filled = oa.fill(adapted(), oa.make_adapter(adapted(), "a", values))
    assert _works(saved(filled, tmp_path / "m.onnx"), (3, 3), (3, 5), (7, 2))
    _record(filled.proto, 3)
    path = saved(filled, tmp_path / "m.onnx")
    # ONNX Runtime 1.32 believes it, plans one buffer for both slots, and fails at (3, 5).
    code, said = _check(capsys, path)
    assert code == 1
    assert "fc2/down" in said


def test_shapes_that_onnx_infers_are_not_stale(tmp_path: Path) -> None:
    inferred = shape_inference.infer_shapes(adapted().proto)
    onnx.save(inferred, tmp_path / "m.onnx")
    assert len(inferred.graph.value_info) > 4
    assert damages(oa.open_model(tmp_path / "m.onnx")) == []
    assert _works(tmp_path / "m.onnx", (3, 5), (7, 2), (1, 9))


# The tools themselves.


def _graphsurgeon(path: Path, result: Path) -> None:
    onnx.save(gs.export_onnx(gs.import_onnx(onnx.load(path))), result)


def _offline(path: Path, result: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(result)
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _quantize(path: Path, result: Path) -> None:
    quantize_dynamic(path, result)


def _convert(path: Path, result: Path) -> None:
    onnx.save(version_converter.convert_version(onnx.load(path), 18), result)


def _prefix(path: Path, result: Path) -> None:
    onnx.save(onnx.compose.add_prefix(onnx.load(path), "m/"), result)


def _extract(path: Path, result: Path) -> None:
    onnx.utils.extract_model(str(path), str(result), ["x"], ["y"])


@pytest.mark.parametrize(
    "tool", [_graphsurgeon, _offline, _quantize, _convert, _prefix, _extract]
)
def test_a_model_that_a_tool_rewrote_is_told_from_a_whole_one(
    tool: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(adapted(), tmp_path / "adapted.onnx")
    result = tmp_path / "result.onnx"
    tool(path, result)
    code, said = _check(capsys, result)
    assert code == 1
    assert "fc1" in said


@pytest.mark.parametrize("tool", [_offline, _convert])
def test_slots_that_still_work_are_told_from_broken_ones(
    tool: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(adapted(), tmp_path / "adapted.onnx")
    tool(path, tmp_path / "result.onnx")
    assert _works(tmp_path / "result.onnx", (3, 5), (7, 2))
    code, said = _check(capsys, tmp_path / "result.onnx")
    assert code == 1
    assert said.count("can still be fed") == 2
    assert "docs/after-other-tools.md" in said


def test_a_node_put_among_the_nodes_of_a_slot_is_named_and_keeps_it_in(tmp_path: Path) -> None:
    model = adapted()
    slot = oa.list_slots(model)[0]
    for place, name in enumerate((slot.weight("up"), "adapter.fc1/down", slot.inner)):
        changed = model.copy()
        node = helper.make_node("Neg", [name], [f"extra{place}"], f"reader{place}")
        changed.proto.graph.node.append(node)
        (found,) = damages(changed)
        assert f"'reader{place}' (Neg) reads {name!r} of slot 'fc1'" in found
        with pytest.raises(SlotError, match=f"reader{place}"):
            oa.remove(changed)


@pytest.mark.parametrize("what", ["folded weight", "input"])
def test_a_replaceable_weight_that_was_stripped_is_named(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, checkpoint = trained(tmp_path)
    model = oa.insert_checkpoint(base, checkpoint)
    items = model.proto.graph.input if what == "input" else model.proto.graph.initializer
    _drop(items, {"base.fc2.bias"})
    onnx.save(model.proto, tmp_path / "m.onnx")
    code, said = _check(capsys, tmp_path / "m.onnx")
    assert code == 1
    assert "base.fc2.bias" in said


@pytest.mark.parametrize("what", ["inputs stripped", "defaults stripped", "marks stripped"])
def test_nothing_is_filled_into_or_taken_out_of_damaged_slots(what: str) -> None:
    model = adapted()
    DAMAGES[what][0](model.proto)
    adapter = oa.Adapter("a", {"fc1": weights(), "fc2": weights()})
    for action in (lambda: oa.fill(model, adapter), lambda: oa.extract(model)):
        with pytest.raises(SlotError):
            action()


def test_a_node_of_the_bases_that_is_called_adapter_is_no_lost_slot() -> None:
    base = two_layers()
    base.graph.node[1].name = "adapter.act"
    with pytest.raises(SlotError, match="no slots"):
        damages(oa.Model(base))


def test_a_model_without_slots_cannot_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(two_layers(), tmp_path / "base.onnx")
    code, out, err = cli(capsys, "check", str(tmp_path / "base.onnx"))
    assert (code, out) == (2, "")
    assert "error: base.onnx has no slots" in err
    assert "hint: " in err
