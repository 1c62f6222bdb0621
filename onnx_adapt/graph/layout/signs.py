"""What an operator tells of where the features are in what it reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.graph.layers import holds_features
from onnx_adapt.graph.layout.links import einsum_letters
from onnx_adapt.graph.layout.lookup import Lookup, Place, Step, single


class Strength(IntEnum):
    """How much a sign tells.

    A Linear can be laid over any axis, as mixers of tokens do, and a pool shrinks what it
    is given; so each yields to an operator that is defined by its channels.
    """

    CONSTANT = 1
    LINEAR = 2
    DEFINED = 3


class Sign(NamedTuple):
    """The evidence of one node that a tensor has its features on an axis.

    A Conv, for example, is evidence that its input and its output have them on axis 1.

    Attributes:
        place: The tensor.
        axis: The axis, counted as in `links.Link`.
        node: The node that says so.
        strength: How much it tells.
        makes: Whether the node makes the tensor; else it reads it.
    """

    place: Place
    axis: int
    node: onnx.NodeProto
    strength: Strength
    makes: bool

    @property
    def who(self) -> str:
        """The node, for a message."""
        name = f" {self.node.name!r}" if self.node.name else ""
        return f"{self.node.op_type}{name}"


Where = Callable[[Lookup, Step], int | None]


def sign(
    lookup: Lookup, step: Step, position: int, axis: int, strength: Strength, *, makes: bool
) -> Iterator[Sign]:
    """The sign at an input or output of a node, if it is there and not constant."""
    names = step.outputs if makes else step.inputs
    name = names[position] if position < len(names) else ""
    if not name or (not makes and lookup.constant(step.view, name)):
        return
    rank = lookup.rank(step.view, name)
    if rank is None and axis in (1, -1):
        yield Sign(lookup.place(step.view, name), axis, step.node, strength, makes)
    elif rank is not None and -rank <= axis < rank:
        yield Sign(lookup.place(step.view, name), axis % rank, step.node, strength, makes)


def channels_last(default: int) -> Where:
    """Channels are last where the attribute `channels_last` says so."""

    def where(lookup: Lookup, step: Step) -> int:
        return -1 if step.integer("channels_last", default) else 1

    return where


def normalised(lookup: Lookup, step: Step) -> int | None:
    """The last axis, if a normalisation is over no other."""
    axis, rank = step.integer("axis", -1), lookup.rank(step.view, step.read(0))
    return -1 if axis == -1 or (rank is not None and axis == rank - 1) else None


def centred(lookup: Lookup, step: Step) -> int | None:
    """The one axis, beside the batch, that means and variances are not taken over."""
    over, rank = step.integers("axes") or [0, 2, 3], lookup.rank(step.view, step.read(0)) or 0
    kept = [k for k in range(1, rank) if k not in over and k - rank not in over]
    return kept[0] if len(kept) == 1 else None


def embedded(lookup: Lookup, step: Step) -> int | None:
    """The last axis, if rows of a table of features are looked up."""
    table = lookup.weight(step, 0)
    if table is None or len(table.dims) != 2:
        return None
    if not holds_features(step.view, step.node, table):
        return None
    rows = step.integer("axis", 0) in (0, -2) and not lookup.weight(step, 1)
    return -1 if rows else None


def resized(lookup: Lookup, step: Step) -> int | None:
    """Axis 1 or the last, if pictures are resized along all others but the first."""
    before, after = (
        lookup.shape(step.view, step.read(0)),
        lookup.shape(step.view, step.outputs[0]),
    )
    if before is None or after is None or not 3 <= len(before) == len(after):
        return None
    kept = [axis for axis in range(1, len(before)) if before[axis] == after[axis] is not None]
    if len(kept) != 1:
        return None
    return {1: 1, len(before) - 1: -1}.get(kept[0])


def multiplied(weight: int, flags: tuple[str, ...] = ()) -> Where:
    """The last axis, if the matrix at a position is the weight of a Linear."""

    def where(lookup: Lookup, step: Step) -> int | None:
        constant = lookup.weight(step, weight)
        rank = len(constant.dims) if constant else lookup.rank(step.view, step.read(weight))
        before = lookup.rank(step.view, step.read(0))
        linear = constant is not None or (rank == 2 and before is not None and before > 2)
        turned = any(step.integer(flag, 0) for flag in flags)
        return -1 if linear and rank != 1 and not turned else None

    return where


def matrices(lookup: Lookup, step: Step) -> Iterator[Sign]:
    """A matrix in front multiplies the axis before the last; a vector takes one away."""
    first, second = (lookup.weight(step, i) for i in (0, 1))
    if second is not None and len(second.dims) == 1:
        yield from sign(lookup, step, 0, -1, Strength.LINEAR, makes=False)
    if first is None or second is not None or len(first.dims) < 2:
        return
    yield from sign(lookup, step, 1, -2, Strength.LINEAR, makes=False)
    yield from sign(lookup, step, 0, -2, Strength.LINEAR, makes=True)


def einsum_signs(lookup: Lookup, step: Step) -> Iterator[Sign]:
    """A product with a constant is a Linear over the letters that the constant brings."""
    letters = einsum_letters(step)
    weights = [i for i in range(len(step.inputs)) if lookup.weight(step, i)]
    if letters is None or len(step.inputs) != 2 or len(weights) != 1:
        return
    (w,) = weights
    constant, given, made = letters[w], letters[1 - w], letters[2]
    summed = [c for c in constant if c in given and c not in made]
    new = [c for c in constant if c in made and c not in given]
    if len(summed) == 1:
        axis = given.index(summed[0])
        yield from sign(lookup, step, 1 - w, axis, Strength.LINEAR, makes=False)
    if len(new) == 1:
        yield from sign(lookup, step, 0, made.index(new[0]), Strength.LINEAR, makes=True)


def per_channel(lookup: Lookup, step: Step) -> Iterator[Sign]:
    """A constant with one number for each entry of one axis: a scale, a shift, a slope."""
    if len(step.inputs) != 2 or not step.outputs:
        return
    for i in (0, 1):
        constant, shape = lookup.weight(step, i), lookup.shape(step.view, step.read(1 - i))
        if constant is None or shape is None or constant.elem_type not in FLOATS:
            continue
        wide = single(constant.dims)
        axis = None if wide is None else wide - len(constant.dims)
        if wide is None or axis is None or not 0 < axis + len(shape) < len(shape):
            continue
        if shape[axis] == constant.dims[wide]:
            yield from sign(lookup, step, 1 - i, axis, Strength.CONSTANT, makes=False)
            yield from sign(lookup, step, 0, axis, Strength.CONSTANT, makes=True)
