"""What the layout analysis looks up: shapes, small constant numbers, attributes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx

from onnx_adapt.graph.constants import Weight
from onnx_adapt.graph.index import GraphView, ModelIndex, Shape
from onnx_adapt.graph.layout.reshaping import Size, sizes

Place = tuple[str, str]
"""A tensor of a model: the path of the graph that makes it, and its name."""

Numbers = list[Size | None]
"""The numbers of an integer tensor: each a size, or None if unknown."""

MOST_NUMBERS = 64
"""No tensor has more axes; a longer list says nothing of them."""


class Step(NamedTuple):
    """One node of a graph, with the names it reads and makes.

    Attributes:
        view: The graph.
        node: The node.
        inputs: What it reads, '' where it leaves one out.
        outputs: What it makes.
    """

    view: GraphView
    node: onnx.NodeProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def read(self, position: int) -> str:
        """The name it reads at a position, or ''."""
        return self.inputs[position] if position < len(self.inputs) else ""

    def integer(self, name: str, default: int) -> int:
        """A number attribute."""
        for item in self.node.attribute:
            if item.name == name:
                return int(item.i)
        return default

    def integers(self, name: str) -> list[int] | None:
        """A list attribute, or None if there is none."""
        return next((list(a.ints) for a in self.node.attribute if a.name == name), None)


def step_of(view: GraphView, node: onnx.NodeProto) -> Step:
    """A node as a step."""
    return Step(view, node, tuple(node.input), tuple(node.output))


@dataclass(frozen=True, slots=True)
class Look:
    """Looks things up in an indexed model.

    Attributes:
        index: The model.
        found: Shapes of tensors that shape inference is silent about.
        computed: What is known of the numbers of integer tensors; see `computed`.
        marks: A number for each tensor that sizes are named after.
    """

    index: ModelIndex
    found: dict[Place, Shape] = field(default_factory=dict)
    computed: dict[Place, Numbers | None] = field(default_factory=dict)
    marks: dict[Place, int] = field(default_factory=dict)

    def place(self, view: GraphView, name: str) -> Place:
        """The place of a tensor that can be read in a graph."""
        if view.parent is None or name in view.producers:
            return view.scope.path, name
        home = view.home(name)
        return (home or view).scope.path, name

    def shape(self, view: GraphView, name: str) -> Shape | None:
        """The shape of a tensor that can be read in a graph; None if it has too many axes."""
        shape = view.type_of(name).shape if name else None
        if shape is None and name and self.found:
            return self.found.get(self.place(view, name))
        return None if shape is not None and len(shape) > MOST_NUMBERS else shape

    def sizes(self, view: GraphView, name: str, shape: Shape) -> list[Size]:
        """The sizes of a tensor, as `reshaping` compares them."""
        mark = self.marks.setdefault(self.place(view, name), len(self.marks))
        return sizes(shape, f"?{mark}.")

    def rank(self, view: GraphView, name: str) -> int | None:
        """How many axes a tensor has, or None if that is unknown."""
        shape = self.shape(view, name)
        return None if shape is None else len(shape)

    def constant(self, view: GraphView, name: str) -> Weight | None:
        """The constant that can be read by a name, or None."""
        return view.weights.get(name) if view.parent is None else view.weight(name)

    def weight(self, step: Step, position: int) -> Weight | None:
        """The constant that a node reads at a position, or None."""
        name = step.read(position)
        return self.constant(step.view, name) if name else None

    def numbers(self, view: GraphView, name: str) -> list[int] | None:
        """The integers of a small constant, or None."""
        tensor = view.constant(name) if name else None
        if tensor is None or math.prod(tensor.dims) > MOST_NUMBERS:
            return None
        try:
            values = onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()
        except (ValueError, TypeError, KeyError, OSError, onnx.checker.ValidationError):
            return None  # its data is missing or damaged: whoever runs the model says so
        return [int(v) for v in values if math.isfinite(v)] if _are_numbers(values) else None

    def axes(self, step: Step, rank: int) -> list[int] | None:
        """The axes that a node names, by attribute or by its second input, in order.

        None if they are not constant; an empty list if it names none.
        """
        named = step.integers("axes")
        if named is None:
            name = step.read(1)
            named = self.numbers(step.view, name) if name else []
        if named is None or any(not -rank <= axis < rank for axis in named):
            return None
        return sorted(axis % rank for axis in named)


def _are_numbers(values: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def single(shape: Iterable[int]) -> int | None:
    """The one axis whose size is not 1, or None if there are several or none."""
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    return wide[0] if len(wide) == 1 else None
