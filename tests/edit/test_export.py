"""Exported models: slots whose weights must be fed, for runtimes that need them so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from adapter_models import (
    W2,
    adapted,
    bumped,
    lora,
    peft_folder,
    saved_model,
    trained,
    two_layers,
    weights,
)
from disk_models import X as X64
from disk_models import external
from onnx import numpy_helper
from slot_models import MLP, MODELS, assert_sound, dense, model_of, passes, run, saved, session
from trained_cases import CASES, session_of

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.edit.insert import all_places
from onnx_adapt.errors import AdapterError, RunError, SlotError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
HEADS = ["peft_bert_lora_default_ts", "ah_bert_seq_bn", "peft_vit_lora"]


def _inputs(model: oa.Model) -> list[str]:
    """The inputs that ONNX Runtime wants to be fed."""
    return [item.name for item in session(model.proto).get_inputs()]


def _feeds(model: oa.Model, name: str, seed: int, size: int = 3) -> oa.Adapter:
    slots = oa.list_slots(model)
    return oa.make_adapter(model, name, {s.name: weights(size, seed) for s in slots})


# What plain ONNX Runtime sees.


def test_an_exported_model_refuses_to_run_until_its_weights_are_fed() -> None:
    model, neutral = oa.export(adapted())
    assert_sound(model)
    fed = [f"adapter.{slot}.{part}" for slot in ("fc1", "fc2") for part in ("down", "up")]
    assert _inputs(model) == ["x", *fed]
    with pytest.raises(ValueError, match="Required inputs"):
        run(model, {"x": X})
    off = run(model, {"x": X, **neutral.feeds()})[0]
    np.testing.assert_array_equal(off, run(oa.Model(two_layers()), {"x": X})[0])


@pytest.mark.parametrize("size", [1, 3, 16])
def test_an_adapter_of_any_bottleneck_is_fed(size: int) -> None:
    model, _ = oa.export(adapted())
    adapter = _feeds(model, "a", 4, size)
    found = run(model, {"x": X, **adapter.feeds()})[0]
    np.testing.assert_allclose(found, bumped(X, adapter), 1e-4, 1e-4)


def test_the_neutral_adapter_has_no_empty_tensor_and_symbols_for_the_bottleneck() -> None:
    model, neutral = oa.export(adapted())
    assert {v.shape for v in neutral.feeds().values()} == {(4, 1), (1, 4)}
    assert not any(value.any() for value in neutral.feeds().values())
    declared = {v.name: v.type.tensor_type.shape.dim for v in model.proto.graph.input}
    assert [d.dim_param or d.dim_value for d in declared["adapter.fc1.down"]] == [4, "r_fc1"]


@pytest.mark.parametrize("name", HEADS)
def test_a_trained_head_is_fed_and_gives_pytorch_s_output(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    ordinary = oa.insert_checkpoint(base, checkpoint)
    model, neutral = oa.export(ordinary)
    assert set(neutral.replaced) == set(checkpoint.adapter.replaced)
    path = saved(model, tmp_path / "required.onnx")
    loaded, names = session_of(path), case.inputs()
    found = loaded.run(None, {**names, **checkpoint.adapter.feeds()})
    outputs = {o.name: v for o, v in zip(loaded.get_outputs(), found, strict=True)}
    assert case.distance(outputs) <= case.tolerance
    plain = loaded.run(None, {**names, **neutral.feeds()})[0]
    np.testing.assert_allclose(plain, session_of(case.base).run(None, names)[0], 1e-4, 1e-5)
    passes(base, model)


# There and back.


@pytest.mark.parametrize("name", HEADS)
def test_remove_gives_the_base_of_an_exported_file_byte_for_byte(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    model, neutral = oa.export(
        oa.insert_checkpoint(base, oa.load_checkpoint(case.adapter, base))
    )
    path = saved(model, tmp_path / "required.onnx")
    back = saved(oa.remove(oa.open_model(path)), tmp_path / "back.onnx")
    assert back.read_bytes() == case.base.read_bytes()
    assert oa.load_adapter(oa.save_adapter(neutral, tmp_path / "n.safetensors")).feeds()


def test_fill_gives_an_exported_model_its_defaults_back(tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)
    ordinary = oa.insert_checkpoint(base, checkpoint)
    model, neutral = oa.export(ordinary)
    filled = oa.fill(model, checkpoint.adapter)
    assert _inputs(filled) == ["x"]
    assert filled.proto == oa.fill(ordinary, checkpoint.adapter).proto
    assert oa.remove(filled).proto == base.proto
    assert oa.extract(filled).feeds().keys() == checkpoint.adapter.feeds().keys()
    off = oa.fill(model, neutral)
    np.testing.assert_array_equal(run(off, {"x": X})[0], run(base, {"x": X})[0])
    baked = oa.bake(filled)
    np.testing.assert_array_equal(run(baked, {"x": X})[0], run(filled, {"x": X})[0])


def test_a_slot_is_removed_and_the_rest_must_still_be_fed() -> None:
    model, _ = oa.export(adapted())
    rest = oa.remove(model, slots="fc1")
    assert _inputs(rest) == ["x", "adapter.fc2.down", "adapter.fc2.up"]
    passes(oa.Model(two_layers()), rest)
    assert oa.remove(rest).proto == two_layers()


def test_a_fixed_bottleneck_keeps_its_fresh_weights_in_the_neutral_adapter() -> None:
    ordinary = adapted(bottleneck=2)
    model, neutral = oa.export(ordinary)
    fresh = oa.extract(ordinary)
    assert neutral.weights["fc1"]["down"].shape == (4, 2)
    np.testing.assert_array_equal(neutral.weights["fc1"]["down"], fresh.weights["fc1"]["down"])
    passes(oa.Model(two_layers()), model)


def test_a_slot_at_several_places_is_fed_once() -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,4] y) <{dense("w")}> {{
  ["/fc/MatMul"] a = MatMul(x, w)
  ["/Tanh"] b = Tanh(a)
  ["/fc_1/MatMul"] y = MatMul(b, w)
}}"""
    base = model_of(text)
    model, neutral = oa.export(oa.insert(base, after="fc"))
    assert _inputs(model) == ["x", "adapter.fc.down", "adapter.fc.up"]
    assert len(all_places(model)) == 2
    off = run(model, {"x": X, **neutral.feeds()})[0]
    np.testing.assert_array_equal(off, run(base, {"x": X})[0])
    passes(base, model)
    assert oa.remove(model).proto == base.proto


