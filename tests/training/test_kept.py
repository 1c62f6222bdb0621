"""What is before the first slot is computed once for each sample, and nothing else changes."""

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.ort import CPU
from onnx_adapt.training.kept import Kept, keep_frozen
from onnx_adapt.training.reading import read_dataset
from onnx_adapt.training.settings import Settings
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_model import make_step

CASES = Path(__file__).parents[1] / "cases"
LATE = "bert.encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def model() -> oa.Model:
    base = oa.open_model(CASES / "peft_bert_lora_default_ts/base.onnx")
    return oa.insert(base, after=LATE, activation="gelu")


def _sentences(count: int, length: int, seed: int = 0) -> dict[str, Array]:
    ids = np.random.default_rng(seed).integers(1, 60, (count, length))
    mask = np.ones_like(ids)
    mask[::3, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2}


@pytest.fixture(scope="module")
def data() -> list[dict[str, Array]]:
    """Sentences of two lengths, as batches."""
    return [_sentences(20, 6), _sentences(13, 9, 1)]


def _kept(model: oa.Model, data: object, most: int = 10**9) -> Kept | str:
    weights = weights_to_train(model, 4, None, 0)
    step = make_step(model, list(weights), loss="cross_entropy")
    samples = read_dataset(data, "labels")  # type: ignore[arg-type]
    given = {"batch_size": 8, "most": most, "providers": CPU}
    return keep_frozen(step, weights, samples, None, **given)  # type: ignore[arg-type]


def _settings(frozen_memory: int) -> Settings:
    return Settings(epochs=3, batch_size=8, rate=1e-2, frozen_memory=frozen_memory)


def test_a_training_on_what_is_kept_is_that_on_all(
    model: oa.Model, data: list[dict[str, Array]]
) -> None:
    said: list[str] = []
    kept, all_of_it = (
        oa.train(
            model,
            data,
            loss="cross_entropy",
            settings=_settings(memory),
            validation=0.2,
            notice=said.append,
        )
        for memory in (1024, 0)
    )
    assert len(said) == 1
    assert "computed once for each sample" in said[0]
    for one, other in zip(kept.epochs, all_of_it.epochs, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.validation_loss == pytest.approx(other.validation_loss, rel=1e-5)
    for name, value in kept.adapter.feeds().items():
        np.testing.assert_allclose(value, all_of_it.adapter.feeds()[name], atol=1e-5)


def test_the_rest_has_no_layer_before_the_slot_and_reads_no_tokens(
    model: oa.Model, data: list[dict[str, Array]]
) -> None:
    kept = _kept(model, data)
    assert isinstance(kept, Kept)
    stored = {tensor.name for tensor in kept.step.model.proto.graph.initializer}
    assert not any("layer.0." in name for name in stored)
    assert len(kept.step.model.proto.graph.node) < len(model.proto.graph.node)
    inputs = set(kept.step.inputs) - {"input_ids", "attention_mask"}
    arrays = [group.inputs[name] for group in kept.samples.groups for name in inputs]
    assert kept.size == sum(array.nbytes for array in arrays)


def test_a_training_on_what_is_kept_resumes_bit_for_bit(
    model: oa.Model, data: list[dict[str, Array]], tmp_path: Path
) -> None:
    given = {"loss": "cross_entropy", "settings": _settings(1024), "check": False}
    whole = oa.train(model, data, **given)  # type: ignore[arg-type]
    steps: list[int] = []
    state = tmp_path / "state.npz"
    oa.train(
        model,
        data,
        **given,  # type: ignore[arg-type]
        checkpoint=state,
        on_step=lambda report: steps.append(report.step),
        stop=lambda: len(steps) == 7,
    )
    resumed = oa.train(model, data, **given, checkpoint=state, resume=True)  # type: ignore[arg-type]
    for name, value in whole.adapter.feeds().items():
        np.testing.assert_array_equal(value, resumed.adapter.feeds()[name])


def test_what_does_not_fit_is_computed_in_every_step(
    model: oa.Model, data: list[dict[str, Array]]
) -> None:
    found = _kept(model, data, most=100)
    assert isinstance(found, str)
    assert "are allowed" in found


def test_nothing_is_kept_if_the_first_layer_has_a_slot(data: list[dict[str, Array]]) -> None:
    base = oa.open_model(CASES / "peft_bert_lora_default_ts/base.onnx")
    early = oa.insert(base, after="bert.embeddings.word_embeddings")
    assert _kept(early, data) == ""


MIXED = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y) {
  a = MatMul(x, w)
  top = ReduceMax<keepdims = 1>(a)
  b = Div(a, top)
  y = MatMul(b, w)
}
"""


def _base(text: str, size: int = 4) -> oa.Model:
    proto = parser.parse_model(text)
    matrix = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(matrix, "w"))
    return oa.Model(proto)


def test_of_samples_that_change_each_other_only_what_is_before_is_kept() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    model = oa.insert(_base(MIXED), after="y")
    weights = weights_to_train(model, 2, None, 0)
    step = make_step(model, list(weights), loss="mse")
    samples = read_dataset({"x": x, "labels": x}, "labels")
    given = {"batch_size": 8, "most": 10**6, "providers": CPU}
    kept = keep_frozen(step, weights, samples, None, **given)  # type: ignore[arg-type]
    assert isinstance(kept, Kept)
    assert kept.step.inputs == ["a"]


def test_a_sample_with_nan_is_named_before_anything_is_trained(
    model: oa.Model,
) -> None:
    x = np.ones((8, 4), np.float32)
    x[5, 2] = np.nan
    one = oa.insert(_base(MIXED.replace("Div(a, top)", "Tanh(a)")), after="y")
    with pytest.raises(TrainingError, match="'x' of sample 5 of the data holds NaN"):
        oa.train(one, {"x": x, "labels": x * 0}, loss="mse", validation=0)
