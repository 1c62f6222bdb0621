"""Prefix tuning, CARTRIDGE, prompt tuning and P-tuning: PEFT's numbers, call by call."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file
from sequence_cases import PAST, ROOT, answers, steps
from slot_models import cli

import onnx_adapt as oa
from onnx_adapt.adapter.states import past_of
from onnx_adapt.errors import AdapterError, AdaptError, CheckpointError, SlotError
from onnx_adapt.session.first_past import past_feeds

METHODS = ["prefix", "prefix_projection", "cartridge", "prompt", "p_tuning"]
TOLERANCE = 1e-5
NAMES = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]


@cache
def _adapter(name: str) -> oa.Adapter:
    return oa.convert(ROOT / name / "adapter", oa.open_model(PAST))


@pytest.mark.parametrize("name", METHODS)
def test_a_session_decodes_what_peft_decodes(name: str, tmp_path: Path) -> None:
    file = oa.save_adapter(_adapter(name), tmp_path / "a.safetensors")
    with oa.AdapterSession(PAST, {"a": file}) as session:
        found = list(steps(session, name, "a", {}, {}))
        base = list(steps(session, name, None, {}, {}))
    assert len(found) == 5
    for step, plain in zip(found, base, strict=True):
        np.testing.assert_allclose(step.found, step.wanted, rtol=0, atol=TOLERANCE)
        assert np.abs(plain.found - step.wanted).max() > 0.01


def test_other_runtimes_feed_the_past_mask_and_positions_themselves(tmp_path: Path) -> None:
    file = oa.save_adapter(_adapter("prefix"), tmp_path / "a.npz")
    state, wanted = oa.load_adapter(file).initial_state, answers("prefix")
    rows, length = wanted["input_ids"].shape
    feeds = {
        "input_ids": wanted["input_ids"],
        "attention_mask": np.ones((rows, 3 + length), np.int64),
        "position_ids": np.tile(np.arange(3, 3 + length), (rows, 1)),
        **{name: np.repeat(value, rows, 0) for name, value in state.items()},
    }
    (found,) = ort.InferenceSession(PAST).run(["logits"], feeds)
    np.testing.assert_allclose(found, wanted["logits"], rtol=0, atol=TOLERANCE)


def test_the_past_may_be_left_out_of_the_first_call_and_be_ort_values() -> None:
    wanted = answers("cartridge")
    rows, length = wanted["input_ids"].shape
    feeds = {
        "input_ids": wanted["input_ids"],
        "attention_mask": wanted["attention_mask"],
        "position_ids": np.tile(np.arange(length), (rows, 1)),
    }
    with oa.AdapterSession(PAST, {"a": _adapter("cartridge")}) as session:
        found = session.run(feeds, adapter="a")["logits"]
        values = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in feeds.items()}
        again = session.run_with_ort_values(values, adapter="a")["logits"].numpy()
        direct = session.run(feeds, adapter=_adapter("cartridge"))["logits"]
    for logits in (found, again, direct):
        np.testing.assert_allclose(logits, wanted["logits"], rtol=0, atol=TOLERANCE)


def test_padding_on_the_right_is_masked_as_in_a_row_by_itself() -> None:
    ids = answers("prefix")["input_ids"][:2, :5]
    mask = np.array([[1] * 5, [1, 1, 1, 0, 0]])
    feeds = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.tile(range(5), (2, 1)),
    }
    with oa.AdapterSession(PAST, {"a": _adapter("prefix")}) as session:
        both = session.run(feeds, adapter="a")["logits"]
        alone = {name: value[1:, :3] for name, value in feeds.items()}
        short = session.run(alone, adapter="a")["logits"]
    np.testing.assert_allclose(both[1:, :3], short, rtol=0, atol=TOLERANCE)


def test_rows_may_have_a_first_past_of_their_own() -> None:
    empty = dict.fromkeys(NAMES, np.zeros((3, 2, 0, 4), np.float32))
    ids = answers("prefix")["input_ids"][:3]
    length = ids.shape[1]
    mask, positions = np.ones((3, length), np.int64), np.tile(np.arange(length), (3, 1))
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **empty}
    axes = {**dict.fromkeys(feeds, 0), "logits": 0}
    adapters = {"p": _adapter("prefix"), "c": _adapter("cartridge")}
    with oa.AdapterSession(PAST, adapters, batch_axis=axes) as session:
        rows = session.run(feeds, ["p", None, "c"], outputs=["logits"])["logits"]
        base = session.run(feeds, outputs=["logits"])["logits"]
        whole = session.run(feeds, "c", outputs=["logits"])["logits"]
    assert np.abs(rows[0] - answers("prefix")["logits"][0]).max() < TOLERANCE
    np.testing.assert_allclose(rows[1:], [base[1], whole[2]], rtol=0, atol=TOLERANCE)


def test_a_model_with_slots_takes_a_first_past_and_its_slots_stay_off() -> None:
    base = oa.open_model(PAST)
    lora = oa.load_checkpoint(ROOT / "alora_past" / "adapter", base)
    model = oa.insert_checkpoint(base, lora)
    assert oa.convert(ROOT / "prefix" / "adapter", model).fingerprint == lora.base
    with oa.AdapterSession(model, {"p": _adapter("prefix")}) as session:
        for step in steps(session, "prefix", "p", {}, {}):
            np.testing.assert_allclose(step.found, step.wanted, rtol=0, atol=TOLERANCE)


def _call(tokens: int, mask: int, past: dict[str, int]) -> dict[str, np.ndarray]:
    feeds = {name: np.zeros((1, 2, n, 4), np.float32) for name, n in past.items()}
    ids = np.zeros((1, tokens), np.int64)
    return {"input_ids": ids, "attention_mask": np.ones((1, mask), np.int64), **feeds}


MISUSED: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "a mask of the adapter's tokens too": (_call(4, 7, {}), r"has to be \[1, 4\]"),
    "a mask of the new tokens alone": (_call(1, 1, dict.fromkeys(NAMES, 7)), r"\[1, 5\]"),
    "a past without the adapter": (
        _call(1, 3, dict.fromkeys(NAMES, 2)),
        "without the adapter",
    ),
    "a part of the past": (_call(1, 5, dict.fromkeys(NAMES[:2], 7)), "only a part"),
    "lengths that differ": (
        _call(1, 5, {**dict.fromkeys(NAMES, 7), NAMES[0]: 6}),
        "one length",
    ),
    "no tokens": ({}, "how many rows"),
}


@pytest.mark.parametrize("case", MISUSED)
def test_feeds_that_cannot_be_those_of_a_run_with_the_adapter_are_refused(case: str) -> None:
    feeds, word = MISUSED[case]
    state = _adapter("prefix").initial_state
    with pytest.raises(AdapterError, match=word):
        past_feeds(state, feeds, ["input_ids", "attention_mask", *NAMES])


def test_what_a_first_past_cannot_be_is_refused(tmp_path: Path) -> None:
    adapter, base = _adapter("prefix"), oa.open_model(PAST)
    checkpoint = oa.load_checkpoint(ROOT / "prefix" / "adapter", base)
    model = oa.insert_checkpoint(
        base, oa.load_checkpoint(ROOT / "alora_past" / "adapter", base)
    )
    with pytest.raises(SlotError, match="needs no slots"):
        oa.insert_checkpoint(base, checkpoint)
    with pytest.raises(AdapterError, match="is no weight of the model"):
        oa.fill(model, adapter)
    with pytest.raises(AdapterError, match="whose tensors ONNX Runtime feeds"):
        oa.save_adapter(adapter, tmp_path / "a.onnx_adapter")
    with pytest.raises(AdapterError, match="has no weights for the slots"):
        oa.verify(base, model, adapter=adapter)
    with pytest.raises(AdapterError, match="has no weights for the slots"):
        oa.train(model, {}, loss="mse", start_from=adapter)
    with pytest.raises(AdapterError, match="cannot be blended"):
        oa.blend([adapter, adapter], [0.5, 0.5])
    with pytest.raises(CheckpointError, match="not written back"):
        oa.save_checkpoint(adapter, tmp_path / "p", model=model, library="peft")
    with oa.AdapterSession(PAST, {"a": adapter}) as session:
        with pytest.raises(AdapterError, match="changes what is bound"):
            session.run_with_iobinding(session.io_binding(), "a")
        with pytest.raises(AdapterError, match="cannot be blended"):
            session.run({}, adapter={"a": 0.5})
    assert not list(tmp_path.iterdir())


def _changed(change: Any) -> oa.Adapter:
    adapter = _adapter("prefix")
    return replace(
        adapter, initial_state={n: change(v) for n, v in adapter.initial_state.items()}
    )


BAD: dict[str, tuple[oa.Adapter, str]] = {
    "NaN": (_changed(lambda v: v * np.float32(np.nan)), "NaN"),
    "heads": (_changed(lambda v: v[:, :1]), r"shape \[1, 1, 3, 4\]"),
    "half": (_changed(lambda v: v.astype(np.float16)), "float16"),
    "base": (replace(_adapter("prefix"), fingerprint="sha256:12"), "another base"),
    "part": (
        replace(_adapter("prefix"), initial_state={NAMES[0]: np.zeros((1, 2, 3, 4), "f")}),
        "1 inputs, not 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_first_past_that_does_not_fit_the_model_is_refused_when_it_is_loaded(
    case: str,
) -> None:
    adapter, word = BAD[case]
    with oa.AdapterSession(PAST) as session, pytest.raises(AdapterError, match=word):
        session.load("a", adapter)


DAMAGED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "both halves": ({"num_transformer_submodules": 2}, {}, "encoder with a decoder"),
    "tokens": ({"num_virtual_tokens": 4}, {}, r"has to be \[4, 32\]"),
    "layers": ({"num_layers": 0}, {}, "no size"),
    "heads": ({"num_attention_heads": 4}, {}, r"shape \[1, 4, 3, 2\]"),
    "more layers": ({"num_layers": 1, "token_dim": 16}, {}, "do not fit|has 4 keys"),
    "another tensor": ({}, {"lora_A": np.ones((2, 2), np.float32)}, "beside the virtual"),
    "NaN": ({}, {"prompt_embeddings": np.full((3, 32), np.nan, np.float32)}, "NaN"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_in_words(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, tensors, word = DAMAGED[case]
    folder = shutil.copytree(ROOT / "prefix" / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    held = load_file(folder / "adapter_model.safetensors")
    save_file({**held, **tensors}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=word):
        oa.load_checkpoint(folder, oa.open_model(PAST))
    out = tmp_path / "a.safetensors"
    code, _, err = cli(capsys, "convert", str(folder), "--for", str(PAST), "-o", str(out))
    assert (code, out.exists()) == (2, False)
    assert err.startswith("error: ")


def _without(name: str) -> oa.Model:
    """The decoder with one of its outputs called otherwise."""
    model = oa.open_model(PAST)
    (value,) = (item for item in model.proto.graph.output if item.name == name)
    node = next(n for n in model.proto.graph.node if name in n.output)
    graph = model.proto.graph
    graph.node.append(onnx.helper.make_node("Identity", [node.output[0]], ["other"]))
    value.name = "other"
    return model


def test_prompts_need_an_embedding_and_the_next_past_and_no_scale_between() -> None:
    prompt = ROOT / "prompt" / "adapter"
    with pytest.raises(CheckpointError, match="lacks keys or values"):
        oa.load_checkpoint(prompt, _without("present.1.value"))
    assert oa.load_checkpoint(ROOT / "prefix" / "adapter", _without("present.1.value"))
    scaled = oa.open_model(PAST)
    graph = scaled.proto.graph
    (gather,) = (
        node for node in graph.node if "input_ids" in node.input and node.op_type == "Gather"
    )
    made = gather.output[0]
    gather.output[0] = "rows"
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(2), "two"))
    index = list(graph.node).index(gather)
    graph.node.insert(
        index + 1, onnx.helper.make_node("Mul", ["rows", "two"], [made], name="s")
    )
    with pytest.raises(CheckpointError, match="'s' scales what"):
        oa.load_checkpoint(prompt, scaled)


@pytest.mark.parametrize(
    "pattern",
    [
        *("past_key_values.{}.{}", "past_key_values_{}_{}", "past_{}_{}", "past_{1}_{0}"),
        "past_kv.{}.{}",
    ],
)
def test_the_past_is_known_by_the_names_of_exporters(pattern: str) -> None:
    wanted = [pattern.format(i, part) for i in range(11) for part in ("key", "value")]
    assert past_of(["input_ids", *sorted(wanted)]) == wanted


@pytest.mark.parametrize(
    "names", [["input_ids"], ["past_conv.0"], ["past.0.key"], ["past_0.encoder.key"]]
)
def test_a_model_without_a_known_past_is_told_how_to_be_exported(names: list[str]) -> None:
    with pytest.raises(AdapterError) as caught:
        past_of(names)
    assert "past_key_values among its inputs" in str(caught.value.hint)


def test_the_commands_convert_and_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, feeds, out = (str(tmp_path / n) for n in ("a.safetensors", "x.npz", "y.npz"))
    wanted = answers("p_tuning")
    rows, length = wanted["input_ids"].shape
    np.savez(
        feeds,
        input_ids=wanted["input_ids"],
        attention_mask=np.ones((rows, length), np.int64),
        position_ids=np.tile(np.arange(length), (rows, 1)),
    )
    folder = str(ROOT / "p_tuning" / "adapter")
    assert cli(capsys, "convert", folder, "--for", str(PAST), "-o", file)[0] == 0
    run = ("run", str(PAST), "--inputs", feeds, "--adapter", file, "-o", out)
    assert cli(capsys, *run)[0] == 0
    np.testing.assert_allclose(
        np.load(out)["logits"], wanted["logits"], rtol=0, atol=TOLERANCE
    )
    code, _, err = cli(capsys, "insert", str(PAST), "--adapter", folder)
    assert (code, "needs no slots" in err) == (2, True)
    with pytest.raises(AdaptError):
        oa.load_checkpoint(folder, oa.open_model(ROOT.parent / "bases/llama_dynamo/base.onnx"))


def test_check_tells_whether_a_first_past_fits_a_decoder_without_slots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(oa.save_adapter(_adapter("prefix"), tmp_path / "a.safetensors"))
    code, out, err = cli(capsys, "check", str(PAST), file)
    assert (code, out) == (0, f"{PAST}: ok\n{file}: ok\n")
    assert "next: onnx-adapt run" in err
    other = str(oa.save_adapter(BAD["heads"][0], tmp_path / "b.safetensors"))
    code, out, _ = cli(capsys, "check", str(PAST), file, other, "--json")
    problems = json.loads(out)["problems"]
    assert (code, problems[file]) == (1, [])
    assert "has shape" in problems[other][0]
    code, _, err = cli(capsys, "check", str(PAST))
    assert (code, "has no slots" in err) == (2, True)
