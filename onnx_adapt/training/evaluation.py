"""How good weights are on samples: the mean loss, and a metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.training.data import Batch, Dataset, in_order
from onnx_adapt.training.metrics import Metric
from onnx_adapt.training.step_model import StepModel


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good weights are on samples.

    Attributes:
        loss: The mean loss.
        score: The metric; 0 without one.
    """

    loss: float
    score: float = 0.0


def evaluate(
    step: StepModel,
    data: Dataset,
    size: int,
    metric: Metric | None,
    run: Callable[[Batch], tuple[float, Array]],
) -> Evaluation:
    """The mean loss of samples, and a metric on them.

    Args:
        step: What is known of the labels.
        data: The samples.
        size: Samples in one run.
        metric: The metric, or None.
        run: Gives the loss of a batch, and the output that it is on.

    Raises:
        TrainingError: If the loss of some of them is not finite.
    """
    total, seen, found = 0.0, 0, _Found()
    for batch in in_order(data, step.rows or size):
        if batch.size < step.rows:
            continue
        loss, output = run(batch)
        require_finite_loss(loss, batch, "validating: ")
        total += loss * batch.size
        seen += batch.size
        if metric is not None:
            found = found.with_batch(step, metric, output, batch)
    return Evaluation(total / max(seen, 1), found.score(metric))


@dataclass(frozen=True, slots=True)
class _Found:
    """What a metric keeps of the batches so far.

    Attributes:
        kept: What it keeps of the outputs.
        labels: The labels of the same.
    """

    kept: tuple[Array, ...] = ()
    labels: tuple[Array, ...] = ()

    def with_batch(
        self, step: StepModel, metric: Metric, outputs: Array, batch: Batch
    ) -> _Found:
        """The same with a further batch; what is ignored is left out."""
        kept, labels = metric.keep(outputs), batch.labels
        if step.shift:
            kept, labels = kept[:, :-1], labels[:, 1:]
        counts = labels != step.ignored if step.classes else np.ones(labels.shape, bool)
        return _Found((*self.kept, kept[counts]), (*self.labels, labels[counts]))

    def score(self, metric: Metric | None) -> float:
        """The metric on all of them."""
        if metric is None or not self.kept:
            return 0.0
        return metric.compute(np.concatenate(self.kept), np.concatenate(self.labels))


def require_finite_loss(loss: float, batch: Batch, when: str) -> None:
    """Refuse a loss that is NaN or infinite, and say which samples and inputs are to blame.

    Raises:
        TrainingError: If it is not finite.
    """
    if np.isfinite(loss):
        return
    require_finite_inputs(batch, when)
    raise TrainingError(
        f"{when}the loss is {loss} on {batch.name}",
        hint="a lower rate may help",
    )


def require_finite_inputs(batch: Batch, when: str = "") -> None:
    """Refuse samples that hold NaN or infinity.

    Raises:
        TrainingError: If one does; it names the first.
    """
    for name, value in {**batch.inputs, "labels": batch.labels}.items():
        bad = ~np.isfinite(value) if value.dtype.kind == "f" else np.zeros(value.shape, bool)
        if bad.any():
            row = int(np.argwhere(bad)[0][0]) if value.ndim else 0
            raise TrainingError(
                f"{when}{name!r} of sample {batch.numbers[row]} of {batch.label} holds NaN or "
                "infinity",
                hint="repair the data, or leave this sample out",
            )
