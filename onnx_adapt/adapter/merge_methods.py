"""The methods to merge adapters: those of PEFT's `add_weighted_adapter`.

Each method is a row of `METHODS`. Those that work on factors take `down` and `up` of each slot
by themselves. Those that work on updates take `down @ up` and split the result again. An
example of TIES (arXiv 2306.01708) on one matrix, with a density of a half and weights of 1:

    A [[3, -1], [2, 0]]      pruned [[3, 0], [2, 0]]      sum   [[1, 0], [-3, 0]]
    B [[-2, 0], [-5, 1]]     pruned [[-2, 0], [-5, 0]]    signs [[+, +], [-, +]]
    of each place the mean of the values with its sign: [[3, 0], [-5, 0]]

Source: peft 0.21.2, `peft/utils/merge_utils.py` and `peft/tuners/lora/model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to merge.

    Attributes:
        takes: What it adds up: the terms of whole slots, which it lays side by side, or their
            factors, or their updates.
        prunes: Which entries it sets to zero: the smallest, or random ones, or none.
        elects: Whether it keeps the entries of one sign at each place, and takes their mean.
    """

    takes: Literal["terms", "factors", "updates"]
    prunes: Literal["", "smallest", "random"] = ""
    elects: bool = False


METHODS = {
    "cat": Method(takes="terms"),
    "linear": Method(takes="factors"),
    "ties": Method(takes="factors", prunes="smallest", elects=True),
    "dare_linear": Method(takes="factors", prunes="random"),
    "dare_ties": Method(takes="factors", prunes="random", elects=True),
    "magnitude_prune": Method(takes="factors", prunes="smallest"),
    "svd": Method(takes="updates"),
    "ties_svd": Method(takes="updates", prunes="smallest", elects=True),
    "dare_linear_svd": Method(takes="updates", prunes="random"),
    "dare_ties_svd": Method(takes="updates", prunes="random", elects=True),
    "magnitude_prune_svd": Method(takes="updates", prunes="smallest"),
}
"""The methods by PEFT's names."""

MAJORITIES = ("total", "frequency")
"""How the sign of a place is elected: by the sum of the values, or by their number."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How to merge: a method and what it needs.

    Attributes:
        label: PEFT's name of the method.
        method: Its row.
        density: The share of entries that pruning keeps.
        majority: One of `MAJORITIES`.
        rank: The rank of the result of a method on updates, or None for the largest.
        random: Where random pruning takes its numbers from.
    """

    label: str
    method: Method
    density: float
    majority: str
    rank: int | None
    random: np.random.Generator


def choose(
    label: str,
    density: float | None,
    majority: str | None,
    rank: int | None,
    seed: int | None,
) -> Choice:
    """Check a method and its arguments; none may be without effect.

    Raises:
        AdapterError: If one is out of range, missing or without effect.
    """
    if label not in METHODS:
        raise AdapterError(
            f"{label!r} is no method to merge", hint=f"known: {', '.join(METHODS)}"
        )
    method = METHODS[label]
    idle = {
        "a density": density is not None and not method.prunes,
        "a majority": majority is not None and not method.elects,
        "a rank": rank is not None and method.takes != "updates",
        "a seed": seed is not None and method.prunes != "random",
    }
    for what, given in idle.items():
        if given:
            raise AdapterError(f"{what} has no effect on {label}", hint="leave it out")
    if method.prunes and density is None:
        raise AdapterError(f"{label} needs a density", hint="such as 0.5: half is kept")
    if density is not None and not (isinstance(density, int | float) and 0 < density <= 1):
        raise AdapterError(f"{density!r} is no density", hint="above 0 and up to 1")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"{rank!r} is no rank", hint="give a whole number from 1 on")
    if majority not in (None, *MAJORITIES):
        raise AdapterError(
            f"{majority!r} elects no sign", hint=f"known: {', '.join(MAJORITIES)}"
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise AdapterError(f"{seed!r} is no seed", hint="give a whole number from 0 on")
    random = np.random.default_rng(seed or 0)
    return Choice(label, method, density or 1.0, majority or "total", rank, random)


def combined(values: Sequence[Array], weights: Array, choice: Choice) -> Array:
    """Prune arrays, elect a sign for each place, and add them up or take their mean."""
    method = choice.method
    pruned = np.stack([_pruned(value, choice) for value in values])
    shares = pruned * weights.reshape(-1, *(1,) * values[0].ndim)
    if not method.elects:
        return np.asarray(shares.sum(axis=0))
    votes = pruned if choice.majority == "total" else np.sign(pruned)
    elected = np.where(votes.sum(axis=0) >= 0, 1, -1)
    kept = np.sign(pruned) == elected
    return np.asarray((shares * kept).sum(axis=0) / np.maximum(kept.sum(axis=0), 1))


def _pruned(value: Array, choice: Choice) -> Array:
    """Set entries to zero; the rest makes up for random ones (DARE, arXiv 2311.03099)."""
    if not choice.method.prunes:
        return value
    if choice.method.prunes == "random":
        kept = choice.random.random(value.shape) < choice.density
        return np.asarray(value * kept / choice.density)
    count = int(choice.density * value.size)
    flat = np.abs(value).reshape(-1)
    order = np.argpartition(flat, flat.size - count) if count < flat.size else np.arange(count)
    largest = np.zeros(flat.size)
    largest[order[flat.size - count :]] = 1
    return np.asarray(value * largest.reshape(value.shape))
