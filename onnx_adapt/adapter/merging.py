"""Merge adapters, slot by slot, by one of the methods of `merge_methods.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_adapt.adapter.blending import blend, blend_frame, blend_slot
from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.adapter.merge_methods import Choice, choose, combined
from onnx_adapt.adapter.updates import (
    Update,
    nearest_update,
    projects,
    update_of,
    why_no_product,
    with_update,
)
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError

_MOST_BYTES = 2 << 30
"""The largest matrix that a method may form, in float64."""


def merge(
    adapters: Sequence[AdapterLike],
    weights: Sequence[float],
    *,
    method: str = "cat",
    density: float | None = None,
    majority: str | None = None,
    rank: int | None = None,
    seed: int | None = None,
    name: str = "",
    base: Mapping[str, Array] | None = None,
) -> Adapter:
    """Merge adapters into one, as PEFT's `add_weighted_adapter` does.

    `cat` is the exact blend, of any slots and ranks. The other methods are for slots without
    an activation, and keep the rank. `linear` also takes the plain weighted sum of the weights
    of bottlenecks of one size, as AdapterHub's `average_adapter`, and of IA3's vectors, as
    PEFT. Biases, scales and replaced weights of all methods but this are blended as by `cat`.
    The methods on factors give PEFT's result where all adapters have one scale `alpha / r`,
    which is folded into `up` here.

    Args:
        adapters: The adapters, of one base model.
        weights: How much of each; any finite numbers.
        method: `cat`, `linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`, `svd`,
            or one of the pruning ones with `_svd` behind, which works on `down @ up`.
        density: The share of entries that pruning keeps, above 0 and up to 1.
        majority: `total` or `frequency`: how TIES elects a sign; by default `total`.
        rank: The rank that an `svd` method gives; by default the largest of the adapters'.
        seed: The seed for DARE's random numbers; by default 0.
        name: What to call the result; by default its recipe.
        base: The base's own values of replaced weights; not needed where weights sum to 1.

    Raises:
        AdapterError: If the adapters do not belong together, a slot cannot be merged this way,
            or an argument has no effect.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> rng = np.random.default_rng(0)
        >>> def lora(name):
        ...     fc = {"down": rng.normal(size=(8, 2)), "up": rng.normal(size=(2, 8))}
        ...     return oa.Adapter(name, {"fc": fc}, activations={"fc": "identity"})
        >>> both = oa.merge([lora("fr"), lora("de")], [0.7, 0.3], method="ties", density=0.5)
        >>> both.weights["fc"]["down"].shape
        (8, 2)
    """
    choice = choose(method, density, majority, rank, seed)
    given = [as_adapter(adapter) for adapter in adapters]
    _refuse_other_extra(given)
    if choice.method.takes == "terms":
        return replace(blend(given, weights, name=name, base=base), extra=given[0].extra)
    frame = blend_frame(given, weights, name=name, base=base)
    if len(given) == 1 and method != "linear":
        raise AdapterError(
            f"{method} merges several adapters, and there is one",
            hint="linear scales a single one",
        )
    shares = [(a, float(weight)) for a, weight in zip(given, weights, strict=True)]
    # Sorted, so that the random numbers do not depend on the order of the slots.
    slots = sorted({slot for adapter in given for slot in adapter.weights})
    merged = {slot: _merged(slot, shares, choice) for slot in slots}
    return replace(frame, weights=merged, extra=given[0].extra)


def _refuse_other_extra(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters whose records have different keys that this version does not know."""
    for adapter in adapters:
        if adapter.extra != adapters[0].extra:
            keys = {key for a in adapters for extra in a.extra.values() for key, _ in extra}
            raise AdapterError(
                f"the records of the adapters differ in {', '.join(sorted(keys))}, which this "
                "version does not know",
                hint="upgrade: pip install -U onnx-adapt",
            )


_Shares = Sequence[tuple[Adapter, float]]


