"""Activations that are computed a second time give the same gradients, and are not kept."""

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.ort import CPU
from onnx_adapt.training.data import Batch
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.reading import read_dataset
from onnx_adapt.training.recompute import AGAIN, recompute
from onnx_adapt.training.settings import Settings
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_model import StepModel, make_step

CASES = Path(__file__).parents[1] / "cases"


def _step(model: oa.Model, loss: str) -> tuple[StepModel, dict[str, Array]]:
    rng = np.random.default_rng(0)
    weights = weights_to_train(model, 4, None, 0)
    moved = {
        name: (value + 0.1 * rng.standard_normal(value.shape)).astype(value.dtype)
        for name, value in weights.items()
    }
    return make_step(model, list(weights), loss=loss), moved


@pytest.fixture(scope="module")
def bert() -> oa.Model:
    base = oa.open_model(CASES / "peft_bert_lora_default_ts/base.onnx")
    places = ["bert.encoder.layer.*.output.dense", "bert.encoder.layer.0.attention.*.query"]
    return oa.insert(base, after=places, activation="gelu")


@pytest.fixture(scope="module")
def sentences() -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(1, 60, (16, 6))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids[:, 0] % 2}


CHAIN = """
<ir_version: 8, opset_import: ["": 17]>
g ({kind}[n, 2, 8] x) => ({kind}[n, 2, 8] y) {{
  {lines}
}}
"""


def _chain(kind: str, layers: int) -> oa.Model:
    """A row of layers; `a0` is the output of the first."""
    lines, last = [], "x"
    for i in range(layers):
        name = "y" if i == layers - 1 else f"t{i}"
        lines.append(f"a{i} = MatMul({last}, w{i}) {name} = Tanh(a{i})")
        last = name
    proto = parser.parse_model(CHAIN.format(kind=kind, lines=" ".join(lines)))
    rng = np.random.default_rng(0)
    for i in range(layers):
        matrix = (0.4 * rng.standard_normal((8, 8))).astype(
            np.float32 if kind == "float" else np.float16
        )
        proto.graph.initializer.append(numpy_helper.from_array(matrix, f"w{i}"))
    return oa.Model(proto)


def _batch(data: dict[str, Array]) -> Batch:
    return read_dataset(data, "labels").first(64)


def test_recomputed_gradients_of_a_bert_are_the_same(
    bert: oa.Model, sentences: dict[str, Array]
) -> None:
    step, weights = _step(bert, "cross_entropy")
    batch = _batch(sentences)
    made = recompute(step, weights, batch, batch.size, CPU)
    assert made.after < 0.9 * made.before
    wanted, found = (Engine(s, CPU).run(weights, batch) for s in (step, made.step))
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    for name, grad in wanted.grads.items():
        np.testing.assert_allclose(found.grads[name], grad, atol=1e-5 * np.abs(grad).max())


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_of_twenty_layers_few_activations_are_kept(kind: str) -> None:
    step, weights = _step(oa.insert(_chain(kind, 20), after="a0"), "mse")
    x = np.random.default_rng(1).standard_normal((6, 2, 8)).astype(np.float32)
    batch = _batch({"x": x, "labels": np.flip(x, 0)})
    made = recompute(step, weights, batch, 6, CPU)
    assert made.after < 0.65 * made.before
    names = [node.name for node in made.step.model.proto.graph.node]
    assert sum(name.endswith(AGAIN) for name in names) > 20
    wanted, found = (Engine(s, CPU).run(weights, batch) for s in (step, made.step))
    for name, grad in wanted.grads.items():
        np.testing.assert_allclose(found.grads[name], grad, atol=1e-2 * np.abs(grad).max())


def test_a_training_with_recomputed_activations_is_the_same(
    bert: oa.Model, sentences: dict[str, Array]
) -> None:
    said: list[str] = []
    one, two = (
        oa.train(
            bert,
            sentences,
            loss="cross_entropy",
            settings=Settings(epochs=2, batch_size=8, recompute=again),
            validation=0,
            notice=said.append,
        )
        for again in (False, True)
    )
    assert any("activations take about" in text for text in said)
    assert two.epochs[-1].loss == pytest.approx(one.epochs[-1].loss, rel=1e-5)


def test_without_gradients_there_is_no_way_back_to_recompute_for() -> None:
    with pytest.raises(TrainingError, match="without gradients nothing is kept"):
        Settings(recompute=True, forward_only=True).check()


def test_a_model_with_nothing_to_save_is_refused() -> None:
    model = oa.insert(_chain("float", 1), after="a0")
    x = np.ones((4, 2, 8), np.float32)
    settings = Settings(epochs=1, recompute=True)
    with pytest.raises(TrainingError, match="would save no memory"):
        oa.train(model, {"x": x, "labels": x}, loss="mse", settings=settings, validation=0)
