"""Training on the model's file: it learns, it is the same again, and it says what is wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import GradientError, TrainingError
from onnx_adapt.graph.gradients import table
from onnx_adapt.graph.gradients.rule import Grads, Step
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.training.gradient_check import worst
from onnx_adapt.training.optimisers import Optimiser
from onnx_adapt.training.reading import read_dataset
from onnx_adapt.training.settings import Settings
from onnx_adapt.training.teacher import taught

CASE = Path(__file__).parents[1] / "cases/peft_bert_lora_default_ts"
QUICK = Settings(epochs=30, rate=1e-2, batch_size=16)


@pytest.fixture(scope="module")
def model() -> oa.Model:
    base = oa.open_model(CASE / "base.onnx")
    return oa.insert(base, after="bert.encoder.layer.1.output.dense", activation="gelu")


@pytest.fixture(scope="module")
def data() -> dict[str, Array]:
    """Sentences whose class is whether their first word is odd."""
    ids = np.random.default_rng(0).integers(1, 60, (64, 6))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids[:, 0] % 2}


def _losses(model: oa.Model, adapter: oa.Adapter, data: dict[str, Array]) -> float:
    """The cross entropy of the adapted model, in numpy on ONNX Runtime's outputs."""
    inputs = {name: value for name, value in data.items() if name != "labels"}
    with oa.AdapterSession(model, {"mine": adapter}) as session:
        logits = session.run(inputs, "mine")["logits"].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-logs[np.arange(len(logs)), data["labels"]].mean())


def test_a_trained_adapter_fits_what_it_was_trained_on(
    model: oa.Model, data: dict[str, Array]
) -> None:
    trained = oa.train(model, data, loss="cross_entropy", settings=QUICK, validation=0)
    first, last = trained.epochs[0].loss, trained.epochs[-1].loss
    assert last < 0.6 * first
    assert _losses(model, trained.adapter, data) == pytest.approx(last, abs=0.05)
    assert worst(trained.checks) < 0.05
    base = oa.remove(model)
    assert base.proto == oa.open_model(CASE / "base.onnx").proto


def test_the_same_seed_trains_the_same_adapter(
    model: oa.Model, data: dict[str, Array]
) -> None:
    short = Settings(epochs=2, batch_size=16)
    one, two = (
        oa.train(model, data, loss="cross_entropy", settings=short, check=False).adapter
        for _ in range(2)
    )
    for name, value in one.feeds().items():
        np.testing.assert_array_equal(value, two.feeds()[name])


@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum", "lion"])
def test_every_optimiser_lowers_the_loss(
    name: str, model: oa.Model, data: dict[str, Array]
) -> None:
    settings = Settings(epochs=10, batch_size=16, optimiser=Optimiser(name))
    trained = oa.train(
        model, data, loss="cross_entropy", settings=settings, validation=0, check=False
    )
    assert trained.epochs[-1].loss < trained.epochs[0].loss


def test_the_best_weights_are_kept(model: oa.Model, data: dict[str, Array]) -> None:
    settings = Settings(epochs=6, rate=0.3, batch_size=16, schedule="constant")
    trained = oa.train(
        model, data, loss="cross_entropy", settings=settings, validation=data, check=False
    )
    best = min(epoch.validation_loss or np.inf for epoch in trained.epochs)
    assert _losses(model, trained.adapter, data) == pytest.approx(best, rel=1e-3)


def test_of_epochs_with_one_accuracy_the_one_with_the_lowest_loss_is_kept(
    model: oa.Model, data: dict[str, Array]
) -> None:
    held = {name: value[:2] for name, value in data.items()}
    settings = Settings(epochs=8, rate=3e-3, batch_size=16, metric="accuracy")
    given = {"settings": settings, "validation": held, "check": False}
    trained = oa.train(model, data, loss="cross_entropy", **given)  # type: ignore[arg-type]
    epochs = trained.epochs
    assert len({epoch.score for epoch in epochs}) < len(epochs)
    best = max(epochs, key=lambda e: (e.score or 0, -(e.validation_loss or 0)))
    assert _losses(model, trained.adapter, held) == pytest.approx(
        best.validation_loss, rel=1e-3
    )
    assert [epoch.number for epoch in epochs if epoch.best][-1] == best.number > 1