def _merged(slot: str, everyone: _Shares, choice: Choice) -> dict[str, Array]:
    """Merge one slot of the adapters that have weights for it."""
    shares = [(adapter, weight) for adapter, weight in everyone if slot in adapter.weights]
    first = shares[0][0].weights[slot]
    plain = choice.label == "linear" and (not projects(first) or _has_activation(slot, shares))
    if plain:
        return _summed(slot, shares)
    if not projects(first):
        raise AdapterError(
            f"slot {slot!r} has no projections, which {choice.label} works on",
            hint="merge IA3 by cat or linear",
        )
    _refuse_activation(slot, shares, choice)
    updates = [update for a, _ in shares if (update := update_of(a, slot)) is not None]
    if len({(u.left.shape[:2], u.right.shape[2]) for u in updates}) > 1:
        raise AdapterError(
            f"slot {slot!r} is for layers of different sizes in the adapters",
            hint="merge adapters of one base",
        )
    numbers = [weight for _, weight in shares]
    merge_them = _of_factors if choice.method.takes == "factors" else _of_updates
    update = merge_them(slot, updates, numbers, choice)
    # The exact blend of everything else; its projections are replaced.
    rest = blend_slot(slot, [(adapter.weights[slot], weight) for adapter, weight in shares])
    made = with_update({part: v for part, v in rest.items() if part != "gain"}, update)
    made |= {"gain": rest["gain"]} if "gain" in rest else {}
    _refuse_overflow(slot, made)
    return {part: made[part] for part in first}


def _has_activation(slot: str, shares: _Shares) -> bool:
    return all(a.activations.get(slot, "identity") != "identity" for a, _ in shares)


def _refuse_activation(slot: str, shares: _Shares, choice: Choice) -> None:
    for adapter, _ in shares:
        if why := why_no_product(adapter, slot):
            raise AdapterError(
                f"slot {slot!r} of adapter {adapter.name!r} {why}; {choice.label} is for LoRA "
                "and other slots without an activation",
                hint="cat is exact; linear averages the weights of bottlenecks of one size",
            )


def _refuse_overflow(slot: str, parts: Mapping[str, Array]) -> None:
    for part, value in parts.items():
        if not np.isfinite(value).all():
            raise AdapterError(
                f"{part} of slot {slot!r} passes what {value.dtype} holds, or is NaN or "
                "infinity already",
                hint="merge with smaller weights",
            )


def _summed(slot: str, shares: _Shares) -> dict[str, Array]:
    """The weighted sum of each weight: AdapterHub for bottlenecks, PEFT for IA3."""
    first = shares[0][0].weights[slot]
    for adapter, _ in shares:
        parts = adapter.weights[slot]
        if {p: v.shape for p, v in parts.items()} != {p: v.shape for p, v in first.items()}:
            raise AdapterError(
                f"slot {slot!r} has other parts or sizes in {adapter.name!r} than in "
                f"{shares[0][0].name!r}, so there is no mean of their weights",
                hint="cat takes bottlenecks of any size",
            )
    made = {}
    for part, value in first.items():
        terms = [np.asarray(a.weights[slot][part], np.float64) * w for a, w in shares]
        with np.errstate(over="ignore"):
            made[part] = np.ascontiguousarray(np.sum(terms, axis=0), value.dtype)
    _refuse_overflow(slot, made)
    return made


def _of_factors(
    slot: str, updates: Sequence[Update], weights: Sequence[float], choice: Choice
) -> Update:
    """Merge `down` and `up` by themselves, each with the root of the weights."""
    if len(ranks := {update.rank for update in updates}) > 1:
        raise AdapterError(
            f"slot {slot!r} has the ranks {', '.join(map(str, sorted(ranks)))} in the "
            f"adapters; {choice.label} needs one",
            hint="cat and the methods with svd take adapters of any ranks",
        )
    roots = np.sqrt(np.abs(weights))
    left = combined([update.left for update in updates], roots * _signs(weights), choice)
    return Update(left, combined([update.right for update in updates], roots, choice))


def _signs(weights: Sequence[float]) -> Array:
    return np.where(np.asarray(weights) < 0, -1.0, 1.0)


def _of_updates(
    slot: str, updates: Sequence[Update], weights: Sequence[float], choice: Choice
) -> Update:
    """Merge `down @ up`, and take the nearest product of the rank."""
    rank = choice.rank or max(update.rank for update in updates)
    if choice.label == "svd":  # a sum needs no matrix of its own
        left = [update.left * weight for update, weight in zip(updates, weights, strict=True)]
        right = [update.right for update in updates]
        total = Update(np.concatenate(left, axis=2), np.concatenate(right, axis=1))
    else:
        (groups, reads), makes = updates[0].left.shape[:2], updates[0].right.shape[2]
        if groups * reads * makes * 8 > _MOST_BYTES:
            raise AdapterError(
                f"slot {slot!r} changes a weight of {groups * reads * makes:,} numbers; "
                f"{choice.label} would form it, in more than 2 GB",
                hint=f"{choice.label.removesuffix('_svd')} works on its two factors",
            )
        dense = combined([update.product() for update in updates], np.asarray(weights), choice)
        total = Update(dense, np.broadcast_to(np.eye(makes), (groups, makes, makes)))
    return nearest_update(total, rank)
