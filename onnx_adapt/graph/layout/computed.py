"""Shapes that a graph computes: what each number of an integer tensor is, as far as it shows.

ONNX's own inference follows them too, but mixes up tensors of the same name in two bodies.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layout.lookup import MOST_NUMBERS, Lookup, Numbers, Step, step_of
from onnx_adapt.graph.layout.reshaping import product

_DEEPEST = 32
_LARGEST = 1 << 62
_FOLLOWED = {
    *(
        "Cast",
        "Identity",
        "Unsqueeze",
        "Squeeze",
        "Reshape",
        "Concat",
        "Mul",
        "Gather",
        "Slice",
    ),
}
"""Operators that make numbers of a shape from numbers of shapes; the first five copy them."""


def computed(lookup: Lookup, view: GraphView, name: str, depth: int = 0) -> Numbers | None:
    """What the numbers of an integer tensor are, or None if not even how many."""
    place = lookup.place(view, name)
    if place not in lookup.computed:
        found = _computed(lookup, view, name, depth)
        lookup.computed[place] = found if found is None or len(found) <= MOST_NUMBERS else None
    return lookup.computed[place]


def _computed(lookup: Lookup, view: GraphView, name: str, depth: int) -> Numbers | None:
    stored = lookup.numbers(view, name)
    if stored is not None:
        return [(number, ()) for number in stored]
    made = view.producer(name) if name and depth < _DEEPEST else None
    found = _made(lookup, step_of(*made), depth + 1) if made else None
    if found is None:
        shape = lookup.shape(view, name)
        if shape is not None and len(shape) == 1 and isinstance(shape[0], int):
            return [None] * shape[0] if shape[0] <= MOST_NUMBERS else None
        return [None] if shape == () else None
    return found


def _made(lookup: Lookup, step: Step, depth: int) -> Numbers | None:
    if step.node.op_type == "Shape":
        name = step.read(0)
        shape = lookup.shape(step.view, name)
        known = lookup.sizes(step.view, name, shape) if shape is not None else None
        end = step.integer("end", len(shape or ()))
        return None if known is None else [*known[step.integer("start", 0) : end]]
    if step.node.op_type not in _FOLLOWED or not step.inputs:
        return None
    first = computed(lookup, step.view, step.read(0), depth)
    if first is None:
        return None
    match step.node.op_type:
        case "Concat":
            rest = [computed(lookup, step.view, name, depth) for name in step.inputs[1:]]
            return (
                None if None in rest else [*first, *(n for part in rest for n in part or ())]
            )
        case "Mul":
            return _multiplied(first, computed(lookup, step.view, step.read(1), depth))
        case "Gather":
            return _gathered(first, lookup.numbers(step.view, step.read(1)))
        case "Slice":
            return _sliced(lookup, step, first)
    return first


def _multiplied(first: Numbers, second: Numbers | None) -> Numbers | None:
    if second is None or len(first) != len(second):
        return None
    pairs = zip(first, second, strict=True)
    made = [product([a, b]) if a and b else None for a, b in pairs]
    return [
        n if n and abs(n[0]) < _LARGEST and len(n[1]) <= MOST_NUMBERS else None for n in made
    ]


def _gathered(known: Numbers, places: Sequence[int] | None) -> Numbers | None:
    if places is None or any(not -len(known) <= place < len(known) for place in places):
        return None
    return [known[place] for place in places]


def _sliced(lookup: Lookup, step: Step, known: Numbers) -> Numbers | None:
    starts = step.integers("starts") or lookup.numbers(step.view, step.read(1))
    ends = step.integers("ends") or lookup.numbers(step.view, step.read(2))
    steps = lookup.numbers(step.view, step.read(4)) if step.read(4) else [1]
    if starts is None or ends is None or steps is None or len(starts) != 1 or not steps[0]:
        return None
    return known[starts[0] : ends[0] : steps[0]]
