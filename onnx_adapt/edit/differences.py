"""The difference that training made to one weight, as a product of low rank.

Of a matrix of 4096 x 11008 all singular values are not needed, only the directions of the
largest: they are the eigenvectors of the smaller of `D @ D.T` and `D.T @ D`. With `U` the `k`
first of these, `U @ (U.T @ D)` is the nearest matrix of rank `k`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much of a difference is wanted: a rank, or a share of its energy."""

    rank: int | None
    energy: float | None


def low_rank(
    module: str, difference: Array, wanted: Wanted, dtype: str
) -> tuple[LowRank, float] | None:
    """The nearest LoRA to a difference of a weight, and what it loses of it.

    Args:
        module: The module that it is for.
        difference: `(out, in)`, or `(out, in, ...)` of a convolution, in float64; not zero.
        wanted: The rank or energy.
        dtype: The element type that its matrices get.

    Returns:
        The LoRA and the Frobenius norm of what is lost, relative to that of the difference;
        None if it would be no smaller than the weight.
    """
    matrix = difference.reshape(len(difference), -1)
    found = _nearest(matrix, wanted)
    if found is None:
        return None
    b, a = (factor.astype(DTYPES[dtype]).astype(np.float64) for factor in found)
    loss = float(np.linalg.norm(matrix - b @ a) / np.linalg.norm(matrix))
    if places := difference.shape[2:]:
        a = a.reshape(len(a), difference.shape[1], *places)
        b = b.reshape(*b.shape, *(1,) * len(places))
    return LowRank(module, a, b, 1.0), loss


def _nearest(matrix: Array, wanted: Wanted) -> tuple[Array, Array] | None:
    """The factors `(out, r)` and `(r, in)`, of equal size; None if they are no smaller."""
    makes, reads = matrix.shape
    wide = makes <= reads
    values, vectors = np.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    rank = min(_rank(np.maximum(values[::-1], 0), wanted), len(values))
    if rank * (makes + reads) >= makes * reads:
        return None
    first = vectors[:, ::-1][:, :rank]
    b, a = (first, first.T @ matrix) if wide else (matrix @ first, first.T)
    size = np.linalg.norm(a, axis=1) if wide else np.linalg.norm(b, axis=0)
    root = np.sqrt(np.where(size > 0, size, 1))
    return (b * root, a / root[:, None]) if wide else (b / root, a * root[:, None])


def _rank(energies: Array, wanted: Wanted) -> int:
    if wanted.rank is not None:
        return wanted.rank
    assert wanted.energy is not None
    summed = np.cumsum(energies)
    return int(np.searchsorted(summed, wanted.energy * summed[-1])) + 1


def check_numbers(name: str, tuned: Array) -> None:
    """Refuse a trained weight with NaN or infinity.

    Raises:
        CheckpointError: If it has some.
    """
    if not np.isfinite(tuned.astype(np.float64)).all():
        raise CheckpointError(
            f"{name!r} of the tuned model holds NaN or infinity",
            hint="the training diverged; use an earlier checkpoint",
        )


def refuse_wide(wanted: Wanted, widest: int) -> None:
    """Refuse a rank that is over the width of every weight that changed.

    Raises:
        CheckpointError: If it is.
    """
    if wanted.rank is not None and wanted.rank > widest > 0:
        raise CheckpointError(
            f"rank {wanted.rank} is over the width of every matrix that changed, {widest}",
            hint=f"give a rank below {widest}",
        )
