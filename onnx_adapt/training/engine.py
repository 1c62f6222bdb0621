"""Running a step model: a loss and its gradients for one batch, or the outputs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.ort import Providers
from onnx_adapt.training.data import Batch, Dataset
from onnx_adapt.training.evaluation import Evaluation, evaluate, require_finite_loss
from onnx_adapt.training.metrics import Metric
from onnx_adapt.training.session import TrainingSession
from onnx_adapt.training.step_model import StepModel

Arrays = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of a step model gave.

    Attributes:
        loss: The loss.
        grads: The gradient of each weight, in float32.
    """

    loss: float
    grads: dict[str, Array]


class Engine:
    """A step model in ONNX Runtime.

    Args:
        step: The step model.
        providers: Where to run it.

    Raises:
        RunError: If ONNX Runtime refuses the model.
    """

    def __init__(self, step: StepModel, providers: Providers) -> None:
        self.step = step
        self._session = TrainingSession(step.model, providers)

    def run(self, weights: Arrays, batch: Batch, step: int = 0) -> Result:
        """The loss of a batch and its gradients.

        A model that takes a fixed number of rows is run several times, and the mean is taken.

        Args:
            weights: The weights that train, by input.
            batch: Samples.
            step: How many steps were taken before.

        Raises:
            TrainingError: If the loss is not finite.
        """
        total, grads = 0.0, {name: np.zeros_like(value) for name, value in weights.items()}
        for part in batch.parts(self.step.rows or batch.size):
            share = part.size / batch.size
            values = self._run(weights, part, [self.step.loss, *self.step.grads.values()])
            loss = float(values[self.step.loss])
            require_finite_loss(loss, part, f"step {step + 1}: ")
            total += share * loss
            for name, made in self.step.grads.items():
                grads[name] += np.float32(share) * values[made].astype(np.float32)
        return Result(total, grads)

    def loss(self, weights: Arrays, batch: Batch) -> float:
        """The loss of a batch, by a forward run alone."""
        total = 0.0
        for part in batch.parts(self.step.rows or batch.size):
            values = self._run(weights, part, [self.step.loss])
            total += float(values[self.step.loss]) * part.size / batch.size
        return total

    def evaluate(
        self, weights: Arrays, data: Dataset, size: int, metric: Metric | None
    ) -> Evaluation:
        """The mean loss of samples, and a metric on them.

        Raises:
            TrainingError: If the loss of some of them is not finite.
        """

        def both(batch: Batch) -> tuple[float, Array]:
            values = self._run(weights, batch, [self.step.loss, self.step.output])
            return float(values[self.step.loss]), values[self.step.output]

        return evaluate(self.step, data, size, metric, both)

    def _run(self, weights: Arrays, batch: Batch, outputs: Sequence[str]) -> dict[str, Array]:
        feeds = {**batch.feeds(self.step.labels), **weights}
        return self._session.run(feeds, outputs, batch.name)
