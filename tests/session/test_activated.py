"""ALoRA: an adapter that is on from its invocation tokens on, against PEFT's numbers."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from sequence_cases import ROOT, answers, base_of, steps
from slot_models import cli

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.errors import AdapterError, CheckpointError, SlotError
from onnx_adapt.session.adapter_feeds import invoked

WHOLE = ["alora_llama", "alora_gpt2"]
TOLERANCE = 1e-4


@cache
def _case(name: str) -> tuple[oa.Model, oa.Model, oa.Adapter]:
    base = oa.open_model(base_of(name))
    checkpoint = oa.load_checkpoint(ROOT / name / "adapter", base, name=name)
    return base, oa.insert_checkpoint(base, checkpoint), checkpoint.adapter


def _feeds(name: str) -> dict[str, np.ndarray]:
    found = answers(name)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def _gates(model: oa.Model, active: np.ndarray) -> dict[str, np.ndarray]:
    value = active[..., None].astype(np.float32)
    return {slot.weight("active"): value for slot in oa.list_slots(model)}


def _off(name: str, found: np.ndarray) -> float:
    """How far logits are from PEFT's, where no token is padding."""
    wanted = answers(name)
    there = wanted["attention_mask"].astype(bool)
    return float(np.abs(found - wanted["logits"])[there].max())


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("suffix", ["safetensors", "onnx_adapter", "npz"])
def test_a_session_gives_what_peft_gives_from_the_adapter_s_file(
    name: str, suffix: str, tmp_path: Path
) -> None:
    _, model, adapter = _case(name)
    file = oa.save_adapter(adapter, tmp_path / f"a.{suffix}")
    with oa.AdapterSession(model, {"a": file}) as session:
        base, found = session.run(_feeds(name)), session.run(_feeds(name), adapter="a")
    assert _off(name, found["logits"]) < TOLERANCE
    changed = np.abs(found["logits"] - base["logits"]).max(axis=2) > 0.01
    wanted = np.zeros((4, 7), bool)
    wanted[0, 4:] = wanted[2] = wanted[3, 1:] = True
    assert (changed == wanted).all()


