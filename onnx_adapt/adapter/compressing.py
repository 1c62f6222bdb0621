"""Compress an adapter: each update by the nearest one of a smaller rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.adapter.updates import Update, nearest_update, update_of, with_update
from onnx_adapt.errors import AdapterError


def compress(
    adapter: AdapterLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    name: str = "",
) -> Adapter:
    """Compress the slots of an adapter to a rank, or to a share of their energy.

    Each update `down @ up` is replaced by the nearest one of the smaller rank, from its
    singular values; the matrix itself is never formed. `measure_loss` says what was lost.
    Biases, scales and replaced weights stay as they are.

    Args:
        adapter: An adapter of slots without an activation, such as LoRA.
        rank: The largest rank that a slot keeps; slots of a smaller one stay as they are.
        energy: The share of the sum of squared singular values that each slot keeps, above 0
            and up to 1; each slot gets the smallest rank that has it.
        name: What to call the result; by default as before.

    Raises:
        AdapterError: If a slot has an activation, or the rank is larger than any slot's.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> rng = np.random.default_rng(0)
        >>> fc = {"down": rng.normal(size=(64, 8)), "up": rng.normal(size=(8, 64))}
        >>> lora = oa.Adapter("fr", {"fc": fc}, activations={"fc": "identity"})
        >>> oa.compress(lora, rank=4).weights["fc"]["down"].shape
        (64, 4)
    """
    adapter = as_adapter(adapter)
    refuse_odd_target(rank, energy)
    updates = {slot: update_of(adapter, slot) for slot in adapter.weights}
    known = {slot: update for slot, update in updates.items() if update is not None}
    largest = max((update.rank for update in known.values()), default=0)
    if not largest:
        raise AdapterError(
            f"adapter {adapter.name!r} has no projections that could be compressed",
            hint="`onnx-adapt inspect` shows what it has",
        )
    if rank is not None and rank > largest:
        raise AdapterError(
            f"rank {rank} compresses nothing: the largest of adapter {adapter.name!r} is "
            f"{largest}",
            hint=f"give a rank below {largest}",
        )
    weights = dict(adapter.weights)
    for slot, update in known.items():
        kept = rank_to_keep(update, rank, energy)
        if kept < update.rank or rank == largest:
            weights[slot] = with_update(weights[slot], nearest_update(update, kept))
    return replace(adapter, name=name or adapter.name, weights=weights)


def refuse_odd_target(rank: int | None, energy: float | None) -> None:
    """Refuse anything but one of a rank of at least 1 and an energy above 0 and up to 1.

    Raises:
        AdapterError: If it is refused.
    """
    if (rank is None) == (energy is None):
        raise AdapterError(
            "give either a rank or an energy", hint="such as rank=8, or energy=0.99"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"{rank!r} is no rank", hint="give a whole number from 1 on")
    if energy is not None and not (isinstance(energy, int | float) and 0 < energy <= 1):
        raise AdapterError(
            f"{energy!r} is no share of the energy", hint="give a number above 0 and up to 1"
        )


def rank_to_keep(update: Update, rank: int | None, energy: float | None) -> int:
    """The rank that an update keeps: at most `rank`, or the smallest that has the energy.

    For example the singular values 3, 1, 1 have the energies 9, 10, 11 for the ranks 1, 2 and
    3; nine tenths of it are 9.9, which takes rank 2.
    """
    values = update.values()
    most = values.shape[1]
    if energy is None:
        assert rank is not None
        return min(rank, update.rank, most) if most else update.rank
    total = np.cumsum((values**2).sum(axis=0))
    if not most or not total[-1]:
        return min(1, update.rank)
    return int(np.searchsorted(total, energy * total[-1])) + 1
