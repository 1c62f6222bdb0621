"""The graph around a slot as a drawing: boxes with text, and edges as paths of SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from onnx_adapt.report.layout import Point, Size, lay_out
from onnx_adapt.report.surroundings import BASE, NEW, Box, Surroundings
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.names import slot_prefix
from onnx_adapt.words import plain

_LETTER, _LINE = 6.7, 15
"""Width of a letter and height of a line, in pixels, of the page's monospaced font."""

_PADDING = 9
_LONGEST = 27
"""A longer name is shown by its end, because names mostly begin alike."""

_STRAIGHT = 0.05
"""A slant of less than this, in pixels, is not seen."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text.

    Attributes:
        text: The text that is shown.
        style: `op`, `name`, `type` or `weight`.
        whole: The whole name if only its end is shown, else ''.
    """

    text: str
    style: str
    whole: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """A box in the drawing; its top left corner is at `x`, `y`."""

    box: Box
    lines: tuple[Line, ...]
    x: float
    y: float
    width: float
    height: float

    def baselines(self) -> Iterator[tuple[float, Line]]:
        """The baseline of each line of text, from top to bottom."""
        for number, line in enumerate(self.lines):
            yield self.y + _PADDING + _LINE * number + 8, line


@dataclass(frozen=True, slots=True)
class Drawing:
    """Part of a graph, ready to be written as SVG.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        shapes: The boxes.
        paths: For each edge the data of an SVG path, and whether the slot added the edge.
        hidden: How many readers of the last tensor are left out.
    """

    width: float
    height: float
    shapes: tuple[Shape, ...]
    paths: tuple[tuple[str, bool], ...]
    hidden: int

    @property
    def summary(self) -> str:
        """A description of the drawing for screen readers."""
        nodes = [shape.box for shape in self.shapes if shape.box.kind == "node"]
        text = ", ".join(
            f"{box.label}{'' if box.origin == BASE else f' ({box.origin})'}" for box in nodes
        )
        return plain(text)


def draw(part: Surroundings, slot: Slot) -> Drawing:
    """Draw the graph around a slot."""
    texts = [tuple(_lines(box, slot)) for box in part.boxes]
    sizes = [_size(lines) for lines in texts]
    layout = lay_out(sizes, part.edges)
    shapes = tuple(
        Shape(box, lines, round(x, 1), round(y, 1), round(width, 1), height)
        for box, lines, (x, y), (width, height) in zip(
            part.boxes, texts, layout.corners, sizes, strict=True
        )
    )
    paths = tuple(
        (_path(route), any(part.boxes[end].origin == NEW for end in ends))
        for route, ends in zip(layout.routes, part.edges, strict=True)
    )
    width, height = layout.size
    return Drawing(round(width, 1), round(height, 1), shapes, paths, part.hidden)


def _size(lines: Sequence[Line]) -> Size:
    """Width and height of a box with these lines of text."""
    longest = max(len(line.text) for line in lines)
    return longest * _LETTER + 2 * _PADDING, len(lines) * _LINE + 8


def _path(route: Sequence[Point]) -> str:
    """The data of an SVG path: lines where an edge leads straight down, else curves."""
    parts = [f"M{route[0][0]:.1f} {route[0][1]:.1f}"]
    for (x, y), (to_x, to_y) in pairwise(route):
        half = (y + to_y) / 2
        curve = (
            "L" if abs(to_x - x) < _STRAIGHT else f"C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} "
        )
        parts.append(f"{curve}{to_x:.1f} {to_y:.1f}")
    return "".join(parts)


def _lines(box: Box, slot: Slot) -> Iterator[Line]:
    """The text in a box: a tensor's name and type, or a node's operator, name and weights."""
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
    """The end of a name, without the prefix that all names of the slot share."""
    own = name.removeprefix(slot_prefix(slot.name))
    shown = own[1:] if own != name and own[:1] in (".", "/") else name
    short = _shortened(plain(shown), _LONGEST)
    return Line(short, style, "" if short == name else plain(name))


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else "…" + text[1 - longest :]
