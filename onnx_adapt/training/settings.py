"""The settings of a training."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx_adapt.training.optimisers import Optimiser


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    Attributes:
        epochs: How often to go through the samples.
        batch_size: Samples in one run of the model.
        accumulate: How many batches make one step; the gradient is their mean.
        rate: The largest learning rate; 0 for the optimiser's own.
        optimiser: The optimiser.
        schedule: The schedule of the rate after the warm-up.
        warm_up: The share of the steps in which the rate rises.
        average: The share of the old in a moving average of the weights, such as 0.999; the
            averaged weights are validated and kept. 0 for no average.
        metric: What to choose the best weights by: `loss`, `accuracy`, `f1` or `recall@K`.
        patience: After how many epochs that are no better to stop; 0 for never.
        seed: Seed of all random numbers.
    """

    epochs: int = 3
    batch_size: int = 32
    accumulate: int = 1
    rate: float = 0.0
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: str = "cosine"
    warm_up: float = 0.1
    average: float = 0.0
    metric: str = "loss"
    patience: int = 0
    seed: int = 0
