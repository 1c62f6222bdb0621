"""Rules for operators that move numbers, and compute none."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.graph.gradients.rule import Grads, Rule, Step, only
from onnx_adapt.graph.gradients.tape import BFLOAT16, FLOAT, FLOAT16, INT64, Tape


def reshape(tape: Tape, step: Step) -> Grads:
    """Reshape, Flatten, Squeeze and Unsqueeze."""
    return only(tape.like(step.grad, step.input()))


def transpose(tape: Tape, step: Step) -> Grads:
    """Transpose: the inverse order."""
    order = step.attribute("perm", None) or range(tape.rank(step.input()))[::-1]
    return only(tape.permuted(step.grad, np.argsort(list(order)).tolist()))


def cast(tape: Tape, step: Step) -> Grads:
    """Cast and CastLike: to integers there is no gradient, from them it stays as it is."""
    if tape.elem_type(step.output) not in FLOATS:
        return only(None)
    kind = tape.elem_type(step.input())
    return only(tape.cast(step.grad, kind) if kind in FLOATS else step.grad)


def expand(tape: Tape, step: Step) -> Grads:
    """Expand: the sum over what was repeated."""
    return only(tape.unbroadcast(step.grad, step.input(), step.output))


def tile(tape: Tape, step: Step) -> Grads:
    """Tile: each axis becomes (repeats, size), and the repeats are summed."""
    x, repeats = step.input(0), step.input(1)
    axes = range(tape.rank(x))
    sizes = [
        size
        for axis in axes
        for size in (
            tape.add("Gather", repeats, tape.integers(axis), axis=0, elem_type=INT64),
            tape.size(x, axis),
        )
    ]
    split = tape.add("Reshape", step.grad, tape.joined(*sizes))
    return only(tape.total(split, [2 * axis for axis in axes], keep=False))


def concat(tape: Tape, step: Step) -> Grads:
    """Concat: each input gets its part."""
    axis = step.attribute("axis", 0)
    sizes = tape.joined(*(tape.size(name, axis) for name in step.node.input))
    parts = tape.add_several("Split", (step.grad, sizes), len(step.node.input), axis=axis)
    return [part if wanted else None for part, wanted in zip(parts, step.wanted, strict=True)]


def split(tape: Tape, step: Step) -> Grads:
    """Split: the parts side by side, zeros for those that nothing reads."""
    names = [str(name) for name in step.node.output]
    if not all(names):
        raise step.refuse("one of its outputs has no name")
    parts = [
        grad or tape.zeros_like(name) for grad, name in zip(step.grads, names, strict=True)
    ]
    like = tape.elem_type(step.input())
    return only(tape.add("Concat", *parts, axis=step.attribute("axis", 0), elem_type=like))


def pad(tape: Tape, step: Step) -> Grads:
    """Pad with a constant: what is inside. Negative pads have cut something off."""
    if step.attribute("mode", "constant") != "constant":
        raise step.refuse("it pads with the tensor's own numbers")
    inverse = tape.add("Neg", step.input(1))
    return only(
        tape.add("Pad", step.grad, inverse, *(("", step.input(3)) if step.input(3) else ()))
    )


# Slice and Gather choose positions along an axis. Their gradients are added to zeros at these
# positions: a token that occurs twice gets both gradients. An example: of an embedding table
# `(vocabulary, width)` and ids `(batch, sequence)` the gradient `(batch, sequence, width)` is
# added, row by row, at the ids. Where the axis is not the first, it is moved there.


def added(tape: Tape, op: str, shape: str, places: str, grad: str, **attributes: Any) -> str:
    """Add numbers to zeros at some places; half precision in float32.

    ONNX Runtime has no sums of scattered half-precision numbers on the CPU, and these would
    lose digits.
    """
    kind = tape.elem_type(grad)
    wide = tape.cast(grad, FLOAT) if kind in (FLOAT16, BFLOAT16) else grad
    zeros = tape.add("Expand", tape.number(0, wide), shape)
    total = tape.add(op, zeros, places, wide, reduction="add", **attributes)
    return tape.cast(total, kind)


def scattered(tape: Tape, grad: str, places: str, like: str, axis: int, rank: int) -> str:
    """Add gradients to zeros along an axis.

    Args:
        tape: Where nodes are added.
        grad: `(before..., places..., after...)`.
        places: Integers of `rank` axes, negative ones from the end.
        like: A tensor of the shape of the result, `(before..., size, after...)`.
        axis: The axis.
        rank: The number of axes of `places`.
    """
    before, after = axis, tape.rank(like) - axis - 1
    first = range(before, before + rank)
    order = [*first, *range(before), *range(before + rank, before + rank + after)]
    moved = tape.permuted(grad, order)
    others = [k for k in range(tape.rank(like)) if k != axis]
    shape = tape.joined(*(tape.size(like, k) for k in (axis, *others)))
    rows = tape.unsqueezed(places, -1)
    total = added(tape, "ScatterND", shape, rows, moved)
    back = np.argsort([axis, *others]).tolist()
    return tape.permuted(total, back)


def gather(tape: Tape, step: Step) -> Grads:
    """Gather: gradients are added where the numbers came from."""
    data, places = step.input(0), step.input(1)
    axis = step.attribute("axis", 0) % tape.rank(data)
    wide = tape.cast(places, INT64)
    return only(scattered(tape, step.grad, wide, data, axis, tape.rank(places)))


def gather_elements(tape: Tape, step: Step) -> Grads:
    """GatherElements: gradients are added where the numbers came from."""
    shape, axis = tape.shape_of(step.input()), step.attribute("axis", 0)
    return only(added(tape, "ScatterElements", shape, step.input(1), step.grad, axis=axis))


def gather_nd(tape: Tape, step: Step) -> Grads:
    """GatherND: gradients are added where the numbers came from."""
    if step.attribute("batch_dims", 0):
        raise step.refuse("it has batch_dims")
    shape = tape.shape_of(step.input())
    return only(added(tape, "ScatterND", shape, step.input(1), step.grad))


def scatter(tape: Tape, step: Step) -> Grads:
    """ScatterND and ScatterElements: the replaced numbers have no part in the result."""
    if step.attribute("reduction", "none") not in ("none", "add"):
        raise step.refuse(f"its reduction is {step.attribute('reduction', '')!r}")
    op, places, updates = step.node.op_type, step.input(1), step.input(2)
    axis = step.attribute("axis", 0) if op == "ScatterElements" else None
    grads: list[str | None] = [None, None, None]
    if step.wants(0):
        adds = step.attribute("reduction", "none") == "add"
        zeros = "" if adds else tape.zeros_like(updates)
        grads[0] = step.grad if adds else tape.add(op, step.grad, places, zeros, axis=axis)
    if step.wants(2):
        reader = "GatherND" if op == "ScatterND" else "GatherElements"
        grads[2] = tape.add(reader, step.grad, places, axis=axis)
    return grads


def slice_(tape: Tape, step: Step) -> Grads:
    """Slice, axis by axis: the chosen positions are those of a range that is sliced alike."""
    x, rank = step.input(), tape.rank(step.input())
    axes = tape.value(step.input(3)) if step.input(3) else None
    if step.input(3) and axes is None:
        raise step.refuse("its axes are computed")
    starts = tape.shape(step.input(1))
    count = starts[0] if starts else None
    if axes is None and not isinstance(count, int):
        raise step.refuse("its number of axes is not known")
    chosen = range(int(count or 0)) if axes is None else axes.reshape(-1).tolist()
    places = {
        int(axis) % rank: _positions(tape, step, int(axis) % rank, k)
        for k, axis in enumerate(chosen)
    }
    return only(_scattered_in_all(tape, step.grad, places, x))


def _positions(tape: Tape, step: Step, axis: int, item: int) -> str:
    """The positions that a Slice chooses on one axis: `(chosen,)`."""
    size = tape.squeezed(tape.size(step.input(), axis), 0)
    zero, one = (tape.constant(np.array(value, np.int64)) for value in (0, 1))
    whole = tape.once("Range", zero, size, one, elem_type=INT64)

    def own(position: int) -> str:
        picked = tape.add("Gather", step.input(position), tape.integers(item), axis=0)
        return tape.cast(picked, INT64)

    step_size = own(4) if step.input(4) else tape.integers(1)
    return tape.add("Slice", whole, own(1), own(2), tape.integers(0), step_size)


def _scattered_in_all(tape: Tape, grad: str, places: dict[int, str], like: str) -> str:
    """Put a gradient into zeros at positions on several axes.

    The axes are done one after the other. With the first done, the gradient of `x[a:b, c:d]`
    has all rows and the chosen columns.
    """
    rank = tape.rank(like)
    for axis, chosen in places.items():
        order = [axis, *(k for k in range(rank) if k != axis)]
        moved = tape.permuted(grad, order)
        rest = tape.add("Shape", moved, start=1, elem_type=INT64)
        shape = tape.joined(tape.size(like, axis), rest)
        zeros = tape.add("Expand", tape.number(0, grad), shape)
        total = tape.add("ScatterND", zeros, tape.unsqueezed(chosen, -1), moved)
        grad = tape.permuted(total, np.argsort(order).tolist())
    return grad


def trilu(tape: Tape, step: Step) -> Grads:
    """Trilu: the same triangle of the gradient."""
    inputs = (step.input(1),) if step.input(1) else ()
    return only(tape.add("Trilu", step.grad, *inputs, upper=step.attribute("upper", 1)))


def reverse_sequence(tape: Tape, step: Step) -> Grads:
    """ReverseSequence, which is its own inverse."""
    axes = {name: step.attribute(name, None) for name in ("batch_axis", "time_axis")}
    return only(tape.add("ReverseSequence", step.grad, step.input(1), **axes))


MOVING: dict[str, Rule] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    "Transpose": transpose,
    **dict.fromkeys(("Cast", "CastLike"), cast),
    "Expand": expand,
    "Tile": tile,
    "Concat": concat,
    "Split": split,
    "Pad": pad,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    **dict.fromkeys(("ScatterND", "ScatterElements"), scatter),
    "Slice": slice_,
    "Trilu": trilu,
    "ReverseSequence": reverse_sequence,
}
"""The rules by operator."""
