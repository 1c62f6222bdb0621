"""The training loop: steps, validation, and the best weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.training.data import Batch, Dataset, Order
from onnx_adapt.training.engine import Result
from onnx_adapt.training.evaluation import Evaluation
from onnx_adapt.training.metrics import Metric, read_metric
from onnx_adapt.training.optimisers import rate_at
from onnx_adapt.training.progress import Epoch, Progress, Report, Weights
from onnx_adapt.training.settings import Settings


class Stepper(Protocol):
    """What computes losses and gradients: `Engine`, or the one without gradients."""

    def run(self, weights: Weights, batch: Batch, step: int) -> Result:
        """The loss of a batch and its gradients; `step` numbers the runs."""

    def evaluate(
        self, weights: Weights, data: Dataset, size: int, metric: Metric | None
    ) -> Evaluation:
        """The loss of samples, and a metric on them."""


def fit(
    engine: Stepper,
    progress: Progress,
    data: Dataset,
    held_back: Dataset | None,
    settings: Settings,
    order: Order,
) -> Iterator[tuple[Progress, Report]]:
    """Train, step by step.

    Args:
        engine: What computes losses and gradients.
        progress: Where to begin; a training that was stopped goes on bit for bit.
        data: The samples to train with.
        held_back: The samples to choose the best weights by; without any the last are kept.
        settings: How to train.
        order: The order of the samples.

    Yields:
        The progress after each step, and what to tell of it.

    Raises:
        TrainingError: If a loss or a gradient is not finite.
    """
    each = -(-len(order.plan(data, 0)) // settings.accumulate)
    steps = settings.steps or each * settings.epochs
    warm_up = round(steps * settings.warm_up)
    while progress.step < steps and not _out_of_patience(progress, settings.patience):
        epoch, begin = divmod(progress.step, each)
        plan = order.plan(data, epoch)
        for number in range(begin, min(each, steps - epoch * each)):
            at = number * settings.accumulate
            batches = [data.read(*item) for item in plan[at : at + settings.accumulate]]
            now = rate_at(
                settings.schedule, settings.largest_rate, progress.step, steps, warm_up
            )
            progress, loss = take_step(engine, progress, batches, settings, now)
            done = None
            if number == each - 1 or progress.step == steps:
                progress, done = _finish_epoch(engine, progress, held_back, settings, epoch)
            samples = sum(batch.size for batch in batches)
            told = Report(progress.step, steps, samples, loss, now, epoch + 1, done)
            yield progress, told


def take_step(
    engine: Stepper,
    progress: Progress,
    batches: Sequence[Batch],
    settings: Settings,
    rate: float,
) -> tuple[Progress, float]:
    """Take one step on the mean gradient of some batches.

    Returns:
        The progress after it, and its loss.
    """
    total = sum(batch.size for batch in batches)
    loss, grads = 0.0, {name: np.zeros_like(v) for name, v in progress.weights.items()}
    for batch in batches:
        share = batch.size / total
        result = engine.run(progress.weights, batch, progress.step)
        loss += share * result.loss
        for name, grad in result.grads.items():
            if not np.isfinite(grad).all():
                raise TrainingError(
                    f"step {progress.step + 1}: the gradient of {name!r} is not finite on "
                    f"{batch.name}",
                    hint="a lower rate or a smaller clip may help",
                )
            grads[name] += np.float32(share) * grad
    weights, state = settings.optimiser.step(
        progress.weights, grads, progress.state, progress.step + 1, rate
    )
    after = replace(
        progress,
        weights=weights,
        state=state,
        step=progress.step + 1,
        average=_averaged(progress.average, weights, settings.average),
        loss_sum=progress.loss_sum + loss * total,
        seen=progress.seen + total,
    )
    return after, loss


def _averaged(average: Weights, weights: Weights, kept: float) -> Weights:
    """The moving average after a step; it begins with the weights of the first."""
    if not kept:
        return {}
    return {
        name: value if name not in average else _mixed(average[name], value, kept)
        for name, value in weights.items()
    }


def _mixed(old: Array, new: Array, kept: float) -> Array:
    return np.asarray(old + np.float32(1 - kept) * (new - old))


def _finish_epoch(
    engine: Stepper,
    progress: Progress,
    held_back: Dataset | None,
    settings: Settings,
    number: int,
) -> tuple[Progress, Epoch]:
    """Validate, and keep the weights if they are the best so far."""
    metric = read_metric(settings.metric)
    loss = score = None
    if held_back is not None and held_back.size:
        found = engine.evaluate(progress.current, held_back, settings.batch_size, metric)
        loss, score = found.loss, found.loss if metric is None else found.score
    mean = progress.loss_sum / progress.seen
    epoch = Epoch(number + 1, mean, loss, score, best=True)
    best = next((epoch for epoch in reversed(progress.history) if epoch.best), None)
    if best is not None and _merit(epoch, metric) <= _merit(best, metric):
        epoch = replace(epoch, best=False)
    if epoch.best:
        progress = replace(progress, best=progress.current)
    history = (*progress.history, epoch)
    return replace(progress, history=history, loss_sum=0.0, seen=0), epoch


def _merit(epoch: Epoch, metric: Metric | None) -> tuple[float, float]:
    """How good an epoch is: the metric, and of two with one metric the lower loss.

    On few samples many epochs have one accuracy, and the first of them has learned least.
    Without samples that are held back the last epoch is the best.
    """
    if epoch.validation_loss is None or epoch.score is None:
        return float(epoch.number), 0.0
    return 0.0 if metric is None else epoch.score, -epoch.validation_loss


def _out_of_patience(progress: Progress, patience: int) -> bool:
    last = progress.history[-patience:] if patience else ()
    return len(last) == patience > 0 and not any(epoch.best for epoch in last)
