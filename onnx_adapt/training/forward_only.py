"""Training without gradients: the loss is tried on both sides of random moves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import helper

from onnx_adapt.dtypes import Array
from onnx_adapt.graph.gradients.opsets import TARGET
from onnx_adapt.graph.index import index_model
from onnx_adapt.model.file import Model
from onnx_adapt.ort import CPU, Providers
from onnx_adapt.proof.runner import Runner
from onnx_adapt.training.data import Batch, Dataset
from onnx_adapt.training.engine import Result
from onnx_adapt.training.evaluation import Evaluation, evaluate, require_finite_loss
from onnx_adapt.training.losses import FLOAT, Settings
from onnx_adapt.training.metrics import Metric
from onnx_adapt.training.step_model import (
    LABELS,
    LOSS,
    LossFunction,
    StepModel,
    add_loss,
    choose_output,
    with_labels,
)

# Antithetic perturbations (SPSA, Spall, 1992; evolution strategies, Salimans et al., 2017):
# for a random direction e of all weights, the loss is computed at w + s e and at w - s e. Half
# the difference over s is how steep the loss is along e, so that times e is, on average over
# directions, the gradient. An example with two weights and s = 0.1: for e = (1, -1) the
# losses are 0.53 and 0.49, the slope is 0.2, and e adds (0.2, -0.2) to the mean.
#
# The estimate is the gradient and noise; with n weights and k pairs the noise is about
# sqrt(n / k) times as large. That is why few weights train well so, and many slowly.
#
# Each move is a run of its own. As rows of one run with batched slots they are no faster on a
# CPU, and a model that is quantised while it runs would give all of them one common scale.

PAIRS = 8
"""How many directions are tried in each step, each both ways."""

SIZE = 0.02
"""How far a weight is moved, on average."""


def forward_model(
    model: Model, *, loss: str | LossFunction, output: str, settings: Settings
) -> StepModel:
    """A model that is run as it is, with what is known of the labels of a loss on it.

    Args:
        model: A model with slots, with its defaults.
        loss: A name in `LOSSES`, or a function that adds the loss's nodes.
        output: The output that the loss is on; by default the only float output.
        settings: Settings of the loss.

    Raises:
        TrainingError: If the loss or output is unknown.
    """
    chosen = choose_output(model, output)
    shape = index_model(model).main.type_of(chosen).shape or ()
    return with_labels(StepModel(model, LOSS, chosen, {}, LABELS, shape), loss, settings)


class ForwardEngine:
    """A model and a loss on its output, each in ONNX Runtime; there are no gradients.

    Args:
        step: What `forward_model` gives.
        loss: The loss.
        settings: Its settings.
        providers: Where to run the model.
        seed: Seed of the random directions.

    Raises:
        RunError: If ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        step: StepModel,
        loss: str | LossFunction,
        settings: Settings,
        providers: Providers,
        seed: int,
    ) -> None:
        self.step = step
        self._seed = seed
        self._model = Runner(step.model, providers, optimised=True)
        self._loss = Runner(_loss_model(step, loss, settings), CPU, optimised=True)
        self._dtypes = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for value in step.model.proto.graph.input
        }

    def run(self, weights: Mapping[str, Array], batch: Batch, step: int = 0) -> Result:
        """The loss of a batch, and an estimate of its gradients.

        The directions depend on the seed and the step alone, so a resumed run takes the same.

        Args:
            weights: The weights that train, by input.
            batch: Samples.
            step: How many steps were taken before.

        Raises:
            TrainingError: If the loss is not finite.
        """
        rng = np.random.default_rng((self._seed, 3, step))
        grads = {name: np.zeros_like(value) for name, value in weights.items()}
        total = 0.0
        for _ in range(PAIRS):
            way = {
                name: rng.standard_normal(value.shape, np.float32)
                for name, value in weights.items()
            }
            sides = []
            for sign in (1, -1):
                moved = {k: v + np.float32(sign * SIZE) * way[k] for k, v in weights.items()}
                sides.append(self.loss(moved, batch))
                require_finite_loss(sides[-1], batch, f"step {step + 1}: ")
            slope = np.float32((sides[0] - sides[1]) / (2 * SIZE * PAIRS))
            total += sum(sides) / (2 * PAIRS)
            for name, grad in grads.items():
                grad += slope * way[name]
        return Result(total, grads)

    def loss(self, weights: Mapping[str, Array], batch: Batch) -> float:
        """The loss of a batch."""
        parts = batch.parts(self.step.rows or batch.size)
        return sum(self._evaluate(weights, p)[0] * p.size / batch.size for p in parts)

    def evaluate(
        self, weights: Mapping[str, Array], data: Dataset, size: int, metric: Metric | None
    ) -> Evaluation:
        """The mean loss of samples, and a metric on them.

        Raises:
            TrainingError: If the loss of some of them is not finite.
        """
        return evaluate(
            *(self.step, data, size, metric), lambda batch: self._evaluate(weights, batch)
        )

    def _evaluate(self, weights: Mapping[str, Array], batch: Batch) -> tuple[float, Array]:
        """The loss of a batch, and the output that it is on."""
        feeds = {**batch.inputs, **weights}
        typed = {name: np.asarray(value, self._dtypes[name]) for name, value in feeds.items()}
        output = self._model.run(typed, [self.step.output])[self.step.output]
        kind = np.int64 if self.step.integers else np.float32
        given = {self.step.output: output, LABELS: np.asarray(batch.labels, kind)}
        return float(self._loss.run(given, [LOSS])[LOSS]), output


def _loss_model(step: StepModel, loss: str | LossFunction, settings: Settings) -> Model:
    """A model of the loss alone: from an output and the labels to one number."""
    (value,) = (v for v in step.model.proto.graph.output if v.name == step.output)
    kind = value.type.tensor_type.elem_type
    shape = index_model(step.model).main.type_of(step.output).shape
    given = helper.make_tensor_value_info(step.output, kind, shape)
    same = helper.make_tensor_value_info("same", kind, None)
    nodes = [helper.make_node("Identity", [step.output], ["same"])]
    graph = helper.make_graph(nodes, "loss", [given], [same])
    opset = helper.make_opsetid("", TARGET)
    model = Model(helper.make_model(graph, opset_imports=[opset], ir_version=8))
    add_loss(model, step.output, loss, settings)
    model.proto.graph.output.append(helper.make_tensor_value_info(LOSS, FLOAT, []))
    return model
