"""What a trained weight adds to the base's, and that as the two factors of a slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank, Reweight
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError, reason

_ROUNDING = 2.0**-36
"""What is this small beside the weight is rounding: float64 keeps 52 bits of each number, the
products of a rotation cost some of them, and float32, which a graph has at best, keeps 23."""

_LARGEST_PART = 3
"""A slot of a rank up to a third of the smaller width has at most two thirds of the numbers
of the weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """The trained weight of one call of a module, and what it adds to the base's.

    Attributes:
        weight: The trained weight, `(out, in)`, `(out, in, kh, kw)` or `(entries, out)`.
        added: What it adds to the base's.
        bias: The trained bias; None if it is the base's.
        added_bias: What that adds to the base's, `(out,)`, or None.
        has_bias: Whether the base has a bias.
    """

    weight: Array
    added: Array
    bias: Array | None
    added_bias: Array | None
    has_bias: bool

    def is_same(self, other: Change) -> bool:
        """Whether two calls are trained to be the same."""
        if self.has_bias != other.has_bias or (self.bias is None) != (other.bias is None):
            return False
        return np.array_equal(self.weight, other.weight) and (
            self.bias is None or np.array_equal(self.bias, np.asarray(other.bias))
        )


def change_of(edit: Reweight, weight: Array, bias: Array | None) -> Change:
    """Compute what the weight and the bias of a module are trained to be.

    Raises:
        CheckpointError: If that is of another size, or holds NaN or infinity.
    """
    try:
        with np.errstate(all="ignore"):
            trained, trained_bias = edit.compute(weight, bias)
    except (ValueError, IndexError) as error:  # LinAlgError is a ValueError
        raise CheckpointError(
            f"module {edit.module!r}: the adapter does not fit the base's weight "
            f"{list(weight.shape)}, or is damaged: {reason(error)}",
            hint="is it an adapter for another size of this model?",
        ) from error
    outputs = None if trained_bias is None else trained_bias.shape
    if trained.shape != weight.shape or outputs not in (None, weight.shape[:1]):
        raise CheckpointError(
            f"module {edit.module!r}: the trained weight is {list(trained.shape)}, the base's "
            f"{list(weight.shape)}",
            hint="is it an adapter for another size of this model?",
        )
    if not all(np.isfinite(a).all() for a in (trained, trained_bias) if a is not None):
        raise CheckpointError(
            f"module {edit.module!r}: the trained weight holds NaN or infinity",
            hint="the training diverged, or a setting of the checkpoint is out of range",
        )
    added = None
    if trained_bias is not None:
        added = trained_bias if bias is None else trained_bias - bias
        if not added.any():
            trained_bias = added = None
    return Change(trained, trained - weight, trained_bias, added, bias is not None)


def as_low_rank_slot(edit: Reweight, change: Change, *, embeds: bool) -> LowRank | None:
    """A change as a slot that is smaller than the weight.

    Returns:
        The slot; None if the method does not bound the rank of the change, or not enough.
    """
    matrix = _matrix(change, embeds=embeds)
    if edit.rank is None or edit.rank * _LARGEST_PART > min(matrix.shape):
        return None
    rounding = _ROUNDING * float(np.linalg.norm(change.weight))
    found = _factors(matrix, edit.rank, rounding)
    return None if found is None else _slot(edit, change, *found)


def as_whole_slot(edit: Reweight, change: Change, *, embeds: bool) -> LowRank:
    """A change as a slot of whatever rank: one of its factors is the identity."""
    matrix = _matrix(change, embeds=embeds)
    makes, reads = matrix.shape
    b, a = (np.eye(makes), matrix) if makes <= reads else (matrix, np.eye(reads))
    return _slot(edit, change, b, a)


def as_bias_slot(edit: Reweight, change: Change, *, embeds: bool) -> LowRank:
    """A new bias as a slot that does nothing else."""
    makes, reads = _matrix(change, embeds=embeds).shape
    return _slot(edit, change, np.zeros((makes, 1)), np.zeros((1, reads)))


def _matrix(change: Change, *, embeds: bool) -> Array:
    """A change as a matrix: `(out, in)`, for a convolution `(out, in * kh * kw)`."""
    added = change.added
    return added.T if embeds else added.reshape(added.shape[0], -1)


def _slot(edit: Reweight, change: Change, b: Array, a: Array) -> LowRank:
    """A slot of two factors, in the shapes that LoRA has on such a layer."""
    places = change.added.shape[2:]
    if places:
        a = a.reshape(len(a), -1, *places)
        b = b.reshape(*b.shape, *(1,) * len(places))
    return LowRank(edit.module, a, b, 1.0, bias=change.added_bias)


def _factors(matrix: Array, rank: int, rounding: float) -> tuple[Array, Array] | None:
    """Find `B (out, r)` and `A (r, in)` whose product is the matrix.

    The columns of the matrix times a few random vectors span all that it can give (Halko,
    Martinsson and Tropp, 2011, arXiv 0909.4061); to decompose the whole matrix would take
    minutes for a large layer. The error is computed, so chance has no say in it.

    Args:
        matrix: The matrix.
        rank: The highest rank it can have.
        rounding: The norm of what is rounding.

    Returns:
        The factors; None if the rank is higher.
    """
    count = min(rank + 8, *matrix.shape)
    probes = np.random.default_rng(0).standard_normal((matrix.shape[1], count))
    basis, _ = np.linalg.qr(matrix @ probes)
    left, sizes, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = max(1, int((sizes > rounding / count).sum()))
    roots = np.sqrt(sizes[:kept])
    b, a = basis @ left[:, :kept] * roots, roots[:, None] * right[:kept]
    exact = kept <= rank and np.linalg.norm(matrix - b @ a) <= 2 * rounding
    return (b, a) if exact else None
