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
    code, _, said = _train(capsys, model, *given, "-o", out)
    assert code == 2
    assert words in said
    assert not out.exists()


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
    assert "another rate: 0.0 there, 0.5 now" in said


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
    assert f"{out} has the best weights before that" in said
    assert oa.load_adapter(out).weights
