"""Slots at several places with one set of weights: modules that run several times."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from adapter_models import peft_folder
from onnx import numpy_helper
from slot_models import cli, run
from trained_cases import CASES

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.edit.insert import all_places
from onnx_adapt.errors import CheckpointError, ManifestError, SiteError, SlotError
from onnx_adapt.slot.manifest import KEY, manifest_from_text
from onnx_adapt.slot.places import further_place, owners

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 4)).astype("f")
V = RNG.standard_normal((4, 4)).astype("f")
X = RNG.standard_normal((3, 4)).astype("f")

TWICE = """g (float[B,4] x) => (float[B,4] y) {
  ["/fc/MatMul"] a = MatMul(x, w)
  ["/Tanh"] b = Tanh(a)
  ["/fc_1/MatMul"] c = MatMul(b, w)
  ["/head/MatMul"] y = MatMul(c, v)
}"""
BRANCHES = """g (float[B,4] x, bool c) => (float[B,4] y) {
  ["/if"] h = If(c) <
    then_branch = t () => (float[B,4] p) {["/fc/MatMul"] p = MatMul(x, w)},
    else_branch = e () => (float[B,4] q) {
      ["/fc/MatMul"] o = MatMul(x, w)
      q = Tanh(o)
    }>
  ["/head/MatMul"] y = MatMul(h, v)
}"""


def _base(text: str) -> oa.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    proto.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in (("w", W), ("v", V))
    )
    onnx.checker.check_model(proto, full_check=True)
    return oa.Model(proto)


def _weights(seed: int = 1, rank: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"down": (4, rank), "up": (rank, 4)}
    return {part: rng.standard_normal(shape).astype("f") for part, shape in shapes.items()}


def _adapter(model: oa.Model, seed: int = 1, **fields: Any) -> oa.Adapter:
    slots = oa.list_slots(model)
    made = oa.make_adapter(model, str(seed), {s.name: _weights(seed) for s in slots})
    return replace(made, **fields)


def _layer(x: np.ndarray, *weights: dict[str, np.ndarray]) -> np.ndarray:
    """A ReLU adapter, or the sum of several, behind `fc`."""
    h = x @ W
    return h + sum(np.maximum(h @ each["down"], 0) @ each["up"] for each in weights)


def _twice(x: np.ndarray, *weights: dict[str, np.ndarray]) -> np.ndarray:
    return _layer(np.tanh(_layer(x, *weights)), *weights) @ V


def _branch(x: np.ndarray, then: bool, *weights: dict[str, np.ndarray]) -> np.ndarray:
    h = _layer(x, *weights)
    return (h if then else np.tanh(h)) @ V


def _close(got: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, 1e-4, 1e-5)


def test_a_module_that_runs_twice_has_one_slot_with_one_set_of_inputs() -> None:
    model = oa.insert(_base(TWICE), after="fc")
    assert [slot.name for slot in oa.list_slots(model)] == ["fc"]
    assert [value.name for value in model.proto.graph.input] == [
        *("x", "adapter.fc.down", "adapter.fc.up")
    ]
    adapter = _adapter(model)
    _close(run(model, {"x": X, **adapter.feeds()})[0], _twice(X, _weights()))
    _close(run(model, {"x": X})[0], _twice(X))
    assert damages(model) == []


def test_addresses_and_globs_give_each_call_a_slot_of_its_own() -> None:
    base = _base(TWICE)
    for after in (["main:a", "main:c"], "f?"):
        model = oa.insert(base, after=after)
        assert [slot.name for slot in oa.list_slots(model)] == ["fc", "fc.2"]
        assert all_places(model) == oa.list_slots(model)


@pytest.mark.parametrize("then", [True, False])
def test_a_module_in_both_branches_has_one_set_of_weights(then: bool) -> None:
    base = _base(BRANCHES)
    model = oa.insert(base, after="fc")
    feeds = {"x": X, "c": np.array(then)}
    adapter = _adapter(model)
    _close(run(model, {**feeds, **adapter.feeds()})[0], _branch(X, then, _weights()))
    _close(run(oa.bake(oa.fill(model, adapter)), feeds)[0], _branch(X, then, _weights()))
    assert oa.remove(model).proto == base.proto


def test_the_branch_that_is_not_taken_is_said_to_be_unproven_by_place() -> None:
    base = _base(BRANCHES)
    model = oa.insert(base, after="fc")
    both = [{"x": X, "c": np.array(c)} for c in (True, False)]
    assert oa.verify(base, model, inputs=both).warnings == ()
    report = oa.verify(base, model, inputs=both[:1])
    assert report.passed
    assert report.warnings == ("slot 'fc@2' is not reached with these inputs",)
    first, second = report.slots
    assert (first.name, second.name, second.shares) == ("fc", "fc@2", "fc")
    assert first.effect
    assert (second.error, second.effect) == (None, 0)
    off = oa.verify(base, model, inputs=both[1:], weights=False)
    assert off.warnings == ("slot 'fc' is not reached with these inputs",)


def test_a_wrong_place_is_found_though_the_other_is_right() -> None:
    base = _base(TWICE)
    model = oa.insert(base, after="fc")
    (node,) = [n for n in model.proto.graph.node if n.name == "adapter.fc@2/act"]
    node.op_type = "Tanh"
    report = oa.verify(base, model, inputs={"x": X})
    assert not report.passed
    assert "'fc@2'" in next(check.detail for check in report.checks if check.name == "on")


def test_remove_takes_a_slot_from_all_its_places_and_leaves_the_others() -> None:
    base = _base(TWICE)
    with_head = oa.insert(base, after="head")
    model = oa.insert(with_head, after="fc")
    assert oa.remove(model, slots="fc").proto == with_head.proto
    assert oa.remove(model).proto == base.proto
    with pytest.raises(SlotError, match="'fc@2'"):
        oa.remove(model, slots="fc@2")


def test_slots_are_stacked_on_all_places_and_come_out_in_any_order() -> None:
    base = _base(TWICE)
    once = oa.insert(base, after="fc")
    model = oa.insert(once, after="fc", activation="tanh")
    assert [slot.name for slot in all_places(model)] == ["fc", "fc@2", "fc.2", "fc.2@2"]
    assert oa.verify(base, model, inputs={"x": X}).passed
    assert oa.remove(model, slots="fc.2").proto == once.proto
    _close(run(oa.remove(model, slots="fc"), {"x": X})[0], _twice(X))
    assert oa.remove(oa.remove(model, slots="fc")).proto == base.proto


def test_a_filled_model_gives_its_one_set_of_weights_back() -> None:
    model = oa.insert(_base(TWICE), after="fc")
    adapter = _adapter(model)
    for made in (oa.fill(model, adapter), oa.bake(oa.fill(model, adapter))):
        _close(run(made, {"x": X})[0], _twice(X, _weights()))
        found = oa.extract(made, name="again")
        assert list(found.weights) == list(found.activations) == ["fc"]
        assert damages(made) == []


def test_a_session_swaps_and_blends_the_one_set_of_weights() -> None:
    model = oa.insert(_base(TWICE), after=["fc", "head"])
    half = {"fc": _weights()}  # `head` stays off, and `fc` must not be switched off with it
    adapter = oa.make_adapter(model, "half", half)
    other = oa.make_adapter(model, "other", {"fc": _weights(2, rank=3)})
    with oa.AdapterSession(model) as session:
        for name, each in (("one", adapter), ("two", other)):
            session.load(name, each, allow_partial=True)
        _close(session.run({"x": X}, adapter="one")["y"], _twice(X, half["fc"]))
        blended = session.run({"x": X}, adapter={"one": 1, "two": 1})["y"]
        _close(blended, _twice(X, half["fc"], _weights(2, rank=3)))
        _close(session.run({"x": X})["y"], _twice(X))


def test_a_batched_slot_gives_rows_their_adapters_at_all_places() -> None:
    base = _base(TWICE)
    model = oa.insert(base, after="fc", batched=True)
    assert oa.verify(base, model, inputs={"x": X}).passed
    one, two = _adapter(model, 1), _adapter(model, 2)
    with oa.AdapterSession(model, {"one": one, "two": two}) as session:
        got = session.run({"x": X}, adapter=["two", None, "one"])["y"]
    wanted = [_twice(X[:1], _weights(2)), _twice(X[1:2]), _twice(X[2:], _weights(1))]
    _close(got, np.concatenate(wanted))


def test_calls_that_cannot_share_weights_are_refused() -> None:
    text = """g (float[B,4] x) => (float[B,4] y, float[B,4,1] z) {
      s = Constant<value = int64[3] {0, 4, 1}>()
      ["/act/Relu"] y = Relu(x)
      r = Reshape(x, s)
      ["/act_1/Relu"] z = Relu(r)
    }"""
    with pytest.raises(SiteError) as caught:
        oa.insert(_base(text), after="act")
    assert "act" in caught.value.message


def test_slots_lists_one_row_and_json_has_each_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.onnx"
    oa.save_model(oa.insert(_base(BRANCHES), after=["fc", "head"]), path)
    code, out, _ = cli(capsys, "slots", str(path), "--json")
    assert code == 0
    listed = json.loads(out)["slots"]
    assert [slot["name"] for slot in listed] == ["fc", "head"]
    places = listed[0]["places"]
    assert [(p["name"], p["graph"], p["tensor"]) for p in places] == [
        ("fc", "main//if.then_branch", "p"),
        ("fc@2", "main//if.else_branch", "o"),
    ]
    assert " fc@2 " not in cli(capsys, "slots", str(path))[1]


def test_the_report_counts_the_weights_once() -> None:
    base = _base(TWICE)
    model = oa.insert(base, after="fc")
    from onnx_adapt.report.overview import overview

    found = overview(base, model, inputs={"x": X}, bottleneck=2)
    assert found.report.passed
    assert found.costs is not None
    assert [cost.parameters for cost in found.costs.slots] == [16, 0]
    assert {cost.flops for cost in found.costs.slots} != {0}


# Records


def _record(model: oa.Model) -> dict[str, Any]:
    (text,) = [entry.value for entry in model.proto.metadata_props if entry.key == KEY]
    return json.loads(text)


@pytest.mark.parametrize(
    "change",
    [
        {"shares": "nobody"},
        {"shares": "fc@2"},
        {"width": 5},
        {"dtype": "float16"},
        {"parts": ["up", "down"]},
        {"swappable": False},
        {"bottleneck": 3},
    ],
    ids=str,
)
def test_a_record_whose_places_cannot_share_weights_is_damaged(change: dict[str, Any]) -> None:
    record = _record(oa.insert(_base(TWICE), after="fc"))
    record["slots"][1] |= change
    with pytest.raises(ManifestError, match="cannot use the weights of"):
        manifest_from_text(json.dumps(record))


# Checkpoints


def _lora(path: Path, seed: int = 1, rank: int = 2, **config: Any) -> Path:
    rng = np.random.default_rng(seed)
    key = "base_model.model.fc.lora_{}.weight"
    a, b = rng.standard_normal((rank, 4)), rng.standard_normal((4, rank))
    tensors = {key.format("A"): a.astype("f"), key.format("B"): b.astype("f")}
    if config.get("use_dora"):
        magnitude = np.linalg.norm(W.T, axis=1) * 1.5
        tensors["base_model.model.fc.lora_magnitude_vector"] = magnitude.astype("f")
    return peft_folder(path, tensors, r=rank, lora_alpha=rank, target_modules=["fc"], **config)


@pytest.mark.parametrize(
    ("name", "count"), [("peft_albert_lora", 4), ("peft_albert_dora_ts", 2)]
)
def test_the_layer_that_albert_runs_three_times_has_one_set_of_weights(
    name: str, count: int, tmp_path: Path
) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    assert len(checkpoint.adapter.weights) == count
    model = oa.insert_checkpoint(base, checkpoint)
    assert [len(all_places(model)), len(oa.list_slots(model))] == [3 * count, count]
    assert oa.verify(base, model, inputs=case.inputs()).passed
    file = oa.save_adapter(oa.convert(case.adapter, model, name="again"), tmp_path / "a.npz")
    with oa.AdapterSession(model, {"a": file}) as session:
        assert case.distance(session.run(case.inputs(), adapter="a")) < case.tolerance
    baked = oa.insert_checkpoint(base, checkpoint, baked=True)
    assert len(oa.extract(baked, name="baked").weights) == count
    batched = oa.insert_checkpoint(base, checkpoint, batched=True)
    with oa.AdapterSession(batched, {"a": file}) as session:
        rows = len(case.inputs()["input_ids"])
        got = session.run(case.inputs(), adapter=["a"] * (rows - 1) + [None])
    name, wanted = case.expected()
    assert np.abs(got[name] - wanted)[: rows - 1].max() < case.tolerance


def test_a_checkpoint_in_both_branches_is_one_slot(tmp_path: Path) -> None:
    base = _base(BRANCHES)
    checkpoint = oa.load_checkpoint(_lora(tmp_path / "a"), base)
    assert [(slot.name, slot.shares) for slot in checkpoint.slots] == [
        ("fc", ""),
        ("fc@2", "fc"),
    ]
    model = oa.insert_checkpoint(base, checkpoint)
    ba = _delta(checkpoint)
    for then in (True, False):
        h = X @ W + X @ ba
        wanted = (h if then else np.tanh(h)) @ V
        feeds = {"x": X, "c": np.array(then), **checkpoint.adapter.feeds()}
        _close(run(model, feeds)[0], wanted)


def _delta(checkpoint: oa.Checkpoint) -> np.ndarray:
    weights = checkpoint.adapter.weights["fc"]
    return np.asarray(weights["down"] @ weights["up"])


def _with_another_weight(base: oa.Model) -> oa.Model:
    """The second call reads a weight that is not quite the first call's."""
    changed = base.copy()
    changed.proto.graph.initializer.append(numpy_helper.from_array(W * 1.01, "w2"))
    (node,) = [n for n in changed.proto.graph.node if n.name == "/fc_1/MatMul"]
    node.input[1] = "w2"
    node.name = "/fc/MatMul_1"
    return changed


