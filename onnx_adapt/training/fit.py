"""The training loop: steps, validation, the best weights, and a state to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.training.data import Dataset, batches
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.metrics import read_metric
from onnx_adapt.training.optimisers import Optimiser, State, rate_at

Weights = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    Attributes:
        epochs: How often to go through the samples.
        batch_size: Samples in one step.
        rate: The largest learning rate; 0 for the optimiser's own.
        optimiser: The optimiser.
        schedule: The schedule of the rate after the warm-up.
        warm_up: The share of the steps in which the rate rises.
        metric: What to choose the best weights by: `loss` or a name in `METRICS`.
        patience: After how many epochs that are no better to stop; 0 for never.
        seed: Seed of the order of samples.
    """

    epochs: int = 3
    batch_size: int = 32
    rate: float = 0.0
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: str = "cosine"
    warm_up: float = 0.1
    metric: str = "loss"
    patience: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch gave.

    Attributes:
        number: Its number, from 1.
        loss: The mean loss of its steps.
        validation_loss: The loss of the samples that are held back; None without any.
        score: The metric on them; None without any.
        best: Whether it is the best so far.
    """

    number: int
    loss: float
    validation_loss: float | None
    score: float | None
    best: bool


@dataclass(slots=True)
class Progress:
    """How far a training is: all that the next step depends on.

    Attributes:
        weights: The weights after the last step.
        state: The memory of the optimiser.
        step: How many steps were taken.
        best: The best weights so far.
        best_score: Their score; None before the first epoch is done.
        history: What each epoch gave.
        losses: The losses of the steps of an epoch under way.
    """

    weights: Weights
    state: State
    step: int = 0
    best: Weights = field(default_factory=dict)
    best_score: float | None = None
    history: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """One step, as it is told to who watches.

    Attributes:
        step: Its number, from 1.
        steps: How many there are.
        loss: Its loss.
        rate: Its learning rate.
        epoch: What the epoch gave, after its last step.
    """

    step: int
    steps: int
    loss: float
    rate: float
    epoch: Epoch | None = None


def start(weights: Mapping[str, Array], settings: Settings) -> Progress:
    """A training that has not begun; its weights are kept in float32."""
    single = {name: value.astype(np.float32) for name, value in weights.items()}
    return Progress(single, settings.optimiser.start(single))


def fit(
    engine: Engine,
    progress: Progress,
    data: Dataset,
    held_back: Dataset | None,
    settings: Settings,
) -> Iterator[Report]:
    """Train, step by step; `progress` is changed in place.

    Args:
        engine: The step model.
        progress: Where to begin; a training that was stopped goes on bit for bit.
        data: The samples to train with.
        held_back: The samples to choose the best weights by; without any the last are kept.
        settings: How to train.

    Raises:
        TrainingError: If a loss or a gradient is not finite; `progress` is as it was before.
    """
    rate = settings.rate or settings.optimiser.rule.rate
    each = -(-data.size // settings.batch_size)
    steps = each * settings.epochs
    warm_up = round(steps * settings.warm_up)
    while progress.step < steps:
        epoch, place = divmod(progress.step, each)
        if _out_of_patience(progress, settings):
            return
        order = batches(data, settings.batch_size, settings.seed, epoch)
        for number, batch in enumerate(order):
            if number < place:
                continue
            now = rate_at(settings.schedule, rate, progress.step, steps, warm_up)
            loss = _take_step(engine, progress, batch, settings.optimiser, now)
            done = None
            if number == each - 1:
                done = _finish_epoch(engine, progress, held_back, settings, epoch + 1)
            yield Report(progress.step, steps, loss, now, done)


def _take_step(
    engine: Engine, progress: Progress, batch: Dataset, optimiser: Optimiser, rate: float
) -> float:
    result = engine.run(progress.weights, batch)
    for name, grad in result.grads.items():
        if not np.isfinite(grad).all():
            raise TrainingError(
                f"the gradient of {name!r} is not finite after {progress.step} steps",
                hint="a lower rate or a smaller clip may help",
            )
    progress.step += 1
    progress.weights = optimiser.step(
        progress.weights, result.grads, progress.state, progress.step, rate
    )
    progress.losses.append(result.loss)
    return result.loss


def _finish_epoch(
    engine: Engine,
    progress: Progress,
    held_back: Dataset | None,
    settings: Settings,
    number: int,
) -> Epoch:
    """Validate, and keep the weights if they are the best so far."""
    metric = read_metric(settings.metric)
    loss = score = None
    better = True
    if held_back is not None and held_back.size:
        loss, outputs = engine.evaluate(progress.weights, held_back, settings.batch_size)
        score = loss if metric is None else metric.compute(outputs, held_back.labels)
        sign = 1 if metric is not None and metric.larger_is_better else -1
        best = progress.best_score
        better = best is None or sign * score > sign * best
    if better:
        progress.best, progress.best_score = progress.weights, score
    mean = float(np.mean(progress.losses))
    progress.losses = []
    epoch = Epoch(number, mean, loss, score, better)
    progress.history.append(epoch)
    return epoch


def _out_of_patience(progress: Progress, settings: Settings) -> bool:
    last = progress.history[-settings.patience :] if settings.patience else []
    whole = len(last) == settings.patience
    return bool(last) and whole and not any(epoch.best for epoch in last)


OnReport = Callable[[Report], None]
"""Told of every step."""
