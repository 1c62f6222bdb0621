"""Which axis of a reshaped tensor is which axis of the tensor before.

A reshape keeps the order of the elements, so axis `i` before and axis `j` after are the
same axis if as many elements lie in front of both and as many behind both. For example

    before  [n, 8, 16, 16]     in front  1, n, 8n, ...      behind  2048n, 2048, 256, 16, 1
    after   [u, 2, 4, 16, 16]  in front  1, u, 2u, 8u, ...  behind  2048u, 2048, 1024, 256, ...

where `u` is what `-1` became. Nothing says that `u` is `n`, but 2048 elements are behind
the border after both, and 256 behind that before the pixels. So the 8 channels lie between
the same borders as `[2, 4]`: they are split, and no axis of the result has them. Counting
from both ends is as good as knowing `u`: the products of all sizes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_adapt.graph.index import Shape

Size = tuple[int, tuple[str, ...]]
"""A product of sizes: the number, and the symbols, sorted."""

ONE: Size = (1, ())
_MOST_AXES = 64


def sizes(shape: Shape, mark: str) -> list[Size]:
    """The sizes of a shape; one that is unknown is a symbol that no other shape has."""
    return [
        (dim, ()) if isinstance(dim, int) else (1, (dim or f"{mark}{axis}",))
        for axis, dim in enumerate(shape)
    ]


def product(parts: Sequence[Size]) -> Size:
    """The product of sizes."""
    number, symbols = 1, list[str]()
    for factor, more in parts:
        number *= factor
        symbols += more
    return number, tuple(sorted(symbols))


@dataclass(frozen=True, slots=True)
class Kept:
    """How the axes of a tensor survive a reshape.

    Attributes:
        pairs: Axis before and the same axis after.
        broken: Axis before that is split or merged, and the axes after that share its
            elements, first and last; None if that is unknown.
    """

    pairs: tuple[tuple[int, int], ...]
    broken: dict[int, tuple[int, int] | None]


def match(before: Sequence[Size], after: Sequence[Size]) -> Kept:
    """Find the axes that a reshape keeps; of a tensor without elements, none.

    No runtime takes as many axes as are left out here.
    """
    if max(len(before), len(after)) > _MOST_AXES:
        return Kept((), {})
    if any(number == 0 for number, _ in (*before, *after)):
        return Kept((), {})
    borders = _borders(before, after)
    pairs, broken = [], dict[int, tuple[int, int] | None]()
    for i, size in enumerate(before):
        starts, ends = borders.get(i, ()), borders.get(i + 1, ())
        same = [j for j in starts if j + 1 in ends]
        if size == ONE:
            same = [j for j in same if after[j] == ONE]
        else:
            same = [j for j in same if after[j] != ONE]
        if len(same) == 1:
            pairs.append((i, same[0]))
        elif size != ONE:
            broken[i] = _shared(i, borders)
    return Kept(tuple(pairs), broken)


def _borders(before: Sequence[Size], after: Sequence[Size]) -> dict[int, list[int]]:
    """For each border between axes before, the same borders after.

    Border `i` lies in front of axis `i`.
    """
    rows, columns = len(before), len(after)
    front = [product(after[:j]) for j in range(columns + 1)]
    behind = [product(after[j:]) for j in range(columns + 1)]
    found: dict[int, list[int]] = {}
    for i in range(rows + 1):
        ahead, rest = product(before[:i]), product(before[i:])
        found[i] = [j for j in range(columns + 1) if front[j] == ahead or behind[j] == rest]
    return found


def _shared(axis: int, borders: dict[int, list[int]]) -> tuple[int, int] | None:
    """The axes after between the nearest borders around an axis that are known after."""
    start = next((borders[i] for i in range(axis, -1, -1) if borders[i]), None)
    end = next((borders[i] for i in range(axis + 1, len(borders)) if borders[i]), None)
    if not start or not end or start[-1] >= end[0]:
        return None
    return start[-1], end[0] - 1
