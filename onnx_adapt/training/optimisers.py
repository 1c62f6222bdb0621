"""Optimisers in numpy: from weights, gradients and a state to new weights and a new state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError

Arrays = Mapping[str, Array]
State = dict[str, Array]
"""The memory of an optimiser: arrays by name, so that it can be saved and read again."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What one optimiser does to one weight.

    Attributes:
        memory: Names of the arrays that it keeps for each weight; they start as zeros.
        step: From a gradient, the memory, which it changes in place, and the number of the
            step from 1, to what is subtracted from the weight for a rate of 1.
        rate: A learning rate that often works.
    """

    memory: tuple[str, ...]
    step: Callable[[Array, Mapping[str, Array], int], Array]
    rate: float


def _adam(grad: Array, memory: Mapping[str, Array], count: int) -> Array:
    """Adam (Kingma and Ba, 2015) with PyTorch's betas 0.9 and 0.999 and epsilon 1e-8."""
    first, second = memory["mean"], memory["square"]
    first += (1 - 0.9) * (grad - first)
    second *= 0.999
    second += (1 - 0.999) * grad * grad
    root = np.sqrt(second / (1 - 0.999**count)) + 1e-8
    return np.asarray(first / (1 - 0.9**count) / root)


def _sgd(grad: Array, memory: Mapping[str, Array], count: int) -> Array:
    """Gradient descent."""
    return grad


def _momentum(grad: Array, memory: Mapping[str, Array], count: int) -> Array:
    """Gradient descent with a momentum of 0.9, as in PyTorch."""
    velocity = memory["velocity"]
    velocity *= 0.9 if count > 1 else 0.0
    velocity += grad
    return velocity.copy()


def _lion(grad: Array, memory: Mapping[str, Array], count: int) -> Array:
    """Lion (Chen et al., 2023) with betas 0.9 and 0.99."""
    mean = memory["mean"]
    step = np.sign(0.9 * mean + 0.1 * grad)
    mean *= 0.99
    mean += 0.01 * grad
    return np.asarray(step)


RULES: dict[str, Rule] = {
    "adamw": Rule(("mean", "square"), _adam, 1e-3),
    "sgd": Rule((), _sgd, 1e-1),
    "momentum": Rule(("velocity",), _momentum, 1e-2),
    "lion": Rule(("mean",), _lion, 1e-4),
}
"""The optimisers by name; to add one, add a row."""


def require_rule(name: str) -> None:
    """Refuse an optimiser that there is not.

    Raises:
        TrainingError: If there is none of this name.
    """
    if name not in RULES:
        raise TrainingError(f"unknown optimiser {name!r}", hint=f"one of {', '.join(RULES)}")


@dataclass(frozen=True, slots=True)
class Optimiser:
    """An optimiser with its settings.

    Attributes:
        name: Its name in `RULES`.
        decay: Decoupled weight decay (Loshchilov and Hutter, 2019), for each step and rate;
            matrices only, not biases and vectors.
        clip: The largest norm of all gradients together; 0 for no limit.
    """

    name: str = "adamw"
    decay: float = 0.0
    clip: float = 1.0

    @property
    def rule(self) -> Rule:
        """What it does.

        Raises:
            TrainingError: If there is no such optimiser.
        """
        require_rule(self.name)
        return RULES[self.name]

    def start(self, weights: Arrays) -> State:
        """The memory before the first step."""
        return {
            f"{part}:{name}": np.zeros_like(value)
            for name, value in weights.items()
            for part in self.rule.memory
        }

    def step(
        self, weights: Arrays, grads: Arrays, state: Arrays, count: int, rate: float
    ) -> tuple[dict[str, Array], State]:
        """Take one step.

        Args:
            weights: The weights, in float32.
            grads: The gradient of each.
            state: The memory.
            count: The number of the step, from 1.
            rate: The learning rate.

        Returns:
            The new weights, and the new memory.
        """
        clipped = clip(grads, self.clip)
        made, after = {}, {key: value.copy() for key, value in state.items()}
        for name, weight in weights.items():
            memory = {part: after[f"{part}:{name}"] for part in self.rule.memory}
            change = rate * self.rule.step(clipped[name], memory, count)
            kept = 1 - rate * self.decay if weight.ndim > 1 else 1.0
            made[name] = (weight * np.float32(kept) - change).astype(weight.dtype)
        return made, after


def norm(grads: Arrays) -> float:
    """The norm of all gradients together."""
    squares = (float(np.vdot(g, g)) for g in (v.astype(np.float64) for v in grads.values()))
    return float(np.sqrt(sum(squares)))


def clip(grads: Arrays, largest: float) -> Arrays:
    """Gradients scaled down so that their common norm is at most `largest`."""
    found = norm(grads) if largest else 0.0
    if found <= largest:
        return grads
    return {name: value * np.float32(largest / found) for name, value in grads.items()}


Schedule = Callable[[float], float]
"""The share of the learning rate at a place between 0 and 1 of what follows the warm-up."""

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda place: 1.0,
    "linear": lambda place: 1 - place,
    "cosine": lambda place: (1 + float(np.cos(np.pi * place))) / 2,
}
"""Schedules of the learning rate by name."""


def require_schedule(name: str) -> None:
    """Refuse a schedule that there is not.

    Raises:
        TrainingError: If there is none of this name.
    """
    if name not in SCHEDULES:
        raise TrainingError(
            f"unknown schedule {name!r}", hint=f"one of {', '.join(SCHEDULES)}"
        )


def rate_at(schedule: str, rate: float, step: int, steps: int, warm_up: int) -> float:
    """The learning rate of one step, counted from 0.

    It rises in a line over `warm_up` steps and follows the schedule to the last one.
    """
    if step < warm_up:
        return rate * (step + 1) / warm_up
    return rate * SCHEDULES[schedule]((step - warm_up) / max(1, steps - warm_up))
