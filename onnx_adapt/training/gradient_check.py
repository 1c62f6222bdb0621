"""Hold the gradients of a step model against differences of its loss, before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import GradientError
from onnx_adapt.training.data import Batch
from onnx_adapt.training.engine import Engine

# A gradient g says that a small move d of a weight changes the loss by the sum of g * d. The
# check moves each weight both ways along its gradient, then a random half of its numbers, then
# the other half, and compares the change of the loss, `L(w + d) - L(w - d)`, with twice that
# sum. In these directions the terms of the sum do not cancel. The loss is computed in float32,
# so a move has to be large enough for its change to stand out, and small enough that no ReLU
# on the way changes sides: steps are tried from large to small, and the first that agrees
# counts. A wrong gradient agrees at none of those that stand out.

STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
"""How far a weight is moved, relative to its norm."""

TOLERANCE = 0.05
"""How far the two may be apart, relative to the larger; rounding comes on top of it."""

_NOISE = 64 * float(np.finfo(np.float32).eps)
"""How far apart two losses in float32 may be that ought to be equal, relative to them."""


@dataclass(frozen=True, slots=True)
class Checked:
    """How well the gradient of one weight agrees with differences.

    Attributes:
        weight: The weight.
        expected: The change of the loss that the gradient tells.
        found: The change of the loss.
        noise: How far rounding may have taken it.
    """

    weight: str
    expected: float
    found: float
    noise: float

    @property
    def stands_out(self) -> bool:
        """Whether the change of the loss is much larger than rounding."""
        return max(abs(self.expected), abs(self.found)) > 5 * self.noise

    @property
    def agrees(self) -> bool:
        """Whether the two are as close as they have to be."""
        largest = max(abs(self.expected), abs(self.found))
        return abs(self.expected - self.found) <= TOLERANCE * largest + self.noise


def check_gradients(
    engine: Engine, weights: Mapping[str, Array], batch: Batch, seed: int = 0
) -> list[Checked]:
    """Compare the gradient of each weight with differences of the loss.

    Args:
        engine: The step model.
        weights: Where to check; small random numbers are added, because some gradients are
            zero where an adapter starts.
        batch: Samples.
        seed: Seed of the random numbers.

    Returns:
        The checks whose change of the loss stands out from rounding.

    Raises:
        GradientError: If a gradient does not agree.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[Checked]] = {}
    left = list(weights)
    for _ in range(_DRAWS):
        found |= _check_at(engine, weights, batch, left, rng)
        left = [name for name in left if not all(item.agrees for item in found[name])]
    if left:
        wrong = next(item for item in found[left[0]] if not item.agrees)
        raise GradientError(
            f"the gradient of {wrong.weight!r} says that the loss changes by "
            f"{wrong.expected:.3g}, and it changes by {wrong.found:.3g}",
            hint="please report this model; `--no-check` trains all the same",
        )
    return [item for items in found.values() for item in items]


_DRAWS = 3
"""How often other random numbers are tried: a ReLU may be at its bend for some."""


def _check_at(
    engine: Engine,
    weights: Mapping[str, Array],
    batch: Batch,
    names: Sequence[str],
    rng: np.random.Generator,
) -> dict[str, list[Checked]]:
    """Check some gradients, with random numbers added to all weights."""
    moved = {name: _moved(value, rng) for name, value in weights.items()}
    grads = engine.run(moved, batch).grads
    checks: dict[str, list[Checked]] = {}
    for name in names:
        grad = grads[name]
        half = rng.random(grad.shape) < 0.5
        directions = (grad, np.where(half, grad, 0), np.where(half, 0, grad))
        checks[name] = [
            item
            for direction in directions
            if np.any(direction)
            for item in _checked(engine, moved, batch, name, grad, direction)
        ]
    return checks


def _moved(value: Array, rng: np.random.Generator) -> Array:
    """A weight with random numbers added, large enough that the adapter has an effect."""
    scale = max(float(np.abs(value).mean()), max(value.shape, default=1) ** -0.5)
    return np.asarray(value + scale * rng.standard_normal(value.shape), value.dtype)


def _checked(
    engine: Engine,
    weights: Mapping[str, Array],
    batch: Batch,
    name: str,
    grad: Array,
    direction: Array,
) -> list[Checked]:
    """The best agreement of all steps that stand out; empty if none does."""
    weight = weights[name]
    unit = direction / np.linalg.norm(direction)
    size = max(float(np.linalg.norm(weight)), 1e-3)
    tried: list[Checked] = []
    for step in STEPS:
        move = (step * size * unit).astype(np.float32)
        losses = [
            engine.loss({**weights, name: weight + sign * move}, batch) for sign in (1, -1)
        ]
        expected = 2 * float(np.vdot(grad.astype(np.float64), move))
        noise = _NOISE * max(abs(loss) for loss in losses)
        item = Checked(name, expected, losses[0] - losses[1], noise)
        if not item.stands_out:
            break
        tried.append(item)
        if item.agrees:
            return [item]
    return [min(tried, key=_apart)] if tried else []


def _apart(item: Checked) -> float:
    return abs(item.expected - item.found) / max(abs(item.expected), abs(item.found), 1e-30)


def worst(checks: Sequence[Checked]) -> float:
    """The largest relative distance of a gradient from differences of the loss."""
    return max(map(_apart, checks), default=0.0)
