"""How near a slot's output is to the formula, in parts of what rounding allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.slot.bounds import Bounded
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.oracle import Norm, slot_bounded
from onnx_adapt.slot.parts import PARTS


@dataclass(frozen=True, slots=True)
class Nearness:
    """What was seen at one slot.

    Attributes:
        ratio: The largest error of an element in parts of its bound; over 1 is more than
            rounding explains.
        error: The largest error, relative to the largest value of the output; of the
            element of `ratio` where that is over 1.
        bound: The bound of the same element, relative to the same value.
        judged: How many elements have a bound.
        unjudged: How many have none: what the slot reads, or may compute, is not finite.
        shown: Whether the slot changes an element by more than its bound, so that another
            formula would have been seen.
    """

    ratio: float = 0.0
    error: float = 0.0
    bound: float = 0.0
    judged: int = 0
    unjudged: int = 0
    shown: bool = False

    def __or__(self, other: Nearness) -> Nearness:
        """Both: the worse of their errors."""
        worse = max(self, other, key=lambda seen: (seen.ratio > 1, seen.error))
        return Nearness(
            max(self.ratio, other.ratio),
            worse.error,
            worse.bound,
            self.judged + other.judged,
            self.unjudged + other.unjudged,
            self.shown or other.shown,
        )


WRONG = Nearness(ratio=float("inf"), error=float("inf"), judged=1, shown=True)
"""Another shape, weights that are no numbers, or numbers where the formula has none."""


_PIECE = 1 << 15
"""So many numbers at a time stay near the processor, which is several times as fast."""


def slot_nearness(
    slot: Slot,
    tensors: Sequence[Array],
    weights: Mapping[str, Array],
    norm: Norm | None = None,
) -> Nearness:
    """Compare what a slot gave with the formula of what it read.

    Args:
        slot: The slot.
        tensors: Its target, source, output and, if it has one, `plus`.
        weights: Its weights by part, and what a batched slot has for each row.
        norm: The base's normalisation that `slot.norm` means.
    """
    target, _, output, *_ = tensors
    finite = all(np.isfinite(value.astype(np.float64)).all() for value in weights.values())
    if output.shape != target.shape or not finite:
        return WRONG
    sizes = np.abs(output.astype(np.float64))
    largest = float(sizes.max(where=np.isfinite(sizes), initial=0.0)) or 1.0
    found = Nearness()
    for to, read, gave, *more in _pieces(slot, tensors):
        formula = slot_bounded(slot, to, read, weights, norm, more[0] if more else None)
        found |= _nearness(gave, formula, to, largest)
    return found


def _pieces(slot: Slot, tensors: Sequence[Array]) -> Iterator[list[Array]]:
    """Tensors of a slot cut alike, into parts that the formula can be held against alone.

    Positions do not meet in it but in a window, in the mean of a gate, and by row.
    """
    target = tensors[0]
    places = {(x.shape[0], *x.shape[2:]) if slot.axis == 1 else x.shape[:-1] for x in tensors}
    meet = slot.window or slot.batched or any(PARTS[part].meets for part in slot.parts)
    step = max(_PIECE // max(slot.width, 1), 1)
    if meet or len(places) > 1 or target.size <= _PIECE:
        yield list(tensors)
    elif slot.axis == 1:
        flat = [item.reshape(*item.shape[:2], -1) for item in tensors]
        for row, at in itertools.product(range(len(target)), range(0, flat[0].shape[2], step)):
            yield [item[row : row + 1, :, at : at + step] for item in flat]
    else:
        flat = [item.reshape(-1, item.shape[-1]) for item in tensors]
        for at in range(0, len(flat[0]), step):
            yield [item[at : at + step] for item in flat]


def _nearness(output: Array, formula: Bounded, target: Array, largest: float) -> Nearness:
    """Compare an output with the formula, element by element.

    Where the formula is not finite, the slot reads what is not, because its weights are
    finite; then its output must be the same infinity, or NaN, which depends on the order
    of a sum (`inf - inf`). Where a number may pass the type's largest, nothing is said.
    """
    value, bound, wide = formula.value, formula.bound, output.astype(np.float64)
    finite = np.isfinite(value)
    with np.errstate(all="ignore"):
        if not finite.all():
            nan = np.isnan(wide) | (np.isnan(value) & ~np.isfinite(wide))
            if not (nan | (wide == value))[~finite].all():
                return WRONG
        judged = np.isfinite(bound) & finite
        count = int(np.count_nonzero(judged))
        off = np.abs(wide - value)
        off[~judged] = 0.0
        ratios = off / bound
        ratios[off == 0] = 0.0  # a bound may be 0 as well
        ratios[np.isnan(off)] = np.inf
        shown = bool(((np.abs(value - target) > bound) & judged).any())
    if not count:
        return Nearness(unjudged=value.size)
    ratio = float(ratios.max())
    worst = np.unravel_index((ratios if ratio > 1 else off).argmax(), off.shape)
    return Nearness(
        ratio,
        float(off[worst]) / largest,
        float(bound[worst]) / largest,
        count,
        value.size - count,
        shown,
    )
