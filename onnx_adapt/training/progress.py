"""How far a training is: all that its next step depends on, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.training.optimisers import Optimiser, State

Weights = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch gave.

    Attributes:
        number: Its number, from 1.
        loss: The mean loss of its samples.
        validation_loss: The loss of the samples that are held back; None without any.
        score: The metric on them; None without any.
        best: Whether it is the best so far.
    """

    number: int
    loss: float
    validation_loss: float | None
    score: float | None
    best: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is. A step makes a new one, so an interrupted step leaves it whole.

    Attributes:
        weights: The weights after the last step.
        state: The memory of the optimiser.
        step: How many steps were taken.
        average: The moving average of the weights; empty without one.
        best: The best weights so far; empty before the first epoch is done.
        history: What each epoch gave.
        loss_sum: The losses of an epoch under way, each times its samples.
        seen: How many samples of that epoch were seen.
    """

    weights: Weights
    state: State
    step: int = 0
    average: Weights = field(default_factory=dict)
    best: Weights = field(default_factory=dict)
    history: tuple[Epoch, ...] = ()
    loss_sum: float = 0.0
    seen: int = 0

    @property
    def current(self) -> Weights:
        """The weights that the training would give now: averaged if they are averaged."""
        return self.average or self.weights


@dataclass(frozen=True, slots=True)
class Report:
    """One step, as it is told to who watches.

    Attributes:
        step: Its number, from 1.
        steps: How many there are.
        samples: How many samples it saw.
        loss: Its loss.
        rate: Its learning rate.
        number: The number of its epoch, from 1.
        epoch: What the epoch gave, after its last step.
    """

    step: int
    steps: int
    samples: int
    loss: float
    rate: float
    number: int
    epoch: Epoch | None = None


def start(weights: Weights, optimiser: Optimiser) -> Progress:
    """A training that has not begun; its weights are kept in float32."""
    single = {name: value.astype(np.float32) for name, value in weights.items()}
    return Progress(single, optimiser.start(single))