def test_fewer_held_back_samples_than_the_model_takes_at_once_are_refused() -> None:
    base = oa.open_model(CASE / "base.onnx")
    for value in base.proto.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 4
    fixed = oa.insert(base, after="bert.encoder.layer.1.output.dense")
    ids = np.random.default_rng(0).integers(1, 60, (16, 6))
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids[:, 0] % 2}
    with pytest.raises(TrainingError, match="2 samples are held back"):
        oa.train(fixed, given, loss="cross_entropy", validation=0.1)
    settings = Settings(epochs=1, batch_size=4)
    trained = oa.train(fixed, given, loss="cross_entropy", validation=0.25, settings=settings)
    assert trained.epochs[0].validation_loss


def test_a_wrong_gradient_is_found_before_training(
    model: oa.Model, data: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = table.RULES["Gelu"] if "Gelu" in table.RULES else table.RULES["Erf"]

    def twice(tape: Tape, step: Step) -> Grads:
        return [tape.times(str(grad), 2) for grad in right(tape, step)]

    for name in ("Gelu", "Erf"):
        monkeypatch.setitem(table.RULES, name, twice)
    with pytest.raises(GradientError, match="changes by"):
        oa.train(model, data, loss="cross_entropy", settings=QUICK)


def test_a_model_learns_what_a_teacher_says(model: oa.Model, data: dict[str, Array]) -> None:
    rng = np.random.default_rng(1)
    (slot,) = oa.list_slots(model)
    parts = {"down": (slot.width, 4), "up": (4, slot.width)}
    adapter = {part: rng.standard_normal(shape) for part, shape in parts.items()}
    teacher = oa.fill(model, oa.make_adapter(model, "teacher", {slot.name: adapter}))
    samples = taught(read_dataset(_without(data, "labels"), ""), teacher)
    assert isinstance(samples.groups[0].labels, np.memmap)  # a file, not memory
    settings = replace(QUICK, epochs=40)
    trained = oa.train(model, samples, loss="kl", settings=settings, validation=0)
    assert trained.epochs[-1].loss < 0.1 * trained.epochs[0].loss
    with pytest.raises(TrainingError, match="no 'attention_mask', which the teacher"):
        taught(read_dataset({"input_ids": data["input_ids"]}, ""), teacher)


def _without(data: dict[str, Array], name: str) -> dict[str, Array]:
    return {key: value for key, value in data.items() if key != name}


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no labels": (lambda d: _without(d, "labels"), {}, "has no 'labels'"),
    "fewer labels": (lambda d: {**d, "labels": d["labels"][:5]}, {}, "has 64 samples"),
    "no samples": (lambda d: {**d, "labels": d["labels"][:0]}, {}, "no samples"),
    "texts": (lambda d: {**d, "input_ids": np.array(["a"] * 64)}, {}, "not numbers"),
    "a class too many": (
        lambda d: {**d, "labels": d["labels"] + 2},
        {},
        "has the label 3, and .* classes 0 to 2",
    ),
    "labels of another shape": (lambda d: d, {"loss": "mse"}, "this loss takes .samples, 3"),
    "an unknown loss": (lambda d: d, {"loss": "hinge"}, "unknown loss"),
    "an unknown output": (lambda d: d, {"output": "scores"}, "no output 'scores'"),
    "an unknown optimiser": (
        lambda d: d,
        {"settings": Settings(optimiser=Optimiser("adam2"))},
        "unknown optimiser",
    ),
    "an unknown metric": (
        lambda d: d,
        {"settings": Settings(metric="bleu")},
        "unknown metric",
    ),
    "no epoch": (lambda d: d, {"settings": Settings(epochs=0)}, "setting epochs is 0"),
    "a NaN rate": (lambda d: d, {"settings": Settings(rate=np.nan)}, "setting rate is nan"),
    "batches of nothing": (
        lambda d: d,
        {"settings": Settings(batch_size=0)},
        "setting batch_size is 0",
    ),
    "an unknown schedule": (
        lambda d: d,
        {"settings": Settings(schedule="up")},
        "unknown schedule",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_trained_is_said(
    what: str, model: oa.Model, data: dict[str, Array]
) -> None:
    change, options, words = WRONG[what]
    given = {"loss": "cross_entropy", "check": False, **options}
    with pytest.raises(TrainingError, match=words):
        oa.train(model, change(data), **given)


def test_a_model_without_slots_or_with_baked_ones_is_refused(data: dict[str, Array]) -> None:
    base = oa.open_model(CASE / "base.onnx")
    with pytest.raises(oa.AdaptError, match="no slots"):
        oa.train(base, data, loss="cross_entropy")
    baked = oa.insert(base, after="bert.encoder.layer.1.output.dense", baked=True)
    with pytest.raises(TrainingError, match="baked"):
        oa.train(baked, data, loss="cross_entropy")


def test_samples_of_several_lengths_train(model: oa.Model) -> None:
    rng = np.random.default_rng(0)
    feeds = []
    for length in (6, 5, 6, 4):
        ids = rng.integers(1, 60, (12, length))
        feeds.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        feeds[-1]["labels"] = ids[:, 0] % 2
    settings = replace(QUICK, epochs=20, batch_size=8, metric="accuracy")
    trained = oa.train(model, iter(feeds), loss="cross_entropy", settings=settings)
    assert trained.epochs[-1].loss < 0.7 * trained.epochs[0].loss
    assert trained.epochs[-1].score is not None


def test_further_inputs_are_left_out_and_missing_ones_named(
    model: oa.Model, data: dict[str, Array], caplog: pytest.LogCaptureFixture
) -> None:
    short = Settings(epochs=1)
    given = {**data, "comment": np.zeros(64)}
    oa.train(model, given, loss="cross_entropy", settings=short, check=False)
    assert "left out comment of the data" in caplog.text
    with pytest.raises(TrainingError, match="no 'attention_mask', which"):
        oa.train(model, _without(data, "attention_mask"), loss="cross_entropy")
    with pytest.raises(TrainingError, match=r"'input_ids' of sample 0 of the data is \d+\.5,"):
        oa.train(model, {**data, "input_ids": data["input_ids"] + 0.5}, loss="cross_entropy")
    with pytest.raises(oa.AdaptError, match=r"does not run|on samples \d"):
        oa.train(model, {**data, "input_ids": data["input_ids"] + 99}, loss="cross_entropy")


def test_an_exported_model_trains_as_the_one_it_was_exported_from(
    model: oa.Model, data: dict[str, Array]
) -> None:
    short = Settings(epochs=1)
    exported, _ = oa.export(model)
    one, two = (
        oa.train(m, data, loss="cross_entropy", settings=short, check=False).adapter
        for m in (model, exported)
    )
    for name, value in one.feeds().items():
        np.testing.assert_array_equal(value, two.feeds()[name])


def test_an_output_that_does_not_depend_on_a_slot_is_refused() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y, float[n,4] z)
      <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> {
      [first] y = MatMul(x, w)  [second] z = MatMul(x, w) }"""
    model = oa.insert(oa.Model(onnx.parser.parse_model(text)), after=["first", "second"])
    data = {"x": np.zeros((4, 4), np.float32), "labels": np.zeros((4, 4), np.float32)}
    with pytest.raises(GradientError, match=r"does not depend on 'adapter\.second\.down'"):
        oa.train(model, data, loss="mse", output="y")


def test_a_sample_with_nan_is_named(data: dict[str, Array]) -> None:
    model = oa.insert(
        oa.open_model(CASE / "base.onnx"), after="bert.encoder.layer.1.output.dense"
    )
    labels = np.zeros((64, 3), np.float32)
    labels[17] = np.nan
    message = "'labels' of sample 17 of the data holds NaN"
    with pytest.raises(TrainingError, match=message) as caught:
        oa.train(model, {**data, "labels": labels}, loss="mse", check=False, validation=0)
    # It may be in any step; what was trained until then is given.
    first = "step 1:" in str(caught.value)
    assert (caught.value.trained is None) == first
