"""The settings of a training."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx_adapt.errors import TrainingError
from onnx_adapt.training.optimisers import Optimiser, require_rule, require_schedule


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    Attributes:
        epochs: How often to go through the samples.
        steps: How many steps to take in place of whole epochs; 0 for `epochs`.
        batch_size: Samples in one run of the model.
        accumulate: How many batches make one step; the gradient is their mean.
        rate: The largest learning rate; 0 for the optimiser's own, or without gradients 20
            times that.
        optimiser: The optimiser.
        schedule: The schedule of the rate after the warm-up.
        warm_up: The share of the steps in which the rate rises.
        average: The share of the old in a moving average of the weights, such as 0.999; the
            averaged weights are validated and kept. 0 for no average.
        metric: What to choose the best weights by: `loss`, `accuracy`, `f1` or `recall@K`.
        patience: After how many epochs that are no better to stop; 0 for never.
        seed: Seed of all random numbers.
        forward_only: Whether the loss is tried on both sides of random moves of the weights,
            in place of gradients: slow, for models that have none.
        frozen_memory: How many MB may be taken to keep, for each sample, what the layers
            before the first slot give, which never changes. If they do not suffice, or are 0,
            it is computed in every step.
        recompute: Whether activations are computed a second time on the way back, where that
            takes less memory: a step takes about a third more time.
    """

    epochs: int = 3
    steps: int = 0
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
    forward_only: bool = False
    frozen_memory: int = 1024
    recompute: bool = False

    def check(self) -> None:
        """Refuse settings that are not possible.

        Raises:
            TrainingError: If one is out of its range, or a name is unknown.
        """
        require_rule(self.optimiser.name)
        require_schedule(self.schedule)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise TrainingError(
                    f"the setting {name} is {value}", hint=f"give {low} to {high}"
                )

        if self.forward_only and self.recompute:
            raise TrainingError(
                "without gradients nothing is kept that could be recomputed",
                hint="leave out --recompute",
            )

    @property
    def largest_rate(self) -> float:
        """The largest learning rate, also where none is given."""
        return self.rate or self.optimiser.rule.rate * (20 if self.forward_only else 1)


_RANGES = {
    "epochs": (1, 10**9),
    "steps": (0, 10**9),
    "batch_size": (1, 10**9),
    "accumulate": (1, 10**9),
    "rate": (0, 1e9),
    "warm_up": (0, 1),
    "average": (0, 0.999999999),
    "patience": (0, 10**9),
    "frozen_memory": (0, 10**9),
    "seed": (0, 2**63),
}
"""What each number must be between."""
