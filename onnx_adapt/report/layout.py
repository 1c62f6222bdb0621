"""A layered drawing of a small directed graph: every edge leads down, no box is covered.

Put the boxes in rows, order each row, then choose where in its row each box stands. Source:
K. Sugiyama, S. Tagawa, M. Toda, "Methods for Visual Understanding of Hierarchical System
Structures", IEEE Transactions on Systems, Man, and Cybernetics 11(2), 1981.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

# Worked example: a slot reads `x` and adds what it computes to it. The edges are
#
#     x -> f,  f -> y,  y -> Add,  x -> Add
#
# 1. Rows. A box stands one row below the lowest box that leads to it: x 0, f 1, y 2, Add 3.
# 2. Bends. The edge x -> Add passes rows 1 and 2, so it gets a bend, `|`, in each of them.
#    From now on every edge leads to the next row: x -> | -> | -> Add.
# 3. Order. Each row is sorted by the mean place of the neighbours in the row before it; of all
#    orders seen on the way down and up, the one with the fewest crossings stays:
#    [x], [|, f], [|, y], [Add].
# 4. Coordinates. Each box goes below its neighbours. Where two want the same place, as `|` and
#    f below x do, the one with more weight gets it. A bend weighs most, so long edges are
#    straight, and f moves to the right:
#
#        x
#        | \
#        |  f
#        |  y
#        | /
#       Add

Point = tuple[float, float]
Size = tuple[float, float]
Edge = tuple[int, int]
Rows = list[list[int]]
Neighbours = Mapping[int, Sequence[int]]

GAP = 16.0
"""The least distance between two boxes of a row."""

ROW_GAP = 24.0
"""The distance between two rows."""

_SWEEPS = 4
"""How many times the rows are passed down and up; small graphs need no more."""

_BEND_WEIGHT = 8.0
"""How much a bend weighs against a box when both want the same place."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the boxes and edges of a graph are.

    Attributes:
        corners: The top left corner of each box.
        routes: The corners of each edge. It leads straight down through a row and slants only
            between two rows.
        size: Width and height of the whole.
    """

    corners: tuple[Point, ...]
    routes: tuple[tuple[Point, ...], ...]
    size: Size


def lay_out(sizes: Sequence[Size], edges: Sequence[Edge]) -> Layout:
    """Lay out a graph.

    Args:
        sizes: Width and height of each box.
        edges: From which box to which other one, by number. An edge that closes a cycle is
            drawn upwards.

    Example:
        >>> layout = lay_out([(40, 20), (60, 20)], [(0, 1)])
        >>> layout.corners
        ((10.0, 0.0), (0.0, 44.0))
        >>> layout.routes[0]
        ((30.0, 20.0), (30.0, 20.0), (30.0, 44.0), (30.0, 44.0))
    """
    row_of = _row_of_each(len(sizes), edges)
    rows, chains = with_bends(row_of, edges)
    rows = with_few_crossings(rows, chains)
    widths = [width for width, _ in sizes] + [0.0] * (sum(map(len, rows)) - len(sizes))
    centres = _centres(rows, chains, widths, bends_from=len(sizes))
    bands = _bands(rows, sizes)
    corners = []
    for number, (width, height) in enumerate(sizes):
        top, bottom = bands[row_of[number]]
        corners.append((centres[number] - width / 2, (top + bottom - height) / 2))
    routes = []
    for (start, _), chain in zip(edges, chains, strict=True):
        first, last = chain[0], chain[-1]
        row = row_of[first]
        points = [(centres[item], y) for n, item in enumerate(chain) for y in bands[row + n]]
        points[0] = (centres[first], corners[first][1] + sizes[first][1])
        points[-1] = (centres[last], corners[last][1])
        routes.append(tuple(points if start == first else reversed(points)))
    right = max((c + w / 2 for c, w in zip(centres, widths, strict=True)), default=0.0)
    return Layout(tuple(corners), tuple(routes), (right, bands[-1][1] if bands else 0.0))


def _row_of_each(count: int, edges: Sequence[Edge]) -> list[int]:
    """The row of each box: one below the lowest box that leads to it.

    A box to which nothing leads stands right above the first box that it leads to.
    """
    order = _topological_order(count, edges)
    place = {box: number for number, box in enumerate(order)}
    down = [(a, b) for a, b in edges if place[a] < place[b]]
    below = _grouped(down)
    rows = [0] * count
    for box in order:
        for other in below.get(box, ()):
            rows[other] = max(rows[other], rows[box] + 1)
    for box in set(range(count)) - {b for _, b in down}:
        rows[box] = min((rows[other] - 1 for other in below.get(box, ())), default=0)
    return rows


def _topological_order(count: int, edges: Sequence[Edge]) -> list[int]:
    """The boxes in an order in which every edge leads on, but for those that close a cycle."""
    following = _grouped(edges)
    seen: set[int] = set()
    finished: list[int] = []

    def visit(box: int) -> None:
        if box not in seen:
            seen.add(box)
            for other in following.get(box, ()):
                visit(other)
            finished.append(box)

    for box in range(count):
        visit(box)
    return finished[::-1]


def with_bends(row_of: Sequence[int], edges: Sequence[Edge]) -> tuple[Rows, list[list[int]]]:
    """The items of each row, and each edge as a chain of items from row to row.

    Items are the boxes, and after them in number the bends of the edges that pass a row.
    """
    boxes: Rows = [[] for _ in range(max(row_of, default=-1) + 1)]
    bends: Rows = [[] for _ in boxes]
    for box, row in enumerate(row_of):
        boxes[row].append(box)
    chains, free = [], len(row_of)
    for edge in edges:
        upper, lower = sorted(edge, key=lambda box: row_of[box])
        passed = range(row_of[upper] + 1, row_of[lower])
        chains.append([upper, *range(free, free + len(passed)), lower])
        for row in passed:
            bends[row].append(free)
            free += 1
    return [[*left, *right] for left, right in zip(bends, boxes, strict=True)], chains


def with_few_crossings(rows: Rows, chains: Sequence[Sequence[int]]) -> Rows:
    """The rows in the best order that some sweeps down and up find; no worse than before."""
    above, below = _neighbours(chains)
    best, fewest = rows, crossings(rows, chains)
    for sweep in range(2 * _SWEEPS):
        rows = list(rows)
        if sweep % 2 == 0:
            for number in range(1, len(rows)):
                rows[number] = _by_mean_place(rows[number], rows[number - 1], above)
        else:
            for number in reversed(range(len(rows) - 1)):
                rows[number] = _by_mean_place(rows[number], rows[number + 1], below)
        count = crossings(rows, chains)
        if count < fewest:
            best, fewest = rows, count
    return best


def _by_mean_place(row: Sequence[int], fixed: Sequence[int], near: Neighbours) -> list[int]:
    """A row sorted by the mean place of each item's neighbours in a row that stays."""
    place = {item: number for number, item in enumerate(fixed)}

    def mean_place(number: int) -> float:
        places = [place[other] for other in near.get(row[number], ())]
        return sum(places) / len(places) if places else number

    return [row[number] for number in sorted(range(len(row)), key=mean_place)]


