"""Where each node of a model is on a map of the whole graph: columns by depth, then lanes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from onnx_adapt.graph.index import GraphView, text
from onnx_adapt.model.walk import captured
from onnx_adapt.slot.manifest import slot_of

COLUMN, LANE, MARK = 14, 12, 8
"""The distance of two columns and of two lanes, and the size of a node, in units of SVG."""

MOST = 4000
"""A larger graph has no map: nobody could read it, and the page would be too large to open."""

# Worked example: x -> f -> y, and Add reads x and y. A node's column is one more than the
# last column of the nodes that it reads: x 0, f 1, y 2, Add 3. Its lane is near the mean lane
# of these nodes, and no two nodes of a column share a lane. A Constant is left out: it is a
# weight of the nodes that read it.


@dataclass(frozen=True, slots=True)
class Mark:
    """A node on the map.

    Attributes:
        column: How many nodes the longest way to it has.
        lane: Its place across the map; 0 is the middle.
        name: Its name; may be empty.
        op: Its operator.
        slot: The slot that it belongs to, or ''.
    """

    column: int
    lane: int
    name: str
    op: str
    slot: str


@dataclass(frozen=True, slots=True)
class WholeGraph:
    """The nodes of a main graph, and which reads which.

    Attributes:
        marks: The nodes, in the order in which they run.
        edges: Pairs of nodes by number: the second reads an output of the first.
    """

    marks: tuple[Mark, ...]
    edges: tuple[tuple[int, int], ...]

    @property
    def columns(self) -> int:
        """How many columns the map has."""
        return max((mark.column for mark in self.marks), default=-1) + 1

    @property
    def lanes(self) -> tuple[int, int]:
        """The first and the last lane."""
        lanes = [mark.lane for mark in self.marks]
        return min(lanes, default=0), max(lanes, default=0)

    def lines(self, *, new: bool) -> str:
        """The edges as a path of SVG: those at nodes of slots, or all others."""
        parts = []
        for first, second in self.edges:
            a, b = self.marks[first], self.marks[second]
            if bool(a.slot or b.slot) == new:
                x, y = a.column * COLUMN + MARK, a.lane * LANE + MARK / 2
                parts.append(f"M{x} {y:g}L{b.column * COLUMN} {b.lane * LANE + MARK / 2:g}")
        return "".join(parts)


def whole_graph(view: GraphView) -> WholeGraph:
    """Place every node of a graph; none if there are more than `MOST`.

    Bodies of control flow count as their node.
    """
    nodes = [node for node in view.nodes if node.op_type != "Constant"]
    if len(nodes) > MOST:
        return WholeGraph((), ())
    made: dict[str, int] = {}
    columns: list[int] = []
    lanes: list[int] = []
    taken: dict[int, set[int]] = defaultdict(set)
    edges: list[tuple[int, int]] = []
    for number, node in enumerate(nodes):
        names = (*node.input, *captured(node))
        read = sorted({made[name] for name in names if name in made})
        column = max((columns[i] + 1 for i in read), default=0)
        wanted = round(sum(lanes[i] for i in read) / len(read)) if read else 0
        lane = _nearest_free(wanted, taken[column])
        taken[column].add(lane)
        columns.append(column)
        lanes.append(lane)
        edges += [(i, number) for i in read]
        made.update((name, number) for name in node.output if name)
    marks = (
        Mark(column, lane, text(node.name), text(node.op_type), slot_of(node))
        for node, column, lane in zip(nodes, columns, lanes, strict=True)
    )
    return WholeGraph(tuple(marks), tuple(edges))


def _nearest_free(wanted: int, taken: set[int]) -> int:
    """The free lane nearest to the one that is wanted; of two the lower one."""
    step = 0
    while True:
        for lane in (wanted + step, wanted - step):
            if lane not in taken:
                return lane
        step += 1
