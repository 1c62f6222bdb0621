"""`onnx-adapt train`: from a model and data to an adapter file."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slot_models import cli

import onnx_adapt as oa

BASE = Path(__file__).parents[1] / "cases/peft_bert_lora_default_ts/base.onnx"

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    adapted = oa.insert(oa.open_model(BASE), after="bert.encoder.layer.1.output.dense")
    oa.save_model(adapted, tmp_path / "adapted.onnx")
    return tmp_path / "adapted.onnx"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    ids = np.random.default_rng(0).integers(1, 60, (32, 6))
    np.savez(
        tmp_path / "train.npz",
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        labels=ids[:, 0] % 2,
    )
    return tmp_path / "train.npz"


def _train(capsys: Capture, *arguments: Any) -> tuple[int, str, str]:
    return cli(capsys, "train", *map(str, arguments))


def test_train_writes_an_adapter_that_fits(model: Path, data: Path, capsys: Capture) -> None:
    out = model.with_name("mine.safetensors")
    code, shown, said = _train(
        capsys,
        *(model, "--data", data, "--loss", "cross_entropy", "-o", out, "--json"),
        *("--metric", "accuracy", "--set", "label_smoothing=0.1", "--epochs", 2),
    )
    assert code == 0, said
    document = json.loads(shown)
    assert [epoch["epoch"] for epoch in document["epochs"]] == [1, 2]
    assert "epoch 2 of 2: loss" in said
    assert "accuracy" in said
    adapter = oa.load_adapter(out)
    assert adapter.name == "mine"
    with oa.AdapterSession(model, {"mine": out}) as session:
        inputs = {key: value for key, value in np.load(data).items() if key != "labels"}
        assert session.run(inputs, "mine")["logits"].shape == (32, 3)


BAD = {
    "no data": (["--data", "nowhere.npz", "--loss", "mse"], "no file or folder"),
    "a model for data": (["--data", str(BASE), "--loss", "mse"], "cannot read"),
    "an unknown loss": (["--loss", "hinge"], "unknown loss 'hinge'"),
    "a setting of no loss": (["--loss", "mse", "--set", "delta=1"], "no setting 'delta'"),
    "no number": (["--loss", "huber", "--set", "delta=x"], "KEY=VALUE"),
    "other labels": (["--loss", "mse", "--labels", "y"], "has no 'y'"),
    "text of no tokenizer": (["--loss", "mse", "--text", "x"], "--text needs --tokenizer"),
    "a tokenizer for a model of numbers": (
        ["--loss", "mse", "--tokenizer", "nowhere.json", "--data", "t.csv"],
        "no file or folder t.csv",
    ),
    "no teacher": (["--loss", "kl", "--teacher", "nowhere.onnx"], "nowhere.onnx"),
    "nothing to resume": (["--loss", "cross_entropy", "--resume"], "no checkpoint"),
    "a metric on nothing": (
        ["--loss", "cross_entropy", "--metric", "f1", "--held-back", "0"],
        "a metric and patience need samples that are held back",
    ),
    "another form of adapter": (["--loss", "mse", "-o", "x.xyz"], "no known adapter format"),
    "a folder for a checkpoint": (
        ["--loss", "mse", "--checkpoint", "/"],
        "/ cannot be written",
    ),
    "a file for two things": (
        ["--loss", "mse", "--log", "x.csv", "--checkpoint", "x.csv"],
        "--checkpoint and --log are one file",
    ),
    "the base as a log": (
        ["--loss", "mse", "--log", str(BASE), "--teacher", str(BASE)],
        "which is read",
    ),
    "two lengths": (["--loss", "mse", "--epochs", "1", "--steps", "2"], "not both"),
    "another log": (["--loss", "cross_entropy", "--log", "x.txt"], "cannot be written as"),
    "another optimiser": (
        ["--loss", "cross_entropy", "--optimiser", "x"],
        "unknown optimiser",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_said_and_nothing_is_written(
    what: str, model: Path, data: Path, capsys: Capture
) -> None:
    options, words = BAD[what]
    given = options if "--data" in options else ["--data", str(data), *options]
    out = model.with_name("mine.safetensors")
    given = given if "-o" in given else ["-o", str(out), *given]
    code, _, said = _train(capsys, model, *given)
    assert code == 2
    assert words in said
    assert not out.exists()


def test_a_training_that_is_resumed_goes_on_with_its_folder_for_tensorboard(
    model: Path, data: Path, capsys: Capture, tmp_path: Path
) -> None:
    shared = ["--data", str(data), "--loss", "cross_entropy", "--steps", "2", "--no-check"]
    shared += ["--log", str(tmp_path / "run"), "--checkpoint", str(tmp_path / "state.npz")]
    code, _, said = _train(capsys, model, "-o", str(tmp_path / "a.npz"), *shared)
    assert code == 0, said
    code, _, said = _train(capsys, model, "-o", str(tmp_path / "b.npz"), *shared)
    assert code == 2
    assert "is there already" in said
    code, _, said = _train(capsys, model, "-o", str(tmp_path / "b.npz"), *shared, "--resume")
    assert code == 0, said


def _interrupt_when(log: Path) -> threading.Thread:
    """Press Ctrl-C once a log has changed."""
    before = log.read_bytes() if log.exists() else b""

    def press() -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end and (not log.exists() or log.read_bytes() == before):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_ctrl_c_saves_and_the_training_goes_on(
    model: Path, data: Path, capsys: Capture
) -> None:
    out, state, log = (model.with_name(n) for n in ("mine.safetensors", "s.npz", "log.csv"))
    given = [model, "--data", data, "--loss", "cross_entropy", "-o", out, "--batch-size", 2]
    given += ["--checkpoint", state, "--log", log, "--epochs", 100, "--no-check"]
    thread = _interrupt_when(log)
    code, _, said = _train(capsys, *given)
    thread.join()
    assert code == 130, said
    assert "--resume goes on from" in said
    assert out.exists()
    done = len(log.read_text().splitlines())
    assert 1 < done < 1401
    thread = _interrupt_when(log)
    code, _, said = _train(capsys, *given, "--resume")
    thread.join()
    assert code == 130, said
    steps = [int(line.split(",")[0]) for line in log.read_text().splitlines()[1:]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= done
    code, _, said = _train(capsys, *given, "--resume", "--lr", 0.5)
    assert code == 2
    assert "rate: 0.0 then, 0.5 now" in said


def test_what_was_trained_before_nan_is_written_and_said(
    model: Path, data: Path, capsys: Capture
) -> None:
    arrays = dict(np.load(data))
    labels = np.zeros((32, 3), np.float32)
    labels[7] = np.nan
    np.savez(data, **{**arrays, "labels": labels})
    out = model.with_name("mine.safetensors")
    given = [model, "--data", data, "--loss", "mse", "--batch-size", 2, "-o", out]
    code, _, said = _train(capsys, *given, "--no-check", "--held-back", 0)
    assert code == 1, said
    assert "'labels' of sample 7" in said
    assert "not compared with differences" in said
    assert f"{out} has the best weights before that" in said
    assert oa.load_adapter(out).weights


HEADLESS = Path(__file__).parents[1] / "cases/bases/bert_headless/base.onnx"


@pytest.fixture
def headless(tmp_path: Path) -> tuple[Path, Path]:
    """A base without a head, and lines of text."""
    (tmp_path / "base.onnx").write_bytes(HEADLESS.read_bytes())
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(24):
        ids = rng.integers(1, 60, rng.integers(4, 6)).tolist()
        kind = "odd" if ids[0] % 2 else "even"
        row = {"input_ids": ids, "attention_mask": [1] * len(ids), "kind": kind}
        rows.append({**row, "token_type_ids": [0] * len(ids)})
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "train.jsonl").write_text(text)
    return tmp_path / "base.onnx", tmp_path / "train.jsonl"


def test_one_command_trains_slots_and_a_head_on_a_base(
    headless: tuple[Path, Path], capsys: Capture
) -> None:
    base, data = headless
    out = base.with_name("mine.safetensors")
    code, shown, said = _train(
        capsys,
        *(base, "--data", data, "--labels", "kind", "--loss", "cross_entropy", "-o", out),
        *("--head", "classes=2", "--on", "last_hidden_state", "--train-norms", "--json"),
        *("--metric", "accuracy", "--epochs", 2),
    )
    assert code == 0, said
    document = json.loads(shown)
    assert document["classes"] == ["even", "odd"]
    adapted = base.with_name("base.adapted.onnx")
    assert document["model"] == str(adapted)
    assert "slots after 2 layers, the output layer of each block: linear_5, linear_11" in said
    assert "verified" in said
    adapter = oa.load_adapter(out)
    assert len(adapter.weights) == 2
    assert {"head.weight", "base.encoder.layer.0.output.LayerNorm.bias"} <= set(
        adapter.replaced
    )
    ids = np.ones((1, 4), np.int64)
    feeds = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    with oa.AdapterSession(adapted, {"mine": adapter}) as session:
        assert session.run(feeds, "mine")["head"].shape == (1, 2)
    assert oa.remove(oa.open_model(adapted)).proto == oa.open_model(base).proto


HEADS = {
    "no number": (["--head", "classes=x"], "give classes=N"),
    "no classes": (["--head", "pooling=cls"], "say how many classes"),
    "another pooling": (
        ["--head", "classes=2,pooling=max", "--on", "pooler_output"],
        "unknown pooling 'max'",
    ),
    "which output": (["--head", "classes=2"], "say which the head reads"),
    "too few classes": (["--head", "classes=1", "--on", "pooler_output"], "has the label 1"),
}


@pytest.mark.parametrize("what", HEADS)
def test_a_bad_head_is_said_and_nothing_is_written(
    what: str, headless: tuple[Path, Path], capsys: Capture
) -> None:
    base, data = headless
    options, words = HEADS[what]
    given = [base, "--data", data, "--labels", "kind", "--loss", "cross_entropy"]
    given += ["-o", base.with_name("mine.safetensors"), *options]
    code, _, said = _train(capsys, *given)
    assert code == 2
    assert words in said
    assert {path.name for path in base.parent.iterdir()} == {"base.onnx", "train.jsonl"}


def test_a_model_path_for_a_model_that_stays_is_refused(
    model: Path, data: Path, capsys: Capture
) -> None:
    given = [model, "--data", data, "--loss", "cross_entropy", "-o", "x.safetensors"]
    code, _, said = _train(capsys, *given, "--model-output", "y.onnx")
    assert code == 2
    assert "has no effect" in said