def test_dora_on_calls_with_other_weights_has_a_slot_for_each(tmp_path: Path) -> None:
    base = _with_another_weight(_base(TWICE))
    dora = oa.load_checkpoint(_lora(tmp_path / "dora", use_dora=True), base)
    assert [slot.name for slot in owners(dora.slots)] == ["fc", "fc.2"]
    lora = oa.load_checkpoint(_lora(tmp_path / "lora"), base)
    assert [slot.name for slot in owners(lora.slots)] == ["fc"]
    model = oa.insert_checkpoint(base, dora)
    assert list(oa.convert(tmp_path / "dora", model).weights) == ["fc", "fc.2"]
    shared = oa.insert_checkpoint(base, lora)
    with pytest.raises(CheckpointError, match="no slot like"):
        oa.convert(tmp_path / "dora", shared)


def test_a_shared_checkpoint_fills_the_separate_slots_of_an_older_model(
    tmp_path: Path,
) -> None:
    base = _base(TWICE)
    checkpoint = oa.load_checkpoint(_lora(tmp_path / "a"), base)
    first, second = checkpoint.slots
    old = replace(
        *(second,), name="fc.2", shares="", inner="adapter.fc.2/target", source=second.source
    )
    weights = dict.fromkeys(("fc", "fc.2"), checkpoint.adapter.weights["fc"])
    before = replace(
        checkpoint,
        slots=(first, old),
        adapter=replace(checkpoint.adapter, weights=weights),
    )
    model = oa.insert_checkpoint(base, before)
    adapter = oa.convert(_lora(tmp_path / "b", seed=2, rank=3), model)
    assert list(adapter.weights) == ["fc", "fc.2"]
    got = run(model, {"x": X, **adapter.feeds()})[0]
    ba = adapter.weights["fc"]["down"] @ adapter.weights["fc"]["up"]
    _close(got, np.tanh(X @ (W + ba)) @ (W + ba) @ V)


