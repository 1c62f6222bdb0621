"""The graph around a slot as a drawing: grandalf places boxes and edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onnx_adapt.report.surroundings import BASE, Box, Surroundings
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.names import slot_prefix
from onnx_adapt.words import plain

_LETTER, _LINE = 6.7, 15
"""Size of a letter and a line of the page's monospaced font at 11 pixels."""

_PADDING = 9
_LONGEST = 27
"""Letters of a name that are shown; the end tells names apart."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text.

    Attributes:
        text: What is shown.
        style: `op`, `name`, `type` or `weight`.
        whole: The whole name where only its end is shown, or ''.
    """

    text: str
    style: str
    whole: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """A box with its place: the middle of its left edge is at `x`, its top at `y`."""

    box: Box
    lines: tuple[Line, ...]
    x: float
    y: float
    width: float
    height: float

    def baselines(self) -> Iterator[tuple[float, Line]]:
        """Where each line of text is written."""
        for number, line in enumerate(self.lines):
            yield self.y + _PADDING + _LINE * number + 8, line


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture.

    Attributes:
        width: In pixels.
        height: In pixels.
        shapes: The boxes.
        paths: Each edge as the data of an SVG path, and whether it is new.
        hidden: How many readers are left out.
    """

    width: float
    height: float
    shapes: tuple[Shape, ...]
    paths: tuple[tuple[str, bool], ...]
    hidden: int

    @property
    def summary(self) -> str:
        """What is in it, for those who do not see it."""
        nodes = [shape.box for shape in self.shapes if shape.box.kind == "node"]
        text = ", ".join(
            f"{box.label}{'' if box.origin == BASE else f' ({box.origin})'}" for box in nodes
        )
        return plain(text)


@dataclass(slots=True)
class _View:
    """What grandalf wants to know of a vertex, and where it puts it."""

    w: float
    h: float
    xy: Point = (0.0, 0.0)


def draw(part: Surroundings, slot: Slot) -> Drawing:
    """Place the boxes and edges of a part of a graph."""
    from grandalf.graphs import Edge, Graph, Vertex
    from grandalf.layouts import SugiyamaLayout
    from grandalf.routing import EdgeViewer, route_with_lines

    texts = [tuple(_lines(box, slot)) for box in part.boxes]
    vertices = []
    for number, lines in enumerate(texts):
        vertex = Vertex(number)
        longest = max(len(line.text) for line in lines)
        vertex.view = _View(longest * _LETTER + 2 * _PADDING, len(lines) * _LINE + 8)
        vertices.append(vertex)
    edges = [Edge(vertices[a], vertices[b]) for a, b in part.edges]
    for edge in edges:
        edge.view = EdgeViewer()
    right = 0.0
    for piece in Graph(vertices, edges).C:
        layout = SugiyamaLayout(piece)
        layout.xspace, layout.yspace = 16, 18
        layout.route_edge = route_with_lines
        layout.init_all(optimize=True)
        layout.draw()
        right = _moved(piece, right) + 16
    return _drawing(part, texts, vertices, edges)


def _moved(piece: Any, left: float) -> float:
    """Put a connected piece at `left`, top at zero; where it ends."""
    views = [vertex.view for vertex in piece.V()]
    points = [point for edge in piece.E() for point in edge.view._pts]
    sides = [view.xy[0] - view.w / 2 for view in views] + [x for x, _ in points]
    dx = left - min(sides)
    dy = -min(view.xy[1] - view.h / 2 for view in views)
    for view in views:
        view.xy = (view.xy[0] + dx, view.xy[1] + dy)
    for edge in piece.E():
        edge.view.setpath([(x + dx, y + dy) for x, y in edge.view._pts])
    ends = [view.xy[0] + view.w / 2 for view in views] + [x + dx for x, _ in points]
    return float(max(ends))


def _drawing(
    part: Surroundings,
    texts: Sequence[tuple[Line, ...]],
    vertices: Sequence[Any],
    edges: Sequence[Any],
) -> Drawing:
    shapes = tuple(
        Shape(
            part.boxes[number],
            texts[number],
            round(vertex.view.xy[0] - vertex.view.w / 2, 1),
            round(vertex.view.xy[1] - vertex.view.h / 2, 1),
            round(vertex.view.w, 1),
            vertex.view.h,
        )
        for number, vertex in enumerate(vertices)
    )
    paths = tuple(
        (_path(edge.view._pts), any(part.boxes[end].origin == "new" for end in ends))
        for edge, ends in zip(edges, part.edges, strict=True)
    )
    xs = [s.x + s.width for s in shapes] + [x for e in edges for x, _ in e.view._pts]
    return Drawing(
        round(max(xs), 1), max(s.y + s.height for s in shapes), shapes, paths, part.hidden
    )


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _lines(box: Box, slot: Slot) -> Iterator[Line]:
    if box.kind == "tensor":
        yield _name(box.name, slot, "name")
        yield Line(_shortened(plain(box.label), 34), "type")
        return
    yield Line(_shortened(plain(box.label), _LONGEST), "op")
    if box.name and box.origin != "new":
        yield _name(box.name, slot, "name")
    for weight in box.weights:
        name = _name(weight.name, slot, "weight")
        yield Line(f"{name.text} {plain(weight.type)}", "weight", name.whole)


def _name(name: str, slot: Slot, style: str) -> Line:
    """The end of a name; what all names of the slot begin with is left out."""
    own = name.removeprefix(slot_prefix(slot.name))
    shown = own[1:] if own != name and own[:1] in (".", "/") else name
    short = _shortened(plain(shown), _LONGEST)
    return Line(short, style, "" if short == name else plain(name))


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else "…" + text[1 - longest :]
