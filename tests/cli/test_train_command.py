"""`onnx-adapt train`: from a model and data to an adapter file."""

import json
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
