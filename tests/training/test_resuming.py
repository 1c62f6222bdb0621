"""A training that was stopped goes on bit for bit, or says why it cannot."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.training.data import Batch
from onnx_adapt.training.evaluation import require_finite_loss
from onnx_adapt.training.log import Log
from onnx_adapt.training.optimisers import Optimiser
from onnx_adapt.training.progress import Report
from onnx_adapt.training.settings import Settings
from onnx_adapt.training.train import Trained

BASE = Path(__file__).parents[1] / "cases/peft_bert_lora_default_ts/base.onnx"
SETTINGS = Settings(epochs=3, batch_size=8, accumulate=2, average=0.9, rate=1e-2)


@pytest.fixture(scope="module")
def model() -> oa.Model:
    return oa.insert(oa.open_model(BASE), after="bert.encoder.layer.1.output.dense")


@pytest.fixture(scope="module")
def data() -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(1, 60, (40, 6))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids[:, 0] % 2}


def _stop_after(steps: int) -> dict[str, Callable[..., Any]]:
    taken: list[int] = []
    return {"on_step": lambda report: taken.append(1), "stop": lambda: len(taken) == steps}


def _train(model: oa.Model, data: dict[str, Array], **given: Any) -> Trained:
    settings = {"settings": SETTINGS, **given}
    return oa.train(model, data, loss="cross_entropy", check=False, **settings)


def test_so_many_steps_end_within_an_epoch_and_go_on_after_a_stop(
    model: oa.Model, data: dict[str, Array], tmp_path: Path
) -> None:
    """The 36 samples that are not held back are three steps: four end in epoch 2."""
    four = replace(SETTINGS, steps=4)
    taken: list[int] = []
    whole = _train(
        model, data, settings=four, on_step=lambda report: taken.append(report.steps)
    )
    assert taken == [4] * 4
    assert [epoch.number for epoch in whole.epochs] == [1, 2]
    given = {"settings": four, "checkpoint": tmp_path / "state.npz"}
    _train(model, data, **given, **_stop_after(2))
    _assert_equal(_train(model, data, **given, resume=True), whole)


def _assert_equal(one: Trained, two: Trained) -> None:
    assert one.epochs == two.epochs
    for name, value in one.adapter.feeds().items():
        np.testing.assert_array_equal(value, two.adapter.feeds()[name])


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_resumed_training_gives_the_same_bits(
    steps: int, model: oa.Model, data: dict[str, Array], tmp_path: Path
) -> None:
    whole = _train(model, data)
    file = tmp_path / "state.npz"
    stopped = _train(model, data, checkpoint=file, **_stop_after(steps))
    assert not stopped.finished
    resumed = _train(model, data, checkpoint=file, resume=True)
    assert resumed.finished
    _assert_equal(whole, resumed)
    again = _train(model, data, checkpoint=file, resume=True)
    _assert_equal(whole, again)


def _other(data: dict[str, Array]) -> dict[str, Array]:
    ids = data["input_ids"].copy()
    ids[3, 2] += 1
    return {**data, "input_ids": ids}


OTHERS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "data": (lambda d: {"data": _other(d)}, "other data"),
    "rate": (
        lambda d: {"settings": replace(SETTINGS, rate=1.0)},
        "rate: 0.01 then, 1.0 now",
    ),
    "epochs": (lambda d: {"settings": replace(SETTINGS, epochs=4)}, "epochs: 3 then, 4 now"),
    "optimiser": (
        lambda d: {"settings": replace(SETTINGS, optimiser=Optimiser("sgd"))},
        "other optimiser",
    ),
    "bottleneck": (lambda d: {"bottleneck": 4}, "other weights"),
    "loss": (
        lambda d: {"loss_settings": {"label_smoothing": 0.1}},
        "settings of the loss: .* then, 'label_smoothing=0.1' now",
    ),
    "validation": (lambda d: {"validation": d}, "other data"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_training_is_not_resumed(
    what: str, model: oa.Model, data: dict[str, Array], tmp_path: Path
) -> None:
    file = tmp_path / "state.npz"
    _train(model, data, checkpoint=file, **_stop_after(1))
    before = file.read_bytes()
    change, words = OTHERS[what]
    with pytest.raises(TrainingError, match=words):
        _train(model, **{"data": data, "checkpoint": file, "resume": True, **change(data)})
    assert file.read_bytes() == before


def test_a_checkpoint_is_not_overwritten_or_made_up(
    model: oa.Model, data: dict[str, Array], tmp_path: Path
) -> None:
    file = tmp_path / "state.npz"
    with pytest.raises(TrainingError, match="no training to resume"):
        _train(model, data, checkpoint=file, resume=True)
    with pytest.raises(TrainingError, match="no checkpoint"):
        _train(model, data, resume=True)
    _train(model, data, checkpoint=file, **_stop_after(1))
    with pytest.raises(TrainingError, match="there already"):
        _train(model, data, checkpoint=file)


@pytest.mark.parametrize("damage", ["cut", "text", "npz", "record"])
def test_a_damaged_checkpoint_is_said_to_be_one(
    damage: str, model: oa.Model, data: dict[str, Array], tmp_path: Path
) -> None:
    file = tmp_path / "state.npz"
    _train(model, data, checkpoint=file, **_stop_after(1))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-400])
    elif damage == "text":
        file.write_text("hello")
    elif damage == "npz":
        np.savez(file, x=np.zeros(3))
    else:
        np.savez(file, record=np.array('{"format": 1, "run": 3}'))
    with pytest.raises(TrainingError, match="damaged"):
        _train(model, data, checkpoint=file, resume=True)


def test_what_cannot_be_written_leaves_the_last_checkpoint(
    model: oa.Model, data: dict[str, Array], tmp_path: Path
) -> None:
    """A folder in the way stands for a full disk: the move into place fails."""
    file = tmp_path / "folder/state.npz"
    _train(model, data, checkpoint=file, **_stop_after(1))
    before = file.read_bytes()
    file.rename(tmp_path / "kept.npz")
    file.mkdir()
    with pytest.raises(oa.AdaptError, match=r"cannot write|not a regular file"):
        _train(model, data, checkpoint=tmp_path / "folder/state.npz/x/" / ("n" * 300))
    assert (tmp_path / "kept.npz").read_bytes() == before


def test_what_was_trained_before_a_loss_is_not_finite_is_kept(
    model: oa.Model, data: dict[str, Array], tmp_path: Path
) -> None:
    file = tmp_path / "state.npz"
    labels = np.zeros((40, 3), np.float32)
    labels[11] = np.nan
    settings = replace(SETTINGS, accumulate=1)
    with pytest.raises(TrainingError, match=r"step [2-5]: 'labels' of sample 11 of") as caught:
        oa.train(
            *(model, {**data, "labels": labels}),
            loss="mse",
            settings=settings,
            validation=0,
            check=False,
            checkpoint=file,
        )
    trained = caught.value.trained
    assert isinstance(trained, Trained)
    assert not trained.finished
    for value in trained.adapter.feeds().values():
        assert np.isfinite(value).all()
        assert value.any()
    assert file.exists()


def test_a_loss_that_is_not_finite_on_sound_data_names_its_samples() -> None:
    batch = Batch({"x": np.zeros((12, 2))}, np.zeros(12), np.arange(5, 17), "train.npz")
    words = r"step 3: the loss is inf on samples 5, 6, .*, 12 and 4 more of train\.npz"
    with pytest.raises(TrainingError, match=words):
        require_finite_loss(float("inf"), batch, "step 3: ")


def test_accumulated_batches_are_one_large_batch(
    model: oa.Model, data: dict[str, Array]
) -> None:
    """With one step in each epoch the order of the samples does not matter."""
    once = replace(SETTINGS, batch_size=40, accumulate=1)
    parts = replace(SETTINGS, batch_size=10, accumulate=4)
    one, two = (_train(model, data, settings=s, validation=0) for s in (once, parts))
    for name, value in one.adapter.feeds().items():
        np.testing.assert_allclose(value, two.adapter.feeds()[name], atol=2e-5)


def test_training_stops_when_nothing_gets_better(
    model: oa.Model, data: dict[str, Array]
) -> None:
    settings = replace(SETTINGS, epochs=50, rate=1e-12, patience=2, metric="accuracy")
    trained = _train(model, data, settings=settings)
    assert [epoch.best for epoch in trained.epochs] == [True, False, False]
    assert trained.finished


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_log_goes_on_where_the_training_does(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"log{suffix}"

    def report(step: int, loss: float) -> Report:
        return Report(step, 9, 32, loss, 0.1, 1)

    first = Log(path)
    for step in (1, 2, 3):
        first.write(report(step, 0.5))
    with pytest.raises(TrainingError, match="there already"):
        Log(path)
    second = Log(path, resume=True)  # the checkpoint was of step 2
    second.write(report(3, 0.25))
    lines = path.read_text().splitlines()
    assert len(lines) == 3 + (suffix == ".csv")
    assert "0.25" in lines[-1]
    assert "validation_loss" in lines[0]


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be written as"):
        Log(tmp_path / "log.txt")
    path = tmp_path / "log.csv"
    path.write_text("my,own,numbers\n1.5,a,b\n")
    with pytest.raises(TrainingError, match="no log of a training"):
        Log(path, resume=True).write(Report(1, 9, 32, 0.5, 0.1, 1))
    assert path.read_text().startswith("my,own")