def _forced_to_share(checkpoint: oa.Checkpoint) -> oa.Checkpoint:
    """A checkpoint whose second slot uses the weights of its first."""
    first, second = checkpoint.slots
    weights = {first.name: checkpoint.adapter.weights[first.name]}
    return replace(
        checkpoint,
        slots=(first, further_place(second, first, set())),
        adapter=replace(checkpoint.adapter, weights=weights),
    )


def test_a_checkpoint_with_other_weights_for_each_place_of_a_slot_is_refused(
    tmp_path: Path,
) -> None:
    base = _with_another_weight(_base(TWICE))
    dora = oa.load_checkpoint(_lora(tmp_path / "dora", use_dora=True), base)
    model = oa.insert_checkpoint(base, _forced_to_share(dora))
    with pytest.raises(CheckpointError, match="has others for 'c'") as caught:
        oa.convert(tmp_path / "dora", model)
    assert "insert --adapter" in caught.value.hint


def test_a_slot_at_more_places_than_a_checkpoint_changes_is_refused(tmp_path: Path) -> None:
    base = _base(TWICE)
    for node in base.proto.graph.node:
        node.name = node.name.replace("/fc_1/", "/other/")
    rng = np.random.default_rng(1)
    tensors = {
        f"base_model.model.{module}.lora_{matrix}.weight": rng.standard_normal(shape)
        for module in ("fc", "other")
        for matrix, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    tensors = {key: value.astype("f") for key, value in tensors.items()}
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["fc", "other"]}
    both = oa.load_checkpoint(peft_folder(tmp_path / "both", tensors, **options), base)
    model = oa.insert_checkpoint(base, _forced_to_share(both))
    with pytest.raises(CheckpointError, match="changes nothing at 'c'") as caught:
        oa.convert(_lora(tmp_path / "one"), model, allow_partial=True)
    assert "insert --adapter" in caught.value.hint
