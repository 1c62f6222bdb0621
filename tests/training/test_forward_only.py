"""Training without gradients: the estimate is the gradient on average, and it learns."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import GradientError, TrainingError
from onnx_adapt.ort import CPU
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.forward_only import ForwardEngine
from onnx_adapt.training.settings import Settings
from onnx_adapt.training.task import prepare

LINE = '<ir_version: 8, opset_import: ["" : 17]>'
SMOOTH = f"""{LINE} g (float[n,4] x) => (float[n,4] y)
  <float[4,4] w = {{1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}}> {{ [fc] y = MatMul(x, w) }}"""
STEPPED = f"""{LINE} g (float[n,4] x) => (float[n,4] y)
  <float[4,4] w = {{1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}}, float hundred = {{100}}> {{
  [fc] a = MatMul(x, w)  b = Mul(a, hundred)  c = Ceil(b)  y = Div(c, hundred) }}"""
"""The second is a step function, so its gradients are zero."""


def _model(text: str) -> oa.Model:
    return oa.insert(
        oa.Model(onnx.parser.parse_model(text)), after="fc", activation="identity"
    )


@pytest.fixture(scope="module")
def data() -> dict[str, Array]:
    """What is to be learned is twice the input."""
    x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    return {"x": x, "labels": 2 * x}


def test_the_estimate_is_the_gradient_on_average(data: dict[str, Array]) -> None:
    given = {"loss": "mse", "output": "", "labels": "labels", "loss_settings": {}}
    given |= {"bottleneck": 2, "start_from": None, "validation": 0.0}
    exact, forward = (
        prepare(_model(SMOOTH), data, Settings(forward_only=only), **given)  # type: ignore[arg-type]
        for only in (False, True)
    )
    rng = np.random.default_rng(1)
    weights = {
        name: rng.standard_normal(value.shape).astype(np.float32) / 2
        for name, value in exact.begun.items()
    }
    batch = exact.samples.first(16)
    wanted = Engine(exact.step, CPU).run(weights, batch)
    engine = ForwardEngine(forward.step, "mse", {}, CPU, 0)
    assert engine.loss(weights, batch) == pytest.approx(wanted.loss, rel=1e-6)
    estimates = [engine.run(weights, batch, step).grads for step in range(60)]
    for name, grad in wanted.grads.items():
        mean = np.mean([each[name] for each in estimates], 0)
        assert np.vdot(mean, grad) / np.linalg.norm(mean) / np.linalg.norm(grad) > 0.95
        assert np.linalg.norm(mean) == pytest.approx(np.linalg.norm(grad), rel=0.2)


def test_a_model_of_steps_learns_without_gradients(data: dict[str, Array]) -> None:
    model = _model(STEPPED)
    with pytest.raises(GradientError, match="no gradient for") as caught:
        oa.train(model, data, loss="mse")
    assert "--forward-only" in caught.value.hint
    settings = Settings(epochs=150, batch_size=16, forward_only=True)
    trained = oa.train(model, data, loss="mse", settings=settings, validation=0, bottleneck=4)
    assert trained.checks == ()
    assert trained.epochs[-1].loss < 0.1 * trained.epochs[0].loss


def test_a_resumed_training_takes_the_same_directions(
    data: dict[str, Array], tmp_path: Path
) -> None:
    model, file = _model(STEPPED), tmp_path / "state.npz"
    settings = Settings(epochs=3, batch_size=6, forward_only=True)
    given = {"loss": "mse", "settings": settings, "validation": data}
    whole = oa.train(model, data, **given)  # type: ignore[arg-type]
    taken: list[int] = []
    oa.train(
        *(model, data),
        **given,  # type: ignore[arg-type]
        checkpoint=file,
        on_step=lambda report: taken.append(1),
        stop=lambda: len(taken) == 4,
    )
    given |= {"checkpoint": file, "resume": True}
    resumed = oa.train(model, data, **given)  # type: ignore[arg-type]
    assert whole.epochs == resumed.epochs
    for name, value in whole.adapter.feeds().items():
        np.testing.assert_array_equal(value, resumed.adapter.feeds()[name])


def test_labels_are_checked_without_gradients_too(data: dict[str, Array]) -> None:
    settings = Settings(forward_only=True)
    labels = np.full(16, 7)
    with pytest.raises(TrainingError, match="the label 7"):
        oa.train(
            *(_model(STEPPED), {**data, "labels": labels}),
            loss="cross_entropy",
            settings=settings,
        )
