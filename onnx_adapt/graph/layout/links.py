"""How each kind of operator moves the axes of what it reads to what it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import onnx

from onnx_adapt.graph.index import Shape
from onnx_adapt.graph.layout.computed import computed
from onnx_adapt.graph.layout.look import Look, Numbers, Place, Step
from onnx_adapt.graph.layout.reshaping import Kept, Size, match, product

Pairs = Iterable[tuple[int, int]]

SPLIT = "splits or merges"
"""What a reshape does to an axis that it does not keep."""


class Link(NamedTuple):
    """Which axes of a tensor that a node reads are which axes of one that it makes.

    Axes count from 0 where the number of axes is known; else they are 1 and -1.

    Attributes:
        source: What is read.
        target: What is made.
        pairs: Axis of the source and the same axis of the target.
        node: The node.
        ends: Axis of the source that the target does not have, and what became of it.
        split: The last axes of both, where that of the source is split; or None.
        merged: The last axes of both, where that of the target is merged; or None.
        parts: Axes of the target that have a part of an axis of the source.
        keeps: Whether the target has no other axes than the source.
    """

    source: Place
    target: Place
    pairs: tuple[tuple[int, int], ...]
    node: onnx.NodeProto
    ends: Mapping[int, str] = MappingProxyType({})
    split: tuple[int, int] | None = None
    merged: tuple[int, int] | None = None
    parts: frozenset[int] = frozenset()
    keeps: bool = False


Linker = Callable[[Look, Step], Iterator[Link]]


@cache  # a model has few ranks and many nodes, which share these pairs
def aligned(source: int | None, target: int | None) -> tuple[tuple[int, int], ...]:
    """The pairs of two tensors with equally many axes, each known or unknown."""
    if source is not None and target is not None:
        return tuple((k, k) for k in range(source)) if source == target else ()
    if source is None and target is None:
        return (-1, -1), (1, 1)
    rank = source if target is None else target
    if not rank:
        return ()
    ends = ((rank - 1, -1), *([(1, 1)] if rank > 2 else []))
    return ends if target is None else tuple((b, a) for a, b in ends)


def _link(
    look: Look, step: Step, i: int, o: int, pairs: Pairs, **more: object
) -> Iterator[Link]:
    """The link from input `i` to output `o`, if there are both and the input varies."""
    name = step.read(i)
    if not name or o >= len(step.outputs) or not step.outputs[o]:
        return
    if look.constant(step.view, name) is None:
        made = step.view.scope.path, step.outputs[o]
        yield Link(look.place(step.view, name), made, tuple(pairs), step.node, **more)  # type: ignore[arg-type]


def same(look: Look, step: Step) -> Iterator[Link]:
    """Every output has the axes of the first input."""
    before = look.shape(step.view, step.read(0))
    for o, name in enumerate(step.outputs):
        pairs = _stretched(before, look.shape(step.view, name), shift=False)
        yield from _link(look, step, 0, o, pairs, keeps=o == 0)


def split(look: Look, step: Step) -> Iterator[Link]:
    """Every output has the axes of the input, one of them shorter."""
    before = look.rank(step.view, step.read(0))
    for o, name in enumerate(step.outputs):
        yield from _link(look, step, 0, o, aligned(before, look.rank(step.view, name)))


def broadcast(look: Look, step: Step) -> Iterator[Link]:
    """The axes of all inputs are lined up at the end; those of size 1 are stretched."""
    after = look.shape(step.view, step.outputs[0]) if step.outputs else None
    alone = sum(1 for name in step.inputs if name and not look.constant(step.view, name)) == 1
    for i in range(len(step.inputs)):
        before = look.shape(step.view, step.inputs[i])
        pairs = _stretched(before, after)
        if not alone and (before is None or after is None):
            pairs = [(a, b) for a, b in pairs if (a, b) != (1, 1)]  # nobody knows its size
        full = before is not None and after is not None and len(before) == len(after)
        yield from _link(look, step, i, 0, pairs, keeps=full)


def _stretched(before: Shape | None, after: Shape | None, *, shift: bool = True) -> Pairs:
    """The pairs of axes lined up at the end; what had one entry has not the same entries."""
    if before is None or after is None:
        ranks = (None if shape is None else len(shape) for shape in (before, after))
        return aligned(*ranks)
    ahead = len(after) - len(before)
    if not ahead and before == after:
        return aligned(len(before), len(before))
    if ahead and not shift:
        return []
    pairs = [(k, k + ahead) for k in range(len(before)) if k + ahead >= 0]
    return [
        (k, j) for k, j in pairs if before[k] == after[j] or 1 not in (before[k], after[j])
    ]


def expand(look: Look, step: Step) -> Iterator[Link]:
    """The first input is stretched to a shape."""
    before, after = (look.shape(step.view, n) for n in (step.read(0), step.outputs[0]))
    yield from _link(look, step, 0, 0, _stretched(before, after))


def transpose(look: Look, step: Step) -> Iterator[Link]:
    """Axis `perm[i]` becomes axis `i`."""
    order = step.integers("perm")
    rank = len(order) if order else look.rank(step.view, step.read(0))
    if rank is None:
        return
    order = order or list(range(rank))[::-1]
    if sorted(order) != list(range(rank)):
        return
    places = look.rank(step.view, step.read(0)), look.rank(step.view, step.outputs[0])
    if all(known in (None, rank) for known in places):
        pairs = [(axis, i) for i, axis in enumerate(order)]
        pairs = list(_told(pairs, rank, *places))
        yield from _link(look, step, 0, 0, pairs, keeps=True)


def _told(pairs: Pairs, rank: int, before: int | None, after: int | None) -> Pairs:
    """Pairs of tensors whose number of axes is known here, as it is known elsewhere."""

    def names(axis: int, known: int | None) -> list[int]:
        if known is not None:
            return [axis]
        return [*([1] if axis == 1 else []), *([-1] if axis == rank - 1 else [])]

    return [(a, b) for i, j in pairs for a in names(i, before) for b in names(j, after)]


def concat(look: Look, step: Step) -> Iterator[Link]:
    """Every input has the axes of the output."""
    after = look.rank(step.view, step.outputs[0]) if step.outputs else None
    for i, name in enumerate(step.inputs):
        yield from _link(look, step, i, 0, aligned(look.rank(step.view, name), after))


def gather(look: Look, step: Step) -> Iterator[Link]:
    """One axis is replaced by the axes of the indices."""
    before, indices = (look.rank(step.view, step.read(i)) for i in (0, 1))
    if before is None or indices is None:
        return
    taken = step.integer("axis", 0)
    if not -before <= taken < before:
        return
    taken %= before
    pairs = [(k, k if k < taken else k + indices - 1) for k in range(before) if k != taken]
    ends = {}
    if indices == 1:
        pairs.append((taken, taken))
    else:
        ends[taken] = "takes one of" if indices == 0 else "looks things up by"
    yield from _link(look, step, 0, 0, pairs, ends=ends)


def reduce(look: Look, step: Step) -> Iterator[Link]:
    """Axes become of size 1, or go."""
    before = look.rank(step.view, step.read(0))
    if before is None:
        return
    if step.node.op_type in ("ArgMax", "ArgMin"):
        gone: list[int] | None = [step.integer("axis", 0) % max(before, 1)]
    else:
        gone = look.axes(step, before)
        if gone == [] and not step.integer("noop_with_empty_axes", 0):
            gone = list(range(before))
    if step.integer("keepdims", 1):
        yield from _link(look, step, 0, 0, aligned(before, before))
    elif gone is not None:
        yield from _removed(look, step, before, gone, "reduces")


def _removed(look: Look, step: Step, rank: int, gone: list[int], verb: str) -> Iterator[Link]:
    left = [k for k in range(rank) if k not in gone]
    pairs = [(axis, i) for i, axis in enumerate(left)]
    yield from _link(look, step, 0, 0, pairs, ends=dict.fromkeys(gone, verb))


def squeeze(look: Look, step: Step) -> Iterator[Link]:
    """Axes of size 1 go."""
    before = look.shape(step.view, step.read(0))
    if before is None:
        return
    gone = look.axes(step, len(before))
    if gone == []:
        gone = [axis for axis, size in enumerate(before) if size == 1]
    if gone is not None:
        yield from _removed(look, step, len(before), gone, "takes away")


def unsqueeze(look: Look, step: Step) -> Iterator[Link]:
    """Axes of size 1 come."""
    after = look.rank(step.view, step.outputs[0])
    new = look.axes(step, after) if after is not None else None
    if after is None or new is None:
        return
    old = [axis for axis in range(after) if axis not in new]
    pairs = list(enumerate(old))
    if look.rank(step.view, step.read(0)) == len(pairs):
        yield from _link(look, step, 0, 0, pairs)


def reshape(look: Look, step: Step) -> Iterator[Link]:
    """The order of the elements stays; `reshaping` says which axes do."""
    before = look.shape(step.view, step.read(0))
    if before is None or not step.outputs:
        return
    first = look.sizes(step.view, step.read(0), before)
    second = _reshaped(look, step, first)
    if second is None:
        return
    kept = match(first, second)
    back = match(second, first)
    last, end = len(first) - 1, len(second) - 1
    shared = [place for place in kept.broken.values() if place and place[0] < place[1]]
    more: dict[str, object] = {
        "ends": _broken(kept, len(second)),
        "parts": frozenset(k for a, b in shared for k in range(a, b + 1)),
    }
    if kept.broken.get(last) is not None and (kept.broken[last] or (0, 0))[1] == end:
        more["split"] = (last, end)
    if back.broken.get(end) is not None and (back.broken[end] or (0, 0))[1] == last:
        more["merged"] = (last, end)
    yield from _link(look, step, 0, 0, kept.pairs, **more)


def _broken(kept: Kept, rank: int) -> dict[int, str]:
    """What a reshape does to the axes it does not keep.

    In a matrix, one axis that all of an axis went into is still one of features.
    """
    return {
        axis: SPLIT
        for axis, place in kept.broken.items()
        if not (rank <= 2 and place == (rank - 1, rank - 1))
    }


def _reshaped(look: Look, step: Step, before: list[Size]) -> list[Size] | None:
    """The sizes a reshape gives: those it copies, those it names, those that are known."""
    shape = look.shape(step.view, step.outputs[0])
    if step.node.op_type == "Flatten":
        axis = step.integer("axis", 1)
        axis += len(before) if axis < 0 else 0
        return [product(before[:axis]), product(before[axis:])]
    named = step.integers("shape")
    wanted: Numbers | None = [(size, ()) for size in named] if named else None
    wanted = wanted or computed(look, step.view, step.read(1))
    if wanted is None:
        return None if shape is None else look.sizes(step.view, step.outputs[0], shape)
    trusted = shape is not None and len(shape) == len(wanted)
    known = shape if shape is not None and trusted else (None,) * len(wanted)
    found = look.sizes(step.view, step.outputs[0], known)
    for axis, size in enumerate(wanted):
        if size == (0, ()) and not step.integer("allowzero", 0) and axis < len(before):
            found[axis] = before[axis]
        elif size is not None and size[0] > 0:
            found[axis] = size
    return found


def product_of_matrices(look: Look, step: Step) -> Iterator[Link]:
    """Rows come from the first matrix, columns from the second.

    A vector takes the last axis of the first away. A product with a constant matrix is a
    layer: what it makes has features of its own. The axes in front, such as the heads of
    an attention, are not followed: what they count need not be features of both.
    """
    shapes = [look.shape(step.view, step.read(i)) for i in (0, 1)]
    second = look.weight(step, 1)
    columns = second.dims if second else shapes[1]
    if columns is not None and len(columns) == 1 and shapes[0]:
        last = len(shapes[0]) - 1
        yield from _removed(look, step, last + 1, [last], "sums over")
        return
    flags = ("transA", "transB", "transBatchA", "transBatchB")
    if second or look.weight(step, 0) or any(step.integer(flag, 0) for flag in flags):
        return
    after = look.shape(step.view, step.outputs[0])
    for i, shape in enumerate(shapes):
        if shape and after and min(len(shape), len(after)) >= 2:
            pairs = [(len(shape) - 2 + i, len(after) - 2 + i)]
            yield from _link(look, step, i, 0, pairs)


def einsum(look: Look, step: Step) -> Iterator[Link]:
    """Axes with the same letter are the same."""
    letters = einsum_letters(step)
    if letters is None:
        return
    *inputs, output = letters
    for i, letter in enumerate(inputs):
        pairs = [(k, output.index(c)) for k, c in enumerate(letter) if c in output]
        yield from _link(look, step, i, 0, pairs)


def einsum_letters(step: Step) -> list[str] | None:
    """The letters of each input and of the output; None where axes have no letters."""
    equation = next((a.s.decode("utf-8", "replace") for a in step.node.attribute if a.s), "")
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow or "." in equation or len(inputs) != len(step.inputs):
        return None
    return [*inputs, right]