def crossings(rows: Rows, chains: Sequence[Sequence[int]]) -> int:
    """How many pairs of edges cross between two rows."""
    place = {item: number for row in rows for number, item in enumerate(row)}
    _, below = _neighbours(chains)
    count = 0
    for row in rows:
        passed: list[int] = []  # where edges from further left arrive
        for item in row:
            for end in sorted(place[other] for other in below.get(item, ())):
                count += len(passed) - bisect_right(passed, end)
                insort(passed, end)
    return count


def _centres(
    rows: Rows, chains: Sequence[Sequence[int]], widths: Sequence[float], *, bends_from: int
) -> list[float]:
    """The horizontal centre of each item; nothing is left of zero."""
    above, below = _neighbours(chains)
    # The last pass straightens lines of boxes that a wide one among them pushed aside.
    only = {a: near for a, near in below.items() if len(near) == len(above[near[0]]) == 1}
    weights = [1.0 if item < bends_from else _BEND_WEIGHT for item in range(len(widths))]
    centres = [0.0] * len(widths)
    for number, near in enumerate([above, below] * _SWEEPS + [above, only]):
        for row in reversed(rows) if number % 2 else rows:
            wanted = [
                _median([(centres[other], weights[other]) for other in near.get(item, [item])])
                for item in row
            ]
            free = _spread(wanted, [weights[i] for i in row], [widths[i] for i in row])
            for item, centre in zip(row, free, strict=True):
                centres[item] = centre
    left = min((c - w / 2 for c, w in zip(centres, widths, strict=True)), default=0.0)
    return [centre - left for centre in centres]


def _spread(
    wanted: Sequence[float], weights: Sequence[float], widths: Sequence[float]
) -> list[float]:
    """Centres in this order that do not overlap and are as near as can be to the wanted ones.

    Items that would overlap are pushed together into a block, which stands where the weighted
    median of its items wants to be (pool adjacent violators).
    """
    offsets = [0.0]
    for left, right in pairwise(widths):
        offsets.append(offsets[-1] + left / 2 + GAP + right / 2)
    blocks: list[list[tuple[float, float]]] = []
    for centre, offset, weight in zip(wanted, offsets, weights, strict=True):
        block = [(centre - offset, weight)]
        while blocks and _median(blocks[-1]) > _median(block):
            block = blocks.pop() + block
        blocks.append(block)
    starts = [_median(block) for block in blocks for _ in block]
    return [start + offset for start, offset in zip(starts, offsets, strict=True)]


def _median(weighted: Sequence[tuple[float, float]]) -> float:
    """The weighted median of `(value, weight)` pairs; between two values their mean."""
    ordered = sorted(weighted)
    half = sum(weight for _, weight in ordered) / 2
    passed = list(accumulate(weight for _, weight in ordered))
    return (ordered[bisect_left(passed, half)][0] + ordered[bisect_right(passed, half)][0]) / 2


def _bands(rows: Rows, sizes: Sequence[Size]) -> list[tuple[float, float]]:
    """Top and bottom of each row, which is as high as its highest box."""
    bands, top = [], 0.0
    for row in rows:
        bottom = top + max(sizes[item][1] for item in row if item < len(sizes))
        bands.append((top, bottom))
        top = bottom + ROW_GAP
    return bands


def _neighbours(chains: Sequence[Sequence[int]]) -> tuple[Neighbours, Neighbours]:
    """The items that each item is linked to in the row above it and in the row below it."""
    links = [link for chain in chains for link in pairwise(chain)]
    return _grouped([(b, a) for a, b in links]), _grouped(links)


def _grouped(pairs: Sequence[Edge]) -> dict[int, list[int]]:
    """The second items by the first."""
    found: dict[int, list[int]] = defaultdict(list)
    for key, value in pairs:
        found[key].append(value)
    return dict(found)
