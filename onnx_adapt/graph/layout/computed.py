"""Shapes that a graph computes: what each number of an integer tensor is, as far as it shows.

ONNX's own inference follows them too, but mixes up tensors of the same name in two bodies.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layout.look import Look, Step, step_of
from onnx_adapt.graph.layout.reshaping import Size, product, sizes

_DEEPEST = 32
_COPIES = {"Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape"}

Numbers = list[Size | None]
"""The numbers of a tensor of at most one axis: each a size, or None if unknown."""


def computed(look: Look, view: GraphView, name: str, depth: int = 0) -> Numbers | None:
    """What the numbers of an integer tensor are, or None if not even how many."""
    stored = look.numbers(view, name)
    if stored is not None:
        return [(number, ()) for number in stored]
    made = view.producer(name) if name and depth < _DEEPEST else None
    found = _made(look, step_of(*made), depth + 1) if made else None
    if found is None:
        shape = look.shape(view, name)
        if shape is not None and len(shape) == 1 and isinstance(shape[0], int):
            return [None] * min(shape[0], 64)
        return [None] if shape == () else None
    return found


def _made(look: Look, step: Step, depth: int) -> Numbers | None:
    if step.node.op_type == "Shape":
        shape = look.shape(step.view, step.read(0))
        if shape is None:
            return None
        known = sizes(shape, "/".join(look.place(step.view, step.read(0))))
        end = step.integer("end", len(known))
        return list(known[step.integer("start", 0) : end])
    given = [computed(look, step.view, name, depth) for name in step.inputs]
    if step.node.op_type == "Concat":
        return (
            [n for part in given if part is not None for n in part]
            if None not in given
            else None
        )
    first = given[0] if given else None
    if first is None:
        return None
    if step.node.op_type in _COPIES:
        return first
    if step.node.op_type == "Mul" and given[1] is not None and len(first) == len(given[1]):
        pairs = zip(first, given[1], strict=True)
        return [product([a, b]) if a and b else None for a, b in pairs]
    if step.node.op_type == "Gather":
        return _gathered(first, look.numbers(step.view, step.read(1)))
    if step.node.op_type == "Slice":
        return _sliced(look, step, first)
    return None


def _gathered(known: Numbers, places: Sequence[int] | None) -> Numbers | None:
    if places is None or any(not -len(known) <= place < len(known) for place in places):
        return None
    return [known[place] for place in places]


def _sliced(look: Look, step: Step, known: Numbers) -> Numbers | None:
    starts = step.integers("starts") or look.numbers(step.view, step.read(1))
    ends = step.integers("ends") or look.numbers(step.view, step.read(2))
    steps = look.numbers(step.view, step.read(4)) if step.read(4) else [1]
    if starts is None or ends is None or steps is None or len(starts) != 1 or not steps[0]:
        return None
    return known[starts[0] : ends[0] : steps[0]]