def test_a_run_of_other_runtimes_feeds_the_gates_itself(tmp_path: Path) -> None:
    _, model, adapter = _case("alora_gpt2")
    oa.save_model(model, tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    feeds = _feeds("alora_gpt2")
    active = _gates(model, invoked(feeds["input_ids"], (7, 8)))
    (found,) = session.run(["logits"], {**feeds, **adapter.feeds(), **active})
    assert _off("alora_gpt2", found) < TOLERANCE


def test_rows_may_have_an_alora_a_plain_lora_and_the_base() -> None:
    _, model, adapter = _case("alora_llama")
    plain = replace(adapter, name="plain", invocation_tokens=())
    feeds = _feeds("alora_llama")
    with oa.AdapterSession(model, {"a": adapter}) as session:
        alone = session.run(feeds, adapter=plain)["logits"]
        rows = session.run(feeds, adapter=["a", plain, None, "a"])["logits"]
        base = session.run(feeds)["logits"]
    assert _off("alora_llama", np.stack([rows[0], base[1], rows[3], rows[3]])) > TOLERANCE
    wanted = answers("alora_llama")["logits"]
    np.testing.assert_allclose(rows[[0, 3]], wanted[[0, 3]], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(rows[1], alone[1], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(rows[2], base[2], rtol=0, atol=TOLERANCE)
    assert np.abs(alone[1] - base[1]).max(axis=1).min() > 0.01, "a plain LoRA is always on"


def test_token_by_token_the_caller_says_for_which_rows_it_is_on() -> None:
    _, model, adapter = _case("alora_past")
    was = invoked(answers("alora_past")["input_ids"][:, :7], (7, 8)).any(axis=1)[:, None]
    with oa.AdapterSession(model, {"a": adapter}) as session:
        for step in steps(session, "alora_past", "a", {}, _gates(model, was)):
            np.testing.assert_allclose(step.found, step.wanted, rtol=0, atol=TOLERANCE)
        with pytest.raises(AdapterError, match="only the last 1 of 8 tokens") as caught:
            list(steps(session, "alora_past", "a", {}, {}))
    assert "active" in str(caught.value.hint)


def test_bound_memory_and_ort_values_give_the_same() -> None:
    _, model, adapter = _case("alora_llama")
    feeds = _feeds("alora_llama")
    with oa.AdapterSession(model, {"a": adapter}) as session:
        values = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in feeds.items()}
        found = session.run_with_ort_values(values, adapter="a")["logits"].numpy()
        assert _off("alora_llama", found) < TOLERANCE
        binding = session.io_binding()
        held = {name: value.copy() for name, value in feeds.items()}
        for name, value in held.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding, "a")
        assert _off("alora_llama", binding.copy_outputs_to_cpu()[0]) < TOLERANCE
        held["input_ids"][:] = 1  # the gates follow what the memory holds now
        session.run_with_iobinding(binding, "a")
        bound = binding.copy_outputs_to_cpu()[0]
        np.testing.assert_array_equal(bound, session.run(held)["logits"])


@pytest.mark.parametrize("name", [*WHOLE, "alora_past"])
def test_the_slots_verify_and_the_base_comes_back(name: str, tmp_path: Path) -> None:
    base, model, _ = _case(name)
    report = oa.verify(base, model, inputs=_whole(name))
    assert report.passed, [check for check in report.checks if not check.passed]
    assert damages(model) == []
    oa.save_model(oa.remove(model), tmp_path / "removed.onnx")
    assert (tmp_path / "removed.onnx").read_bytes() == base_of(name).read_bytes()


def _whole(name: str) -> dict[str, np.ndarray]:
    feeds = _feeds(name)
    if name != "alora_past":
        return feeds
    rows, length = feeds["input_ids"].shape
    feeds["position_ids"] = np.tile(np.arange(length), (rows, 1))
    empty = np.zeros((rows, 2, 0, 4), np.float32)
    parts = (f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value"))
    return feeds | dict.fromkeys(parts, empty)


def test_a_model_whose_weights_must_be_fed_gives_the_same() -> None:
    _, model, adapter = _case("alora_llama")
    with oa.AdapterSession(oa.export(model)[0], {"a": adapter}) as session:
        found = session.run(_feeds("alora_llama"), adapter="a")["logits"]
    assert _off("alora_llama", found) < TOLERANCE


ROWS: list[tuple[list[int], list[int], list[int]]] = [
    ([5, 7, 8, 2, 7, 8, 3], [7, 8], [0, 0, 0, 0, 1, 1, 1]),
    ([0, 1, 2, 7, 3, 8, 7], [7, 8], [0] * 7),
    ([7, 7, 7, 1], [7, 7], [0, 1, 1, 1]),
    ([1, 2], [1, 2, 3], [0, 0]),
    ([1, 2], [2], [0, 1]),
    ([], [2], []),
]


@pytest.mark.parametrize(("ids", "tokens", "wanted"), ROWS)
def test_it_is_on_from_where_the_tokens_begin_last(
    ids: list[int], tokens: list[int], wanted: list[int]
) -> None:
    found = invoked(np.array([ids], np.int64), tuple(tokens))
    assert found.astype(int).tolist() == [wanted]


def test_what_cannot_switch_on_is_refused() -> None:
    base, model, adapter = _case("alora_llama")
    checkpoint = oa.load_checkpoint(ROOT / "alora_llama" / "adapter", base)
    slots = (replace(slot, by_token=False) for slot in checkpoint.slots)
    always = oa.insert_checkpoint(base, replace(checkpoint, slots=tuple(slots)))
    with (
        oa.AdapterSession(always) as session,
        pytest.raises(AdapterError, match=r"and slot 'model.*' always is"),
    ):
        session.load("a", adapter)
    with pytest.raises(AdapterError, match="on for all tokens"):
        oa.fill(model, adapter)
    for form, word in (({"baked": True}, "is fed"), ({"batched": True}, "batched as well")):
        with pytest.raises(SlotError, match=word):
            oa.insert_checkpoint(base, checkpoint, **form)
    other = replace(adapter, name="other", invocation_tokens=(7,))
    with pytest.raises(AdapterError, match="other invocation tokens"):
        oa.blend([adapter, other], [0.5, 0.5])
    assert oa.blend([adapter, adapter], [0.5, 0.5]).invocation_tokens == (7, 8)


def test_feeds_that_do_not_tell_where_the_tokens_are_are_refused() -> None:
    _, model, adapter = _case("alora_llama")
    gates = _gates(model, np.ones((4, 7)))
    one = dict(list(gates.items())[:1])
    with oa.AdapterSession(model, {"a": adapter}) as session:
        with pytest.raises(AdapterError, match="of other slots is"):
            session.run({**_feeds("alora_llama"), **one}, adapter="a")
        binding = session.io_binding()
        with pytest.raises(AdapterError, match="does not tell"):
            session.run_with_iobinding(binding, "a")


@pytest.mark.parametrize("tokens", ["7 8", [7, -8], [7.0], {"7": 8}])
def test_invocation_tokens_that_are_no_ids_are_refused(tokens: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "alora_llama" / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alora_invocation_tokens"] = tokens
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no list of token ids"):
        oa.load_checkpoint(folder, oa.open_model(base_of("alora_llama")))


def test_it_goes_back_to_peft_with_its_tokens_and_to_no_other_library(tmp_path: Path) -> None:
    base, model, adapter = _case("alora_gpt2")
    oa.save_checkpoint(adapter, tmp_path / "back", model=model, library="peft")
    again = oa.load_checkpoint(tmp_path / "back", base)
    with oa.AdapterSession(oa.insert_checkpoint(base, again)) as session:
        found = session.run(_feeds("alora_gpt2"), adapter=again.adapter)
    assert _off("alora_gpt2", found["logits"]) < TOLERANCE
    with pytest.raises(CheckpointError, match="MLX-LM has no such adapter"):
        oa.save_checkpoint(adapter, tmp_path / "mlx", model=model, library="mlx")


def test_the_commands_insert_convert_and_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = str(ROOT / "alora_llama" / "adapter"), str(base_of("alora_llama"))
    model, file, out = (str(tmp_path / name) for name in ("m.onnx", "a.safetensors", "y.npz"))
    feeds = str(tmp_path / "x.npz")
    np.savez(feeds, **_feeds("alora_llama"))
    lines = (
        ("insert", base, "--adapter", folder, "-o", model),
        ("convert", folder, "--for", model, "-o", file),
        ("run", model, "--inputs", feeds, "--adapter", file, "-o", out),
    )
    assert [cli(capsys, *line)[0] for line in lines] == [0, 0, 0]
    assert _off("alora_llama", np.load(out)["logits"]) < TOLERANCE
