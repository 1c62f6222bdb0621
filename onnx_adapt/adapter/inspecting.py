"""What an adapter is made of: ranks, energy and size of each slot, and its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_adapt.adapter.compressing import rank_to_keep
from onnx_adapt.adapter.data import Adapter, same_base
from onnx_adapt.adapter.fitting import misfits, required_manifest
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.adapter.updates import Update, projects, update_of, why_no_product
from onnx_adapt.dtypes import Array
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.slot.parts import PARTS
from onnx_adapt.slot.weights import is_off
from onnx_adapt.words import count

ENERGY = 0.99
"""The share of the squared singular values that `Measured.effective_rank` has."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One slot of an adapter, measured.

    What is None cannot be told: a slot with an activation has no singular values, and one with
    NaN has no norm.

    Attributes:
        slot: Its name.
        parts: Names of its weights.
        dtype: Their element type; several are joined by a comma.
        activation: The activation, or '' if the adapter does not say.
        reads: The size of what it reads.
        makes: The size of what it adds.
        bottleneck: The size `r` in the middle; 0 if it has no projections.
        rank: How many singular values of its update are above rounding.
        effective_rank: The smallest rank with 99 % of the energy.
        norm: The Frobenius norm of its update; of its weights if it has an activation.
        dead_units: How many units of the bottleneck reach nothing: their row of `up` is zero.
        off: Whether it changes nothing, whatever it reads.
        odd: Names of weights that hold NaN or infinity.
    """

    slot: str
    parts: tuple[str, ...]
    dtype: str
    activation: str
    reads: int | None
    makes: int | None
    bottleneck: int
    rank: int | None
    effective_rank: int | None
    norm: float | None
    dead_units: int
    off: bool
    odd: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an adapter is made of.

    Attributes:
        name: Its name.
        size: The number of bytes of its weights.
        bases: The fingerprints of the models that it is for; empty if it does not say.
        slots: Its slots, measured.
        replaced: Shape and element type of each weight of the base that it replaces.
        misfits: Why it cannot be used with the model that was given; None if none was.
        same_base: Whether it was made for the base of that model; None if that is unknown.
    """

    name: str
    size: int
    bases: tuple[str, ...]
    slots: tuple[Measured, ...]
    replaced: Mapping[str, tuple[tuple[int, ...], str]]
    misfits: tuple[str, ...] | None = None
    same_base: bool | None = None

    def __repr__(self) -> str:
        """The name and size of the adapter, and whether it fits."""
        fits = "" if self.misfits is None else ", fits" if not self.misfits else ", misfits"
        slots = count(len(self.slots), "slot")
        return f"<Inspection of {self.name!r}: {slots}, {self.size:,} bytes{fits}>"


def inspect(adapter: AdapterLike, model: ModelLike | None = None) -> Inspection:
    """Measure an adapter: the rank, energy and norm of each slot, and which base it is for.

    Args:
        adapter: The adapter.
        model: A model with slots, to tell whether the adapter is for it.

    Raises:
        AdapterError: If the weights of a slot do not go together.
        SlotError: If the model has no slots.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> rng = np.random.default_rng(0)
        >>> fc = {"down": rng.normal(size=(64, 8)), "up": rng.normal(size=(8, 64))}
        >>> lora = oa.Adapter("fr", {"fc": fc}, activations={"fc": "identity"})
        >>> (slot,) = oa.inspect(lora).slots
        >>> slot.bottleneck, slot.rank, slot.off
        (8, 8, False)
    """
    adapter = as_adapter(adapter)
    known = tuple(base for base in (adapter.fingerprint, *adapter.other_bases) if base)
    found: tuple[str, ...] | None = None
    same: bool | None = None
    if model is not None:
        model = as_model(model)
        found = tuple(misfits(model, adapter))
        base = required_manifest(model).fingerprint
        same = any(same_base(one, base) for one in known) if known else None
    return Inspection(
        adapter.name,
        adapter.size,
        known,
        tuple(_measured(adapter, slot) for slot in adapter.weights),
        {key: (value.shape, str(value.dtype)) for key, value in adapter.replaced.items()},
        found,
        same,
    )


def _measured(adapter: Adapter, slot: str) -> Measured:
    parts = adapter.weights[slot]
    odd = tuple(part for part, value in parts.items() if not np.isfinite(value).all())
    product = not odd and projects(parts) and not why_no_product(adapter, slot)
    update = update_of(adapter, slot) if product else None
    sizes = _sizes(parts)
    known = all(part in PARTS for part in parts)
    return Measured(
        slot=slot,
        parts=tuple(parts),
        dtype=", ".join(dict.fromkeys(str(value.dtype) for value in parts.values())),
        activation=adapter.activations.get(slot, ""),
        reads=sizes[0],
        makes=sizes[1],
        bottleneck=sizes[2],
        rank=None if update is None else _rank(update, parts),
        effective_rank=None if update is None else _effective(update),
        norm=None if odd else update.norm() if update else _weight_norm(parts),
        dead_units=_dead_units(parts),
        off=known and not odd and is_off(parts),
        odd=odd,
    )


def _sizes(parts: Mapping[str, Array]) -> tuple[int | None, int | None, int]:
    """What a slot reads and makes, and its bottleneck, from the shapes of its weights."""
    up = parts.get("up")
    first = parts.get("table", parts.get("down"))
    if up is None or first is None or min(up.ndim, first.ndim) < 2:
        scale = parts.get("scale")
        return None, None if scale is None else scale.size, 0
    if up.ndim > 2:
        return int(np.prod(first.shape[1:])), up.shape[0], up.shape[1]
    return first.shape[0], up.shape[1], up.shape[0]


def _rank(update: Update, parts: Mapping[str, Array]) -> int:
    """The numerical rank: singular values above what rounding of the weights leaves.

    The threshold is that of `numpy.linalg.matrix_rank`, for the element type of the weights.
    """
    values = update.values()
    if not values.size or not values.max():
        return 0
    steps = [_step(value.dtype) for part, value in parts.items() if value.ndim > 1]
    size = max(update.left.shape[1], update.right.shape[2])
    return int((values > values.max() * size * max(steps)).sum(axis=1).max())


def _step(dtype: np.dtype[np.generic]) -> float:
    """The distance from 1 to the next number of an element type."""
    one = np.ones((), dtype)
    return float(np.nextafter(one, dtype.type(2)) - one)


def _effective(update: Update) -> int:
    return rank_to_keep(update, None, ENERGY) if update.norm() else 0


def _weight_norm(parts: Mapping[str, Array]) -> float:
    squares = [np.linalg.norm(np.asarray(v, np.float64).reshape(-1)) for v in parts.values()]
    return float(np.linalg.norm(squares))


def _dead_units(parts: Mapping[str, Array]) -> int:
    """How many units of a bottleneck have a row of zeros in `up`."""
    up = parts.get("up")
    if up is None or up.ndim < 2:
        return 0
    rows = np.moveaxis(up, 1, 0) if up.ndim > 2 else up
    return int((~rows.reshape(len(rows), -1).any(axis=1)).sum()) if up.size else 0