def test_channels_and_windows_are_fed() -> None:
    base = oa.open_model(MODELS / "dnsmos-p808.onnx")
    model, neutral = oa.export(oa.insert(base, after="conv2d_5"))
    assert neutral.weights["conv2d_5"]["down"].shape == (1, 32, 1, 1)
    passes(base, model)


def test_external_data_and_thin_models_are_exported(tmp_path: Path) -> None:
    path = external(tmp_path / "base.onnx", "w.bin")
    base = oa.open_model(path)
    thin = tmp_path / "thin.onnx"
    oa.save_model(oa.insert(base, after="dense"), thin, thin=True)
    for source in (oa.open_model(thin), oa.insert(base, after="dense")):
        model, neutral = oa.export(source)
        target = saved(model, tmp_path / "required.onnx")
        feeds = {"x": X64, **neutral.feeds()}
        found = session_of(target).run(["y"], feeds)[0]
        np.testing.assert_array_equal(found, session_of(path).run(["y"], {"x": X64})[0])
        passes(path, target)
        back = saved(oa.remove(oa.open_model(target)), tmp_path / "back.onnx")
        assert back.read_bytes() == path.read_bytes()


# Sessions feed the neutral adapter.


def test_a_session_on_an_exported_model_answers_as_one_on_the_model_itself(
    tmp_path: Path,
) -> None:
    base, checkpoint = trained(tmp_path)
    ordinary = oa.insert_checkpoint(base, checkpoint)
    path = saved(oa.export(ordinary)[0], tmp_path / "required.onnx")
    again = tmp_path / "again.onnx_adapter"
    oa.save_adapter(checkpoint.adapter, again)
    adapters = {"fr": checkpoint.adapter, "file": again}
    choices: list[Any] = [None, "fr", "file", {"fr": 0.5}, ["fr", None, {"file": 0.25}]]
    with (
        oa.AdapterSession(path, adapters) as one,
        oa.AdapterSession(ordinary, adapters) as two,
    ):
        assert list(one.inputs) == ["x"]
        assert one.batch_axes == two.batch_axes
        for choice in choices:
            found, wanted = (each.run({"x": X}, adapter=choice)["y"] for each in (one, two))
            np.testing.assert_allclose(found, wanted, 1e-5, 1e-5)
        np.testing.assert_array_equal(one.run({"x": X})["y"], run(base, {"x": X})[0])
        for choice in (None, "file", None):
            fast = one.run_with_ort_values({"x": X}, choice)["y"].numpy()
            np.testing.assert_array_equal(fast, one.run({"x": X}, choice)["y"])
            binding = one.io_binding()
            binding.bind_cpu_input("x", X)
            binding.bind_output("y")
            one.run_with_iobinding(binding, choice)
            np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], fast)


def test_a_partial_adapter_leaves_the_other_slots_off() -> None:
    model, _ = oa.export(adapted())
    part = oa.make_adapter(model, "a", {"fc1": weights(3)})
    with oa.AdapterSession(model) as running:
        running.load("a", part, allow_partial=True)
        found = running.run({"x": X}, adapter="a")["y"]
    np.testing.assert_allclose(found, bumped(X, part), 1e-4, 1e-4)


