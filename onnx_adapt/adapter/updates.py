"""The update of a slot: what it adds, as the product of two matrices that is never formed.

A slot without an activation adds `x @ update` to its target. An example: a slot on a layer of
4 inputs and 3 outputs, of rank 2, with biases and a gain:

    down (4, 2)   down_bias (2,)        left  (5, 2)  down, and the bias as one more row
    up (2, 3)     gain (3,)             right (2, 3)  up * gain
    update = left @ right               (5, 3)

Its singular values are those of a 2 x 2 matrix: with `left = Q1 R1` and `right.T = Q2 R2`,
`update = Q1 (R1 R2.T) Q2.T`. So a layer of any size costs what its two factors cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.slot.parts import PARTS, Blend


@dataclass(frozen=True, slots=True)
class Update:
    """An update, or a stack of them, in float64.

    Attributes:
        left: `(groups, reads, r)`.
        right: `(groups, r, makes)`.
    """

    left: Array
    right: Array

    @property
    def rank(self) -> int:
        """The bottleneck `r`: the largest rank that it can have."""
        return int(self.right.shape[1])

    def product(self) -> Array:
        """The update itself, `(groups, reads, makes)`."""
        return np.asarray(self.left @ self.right)

    def minus(self, other: Update) -> Update:
        """The difference of two updates."""
        left = np.concatenate([self.left, -other.left], axis=2)
        return Update(left, np.concatenate([self.right, other.right], axis=1))

    def norm(self) -> float:
        """The Frobenius norm."""
        return float(np.linalg.norm(self._core()))

    def _core(self) -> Array:
        """A small matrix for each update that has its singular values."""
        r1, r2 = (np.linalg.qr(m, mode="r") for m in (self.left, _turned(self.right)))
        return np.asarray(r1 @ _turned(np.asarray(r2)))

    def values(self) -> Array:
        """The singular values, `(groups, values)`, the largest first."""
        return np.asarray(np.linalg.svd(self._core(), compute_uv=False))

    def split(self) -> tuple[Array, Array, Array]:
        """Its singular value decomposition: left vectors, values, right vectors.

        Raises:
            AdapterError: If it does not converge.
        """
        q1, r1 = np.linalg.qr(self.left)
        q2, r2 = np.linalg.qr(_turned(self.right))
        try:
            u, values, v = np.linalg.svd(r1 @ _turned(r2), full_matrices=False)
        except np.linalg.LinAlgError as error:
            raise AdapterError(
                f"the singular values of an update were not found: {error}",
                hint="are its numbers of a sensible size? see `onnx-adapt inspect`",
            ) from error
        return q1 @ u, values, v @ _turned(q2)


def _turned(matrices: Array) -> Array:
    return np.swapaxes(matrices, 1, 2)


def nearest_update(update: Update, rank: int) -> Update:
    """The nearest update of a rank (Eckart and Young), with factors of equal size."""
    u, values, v = update.split()
    root = np.sqrt(values[:, :rank])
    return Update(u[:, :, :rank] * root[:, None, :], root[:, :, None] * v[:, :rank])


_PLAIN = (Blend.BESIDE, Blend.SCALED_BESIDE, Blend.SCALED_SUM, Blend.SUM, Blend.FACTOR)
"""The rules of parts that leave the term a product, `gain` aside."""


def why_no_product(adapter: Adapter, slot: str) -> str:
    """Why what a slot adds is no product of two matrices; '' if it is, or adds nothing."""
    parts = adapter.weights[slot]
    if "f_down" in parts:
        return "is an invertible coupling"
    if unknown := [part for part in parts if part not in PARTS]:
        return f"has the part {unknown[0]!r}, which is unknown"
    if not projects(parts):
        return ""
    if (activation := adapter.activations.get(slot, "")) != "identity":
        return (
            f"has the activation {activation}"
            if activation
            else "does not say its activation (`make_adapter` stamps it)"
        )
    rules = (*_PLAIN, Blend.FOLDED)
    odd = [part for part in parts if PARTS[part].blend not in rules]
    return f"has the part {odd[0]!r}" if odd else ""


def projects(parts: Mapping[str, Array]) -> bool:
    """Whether a slot has projections; IA3, for example, only scales."""
    return any(part in PARTS and PARTS[part].projects for part in parts)


def update_of(adapter: Adapter, slot: str) -> Update | None:
    """The update of a slot; None if it has no projections.

    Raises:
        AdapterError: If what it adds is no product, its weights do not go together, or one
            holds NaN or infinity.
    """
    if why := why_no_product(adapter, slot):
        raise AdapterError(
            f"slot {slot!r} of adapter {adapter.name!r} {why}, so what it adds is no product "
            "of two matrices",
            hint="LoRA and other slots without an activation can be taken apart",
        )
    if not projects(adapter.weights[slot]):
        return None
    parts = {name: np.asarray(v, np.float64) for name, v in adapter.weights[slot].items()}
    for name, value in parts.items():
        if not np.isfinite(value).all():
            raise AdapterError(
                f"{name} of slot {slot!r} of adapter {adapter.name!r} holds NaN or infinity",
                hint="the training diverged; use an earlier checkpoint",
            )
    groups = adapter.stacks.get(slot, 1)
    try:
        return factors_of(parts, groups)
    except (ValueError, KeyError, IndexError) as error:
        shown = ", ".join(f"{name} {list(value.shape)}" for name, value in parts.items())
        raise AdapterError(
            f"the weights of slot {slot!r} of adapter {adapter.name!r} do not go together: "
            f"{shown}"
        ) from error


def factors_of(parts: Mapping[str, Array], groups: int) -> Update:
    """Lay out the projections of a slot as the two factors, in float64.

    Raises:
        ValueError: If the shapes do not go together; KeyError and IndexError likewise.
    """
    first = parts["table"] if "table" in parts else parts["down"]
    up = parts["up"]
    if up.ndim > 2:  # Conv's layout: (r, source, window) and (width, r, 1, ...)
        first, up = first.reshape(first.shape[0], -1).T, up.reshape(up.shape[:2]).T
    if "gain" in parts:
        up = up * parts["gain"].reshape(-1)
    (reads, rank), (same, makes) = first.shape, up.shape
    if rank != same:
        raise ValueError(f"bottlenecks of {rank} and {same}")
    left = first.reshape(groups, reads // groups, rank)
    right = np.swapaxes(up.reshape(rank, groups, makes // groups), 0, 1)
    if "down_bias" in parts:
        bias = np.broadcast_to(parts["down_bias"].reshape(1, 1, rank), (groups, 1, rank))
        left = np.concatenate([left, bias], axis=1)
    return Update(left, right)


def with_update(parts: Mapping[str, Array], update: Update) -> dict[str, Array]:
    """The parts of a slot with another update in place of their own, in their element types.

    A gain goes into the update and the bias behind it, and is 1 then.
    """
    left, right = update.left, update.right
    made = {name: np.asarray(value, np.float64) for name, value in parts.items()}
    if "gain" in parts:
        gain = made["gain"]
        made["gain"] = np.ones_like(gain)
        if "up_bias" in parts:
            made["up_bias"] = made["up_bias"] * gain.reshape(-1)
    if "down_bias" in parts:
        made["down_bias"], left = left[0, -1], left[:, :-1]
    first = left.reshape(-1, left.shape[2])
    up = np.swapaxes(right, 0, 1).reshape(right.shape[1], -1)
    name = "table" if "table" in parts else "down"
    if parts["up"].ndim > 2:
        made[name] = first.T.reshape(-1, *parts[name].shape[1:])
        made["up"] = up.T.reshape(*up.T.shape, *parts["up"].shape[2:])
    else:
        made[name], made["up"] = first, up
    with np.errstate(over="ignore"):
        return {
            part: np.ascontiguousarray(made[part], value.dtype)
            for part, value in parts.items()
        }


def measure_loss(exact: AdapterLike, approximate: AdapterLike) -> dict[str, float | None]:
    """How far each slot of an adapter is from that of another, relative to the latter.

    It is the Frobenius norm of the difference of what the two add, divided by that of the
    first: 0 is the same, 1 is as far off as an adapter of zeros. What a slot with an
    activation adds depends on its input, so the distance is that of its weights; it is None
    where these have other shapes.

    Args:
        exact: The adapter that is meant.
        approximate: The one that stands in for it.

    Returns:
        The loss by slot, for the slots that both have.

    Raises:
        AdapterError: If two slots have different parts or sizes, or hold NaN.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> rng = np.random.default_rng(0)
        >>> fc = {"down": rng.normal(size=(64, 8)), "up": rng.normal(size=(8, 64))}
        >>> lora = oa.Adapter("fr", {"fc": fc}, activations={"fc": "identity"})
        >>> smaller = oa.compress(lora, rank=6)
        >>> round(oa.measure_loss(lora, smaller)["fc"], 2)
        0.35
    """
    exact = as_adapter(exact)
    approximate = as_adapter(approximate)
    return {
        slot: _loss(exact, approximate, slot)
        for slot in exact.weights
        if slot in approximate.weights
    }


def _loss(exact: Adapter, approximate: Adapter, slot: str) -> float | None:
    ours, theirs = exact.weights[slot], approximate.weights[slot]
    if set(ours) != set(theirs):
        raise AdapterError(
            f"slot {slot!r} has the parts {', '.join(ours)} in {exact.name!r} and "
            f"{', '.join(theirs)} in {approximate.name!r}"
        )
    if why_no_product(exact, slot) or not projects(ours):
        if any(ours[part].shape != theirs[part].shape for part in ours):
            return None
        one, other = (
            np.concatenate([np.asarray(p[part], np.float64).reshape(-1) for part in ours])
            for p in (ours, theirs)
        )
        return _ratio(float(np.linalg.norm(one - other)), float(np.linalg.norm(one)))
    one_update, other_update = update_of(exact, slot), update_of(approximate, slot)
    assert one_update is not None
    assert other_update is not None
    sizes = [
        (len(u.left), u.left.shape[1], u.right.shape[2]) for u in (one_update, other_update)
    ]
    if sizes[0] != sizes[1]:
        raise AdapterError(
            f"slot {slot!r} reads {sizes[0][1]} and makes {sizes[0][2]} in {exact.name!r}, "
            f"{sizes[1][1]} and {sizes[1][2]} in {approximate.name!r}"
        )
    return _ratio(one_update.minus(other_update).norm(), one_update.norm())


def _ratio(off: float, whole: float) -> float:
    return off / whole if whole else 0.0 if not off else float("inf")
