"""A training step as a file: any ONNX Runtime takes the same steps as the numpy optimisers."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from slot_models import cli, run, saved

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.ort import CPU
from onnx_adapt.training.data import Batch
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.optimiser_nodes import NODES
from onnx_adapt.training.optimisers import RULES, Optimiser
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_file import StepFile, train_graph
from onnx_adapt.training.step_model import make_step

CASE = Path(__file__).parents[1] / "cases/peft_bert_lora_default_ts"
TEXT = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y) { a = Tanh(x)  y = Identity(a) }
"""
X = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


def _adapted(text: str = TEXT, **options: object) -> oa.Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.node[0].name = "a"
    return oa.insert(oa.Model(proto), after="a", activation="gelu", **options)


def _first(step: StepFile) -> dict[str, Array]:
    return dict(
        zip([o.name for o in step.start.graph.output], run(step.start, {}), strict=True)
    )


def _steps(path: Path, fed: dict[str, Array], rates: list[float]) -> list[dict[str, Array]]:
    """The outputs of some steps, each fed what the one before gave."""
    session = onnxruntime.InferenceSession(path)
    names = [item.name for item in session.get_outputs()]
    made: list[dict[str, Array]] = []
    for rate in rates:
        fed = {**fed, "rate": np.array(rate, np.float32)}
        made.append(dict(zip(names, session.run(None, fed), strict=True)))
        fed |= {name: made[-1][f"next:{name}"] for name in fed if f"next:{name}" in names}
    return made


@pytest.mark.parametrize("name", RULES)
def test_every_optimiser_takes_the_steps_of_the_one_in_numpy(
    name: str, tmp_path: Path
) -> None:
    model, labels = _adapted(bias=True), np.cos(3 * X)
    optimiser = Optimiser(name, decay=0.1, clip=0.5)
    step = train_graph(model, loss="mse", optimiser=optimiser)
    first = _first(step)
    assert set(first) == set(step.carried)
    rates = [0.05, 0.03, 0.02, 0.0]
    fed = {"x": X, "labels": labels, **first}
    found = _steps(saved(step.model, tmp_path / "step.onnx"), fed, rates)

    weights = weights_to_train(model, 16, None, 0)
    engine = Engine(make_step(model, list(weights), loss="mse"), CPU)
    batch = Batch({"x": X}, labels, np.arange(16))
    state = optimiser.start(weights)
    for count, (rate, made) in enumerate(zip(rates, found, strict=True), 1):
        wanted = engine.run(weights, batch)
        assert made["loss"] == pytest.approx(wanted.loss, rel=1e-5)
        weights, state = optimiser.step(weights, wanted.grads, state, count, rate)
        assert made["next:step"] == count
    for key, value in (weights | state).items():
        np.testing.assert_allclose(found[-1][f"next:{key}"], value, rtol=1e-3, atol=1e-5)


def test_every_optimiser_has_nodes() -> None:
    assert NODES.keys() == RULES.keys()


def test_a_thin_step_needs_the_models_file_and_whole_ones_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = oa.open_model(CASE / "base.onnx")
    model = oa.insert(base, after="bert.encoder.layer.1.output.dense")
    adapted = saved(model, tmp_path / "adapted.onnx")
    thin, whole = tmp_path / "thin.onnx", tmp_path / "whole.onnx"
    given = ("train-graph", str(adapted), "--loss", "cross_entropy", "-o")
    code, out, _ = cli(capsys, *given, str(thin), "--thin", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["carried"]["step"] == "next:step"
    assert cli(capsys, *given, str(whole))[0] == 0
    starts = [onnx.load(path.with_suffix(".start.onnx")) for path in (thin, whole)]
    assert starts[0] == starts[1]
    ids = np.random.default_rng(0).integers(1, 60, (16, 6))
    names = [item.name for item in starts[0].graph.output]
    fed = dict(zip(names, run(starts[0], {}), strict=True))
    fed |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids[:, 0] % 2}
    losses = [_steps(path, fed, [1e-2] * 8) for path in (thin, whole)]
    assert losses[0][-1]["loss"] == losses[1][-1]["loss"] < losses[0][0]["loss"]
    adapted.unlink()
    assert "adapted.onnx" in cli(capsys, "slots", str(thin))[2]


def test_weights_in_float16_are_carried_in_float32(tmp_path: Path) -> None:
    step = train_graph(_adapted(TEXT.replace("float[", "float16[")), loss="mse", bottleneck=2)
    first = _first(step)
    assert {f"master:adapter.a.{part}" for part in ("down", "up")} < first.keys()
    fed = {"x": X.astype(np.float16), "labels": np.cos(3 * X), **first}
    made = _steps(saved(step.model, tmp_path / "step.onnx"), fed, [1e-2] * 20)
    assert made[-1]["loss"] < made[0]["loss"]


def test_what_cannot_be_written_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = saved(_adapted(), tmp_path / "adapted.onnx")
    before = sorted(tmp_path.iterdir())
    for loss, output, words in (
        ("hinge", "step.onnx", "unknown loss"),
        ("mse", "adapted.onnx", "adapted.onnx"),
        ("mse", "no/such/step.onnx", "no/such"),
    ):
        path = str(tmp_path / output)
        code, _, err = cli(capsys, "train-graph", str(adapted), "--loss", loss, "-o", path)
        assert code == 2
        assert words in err
    with pytest.raises(TrainingError, match="unknown optimiser"):
        train_graph(_adapted(), loss="mse", optimiser=Optimiser("adam2"))
    assert sorted(tmp_path.iterdir()) == before
