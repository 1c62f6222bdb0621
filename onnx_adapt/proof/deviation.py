"""How far a slot's output is from the formula, compared with what rounding allows."""

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
class Deviation:
    """How far the outputs of one slot are from the formula.

    Attributes:
        ratio: The largest error of an element divided by its bound; more than 1 is more
            than rounding explains.
        error: The largest error, relative to the largest value of the output. If `ratio`
            is more than 1, the error of the same element.
        bound: The bound of the same element, relative to the same value.
        judged: How many elements have a bound.
        unjudged: How many elements have no bound, because what the slot reads or may
            compute is not finite.
        shown: Whether the slot changes an element by more than its bound. Otherwise a wrong
            formula could pass.
    """

    ratio: float = 0.0
    error: float = 0.0
    bound: float = 0.0
    judged: int = 0
    unjudged: int = 0
    shown: bool = False

    def __or__(self, other: Deviation) -> Deviation:
        """Both together, with the worse of their errors."""
        worse = max(self, other, key=lambda seen: (seen.ratio > 1, seen.error))
        return Deviation(
            max(self.ratio, other.ratio),
            worse.error,
            worse.bound,
            self.judged + other.judged,
            self.unjudged + other.unjudged,
            self.shown or other.shown,
        )


WRONG = Deviation(ratio=float("inf"), error=float("inf"), judged=1, shown=True)
"""The shape is wrong, weights are not finite, or the output is where the formula is not."""


_PIECE = 1 << 15
"""How many numbers are compared at a time; they fit into the processor's cache."""


def slot_deviation(
    slot: Slot,
    tensors: Sequence[Array],
    weights: Mapping[str, Array],
    norm: Norm | None = None,
) -> Deviation:
    """Compare the output of a slot with the formula for its inputs.

    Args:
        slot: The slot.
        tensors: Its target, source, output and, if it has one, `plus`.
        weights: Its weights by part, with those that a batched slot has for each row.
        norm: The normalisation of the base that `slot.norm` names.
    """
    target, _, output, *_ = tensors
    finite = all(np.isfinite(value.astype(np.float64)).all() for value in weights.values())
    if output.shape != target.shape or not finite:
        return WRONG
    sizes = np.abs(output.astype(np.float64))
    largest = float(sizes.max(where=np.isfinite(sizes), initial=0.0)) or 1.0
    found = Deviation()
    for to, read, gave, *more in _pieces(slot, tensors):
        formula = slot_bounded(slot, to, read, weights, norm, more[0] if more else None)
        found |= _deviation(gave, formula, to, largest)
    return found


def _pieces(slot: Slot, tensors: Sequence[Array]) -> Iterator[list[Array]]:
    """Cut the tensors of a slot into pieces that can be compared with the formula alone.

    The formula treats positions separately, except in a window, in the mean of a gate and
    where rows have weights of their own.
    """
    target = tensors[0]
    places = {(x.shape[0], *x.shape[2:]) if slot.axis == 1 else x.shape[:-1] for x in tensors}
    meet = slot.window or slot.batched or slot.by_token or slot.on_weight
    meet = meet or any(PARTS[part].meets for part in slot.parts)
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


def _deviation(output: Array, formula: Bounded, target: Array, largest: float) -> Deviation:
    """Compare an output with the formula, element by element.

    Its weights are finite, so the formula is not finite only where the slot reads a value
    that is not. There the output must be the same infinity or NaN, because `inf - inf`
    depends on the order of a sum. An element that may overflow its type is not judged.
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
        return Deviation(unjudged=value.size)
    ratio = float(ratios.max())
    worst = np.unravel_index((ratios if ratio > 1 else off).argmax(), off.shape)
    return Deviation(
        ratio,
        float(off[worst]) / largest,
        float(bound[worst]) / largest,
        count,
        value.size - count,
        shown,
    )