def test_a_session_says_that_the_input_of_the_base_is_missing() -> None:
    with (
        oa.AdapterSession(oa.export(adapted())[0]) as running,
        pytest.raises(RunError, match="x"),
    ):
        running.run({})


def test_batched_slots_are_fed_with_their_values_for_each_row(tmp_path: Path) -> None:
    base = model_of(MLP)
    ordinary = oa.insert(base, after=["first", "second"], batched=True)
    model, neutral = oa.export(ordinary)
    passes_with_rows = oa.verify(base, model)
    assert passes_with_rows.passed
    assert "rows" in [check.name for check in passes_with_rows.checks]
    np.testing.assert_array_equal(
        run(model, {"x": X, **neutral.feeds()})[0], run(base, {"x": X})[0]
    )
    adapters = {name: _feeds(model, name, i) for i, name in enumerate("ab")}
    fed = {**neutral.feeds(), **adapters["a"].feeds()}
    with (
        oa.AdapterSession(ordinary, adapters) as two,
        oa.AdapterSession(model, adapters) as one,
    ):
        wanted = two.run({"x": X}, adapter="a")["y"]
        np.testing.assert_allclose(run(model, {"x": X, **fed})[0], wanted, 1e-5, 1e-5)
        rows = ["b", None, "a"]
        found, wanted = (s.run({"x": X}, adapter=rows)["y"] for s in (one, two))
        np.testing.assert_allclose(found, wanted, 1e-5, 1e-5)
    path = saved(oa.remove(model), tmp_path / "back.onnx")
    assert path.read_bytes() == saved(base, tmp_path / "base.onnx").read_bytes()


# What makes no sense is refused.


def test_baked_filled_and_exported_models_are_not_exported(tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)
    ordinary = oa.insert_checkpoint(base, checkpoint)
    full = oa.fill(ordinary, checkpoint.adapter)
    head = replace(checkpoint.adapter, weights={})
    refused = {
        "are baked": oa.bake(full),
        "'fc1' has trained weights": full,
        "'base.fc2.bias' has trained weights": oa.fill(ordinary, head, allow_partial=True),
        "exported already": oa.export(ordinary)[0],
        "has no slots": base,
    }
    for message, model in refused.items():
        with pytest.raises(SlotError, match=message) as told:
            oa.export(model)
        assert told.value.hint


def test_slots_go_into_the_model_from_before_the_export(tmp_path: Path) -> None:
    model, _ = oa.export(adapted())
    with pytest.raises(SlotError, match="is exported") as told:
        oa.insert(model, after="fc1")
    assert "exported from" in told.value.hint
    base = oa.open_model(saved_model(tmp_path / "base.onnx"))
    folder = peft_folder(tmp_path / "fr", lora())
    with pytest.raises(SlotError, match="is exported"):
        oa.insert_checkpoint(model, oa.load_checkpoint(folder, base))


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    model, _ = oa.export(adapted())
    wrong = replace(_feeds(model, "a", 1), fingerprint="sha256:" + "0" * 64)
    with pytest.raises(AdapterError, match="another base"):
        oa.fill(model, wrong)


def test_damage_to_an_exported_model_is_found(tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)
    model, _ = oa.export(oa.insert_checkpoint(base, checkpoint))
    assert damages(model) == []

    def broken(change: Any) -> str:
        copy = oa.Model(onnx.ModelProto.FromString(model.proto.SerializeToString()))
        change(copy.proto.graph)
        with pytest.raises(SlotError):
            oa.remove(copy)
        return "\n".join(damages(copy))

    name = "adapter.fc1.down"
    fixed = numpy_helper.from_array(np.zeros((4, 1), "f"), name)
    assert "has a default" in broken(lambda graph: graph.initializer.append(fixed))
    assert f"input {name!r} is gone" in broken(lambda graph: _drop(graph.input, name))
    assert "'base.fc2.bias' is not replaceable any more" in broken(
        lambda graph: _drop(graph.initializer, "base.fc2.bias.default")
    )


def _drop(items: Any, name: str) -> None:
    del items[[item.name for item in items].index(name)]


def test_a_weight_that_lost_a_slot_s_nodes_fails_the_proof() -> None:
    model, _ = oa.export(adapted())
    wrong = onnx.ModelProto.FromString(model.proto.SerializeToString())
    for node in wrong.graph.node:
        if node.name == "/fc2/MatMul":
            stored = next(t for t in wrong.graph.initializer if t.name == node.input[1])
            stored.CopyFrom(numpy_helper.from_array(1.5 * W2.T, stored.name))
    assert not oa.verify(oa.Model(two_layers()), oa.Model(wrong)).passed
