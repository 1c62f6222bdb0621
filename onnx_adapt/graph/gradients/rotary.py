"""Rotary positions as plain nodes (Su et al., 2021)."""

from __future__ import annotations

import numpy as np

from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.gradients.tape import INT64, Tape

# Pairs of features are turned by an angle that grows with the position. The pairs are the two
# halves of the features, or each feature with its neighbour (`interleaved`). Features behind
# the width of the table of angles stay as they are.


def rotate(tape: Tape, x: str, places: str, cos: str, sin: str, mixed: bool) -> str:
    """Turn `(batch, heads, positions, size)`.

    Args:
        tape: Where nodes are added.
        x: What is turned.
        places: The position of each, `(batch, positions)`.
        cos: The cosines of all positions, `(positions, half)`.
        sin: Their sines.
        mixed: Whether neighbours are pairs.
    """
    cosines, sines = (
        tape.unsqueezed(tape.add("Gather", table, places, axis=0), 1) for table in (cos, sin)
    )
    half = tape.add("Shape", cos, start=1, end=2, elem_type=INT64)
    whole, end = tape.add("Add", half, half), tape.integers(np.iinfo(np.int64).max)
    zero, last = tape.integers(0), tape.integers(3)
    turned = tape.add("Slice", x, zero, whole, last)
    rest = tape.add("Slice", x, whole, end, last)
    if mixed:
        step = tape.integers(2)
        first = tape.add("Slice", turned, zero, end, last, step)
        second = tape.add("Slice", turned, tape.integers(1), end, last, step)
    else:
        first = tape.add("Slice", turned, zero, half, last)
        second = tape.add("Slice", turned, half, end, last)
    real = tape.add("Sub", tape.add("Mul", first, cosines), tape.add("Mul", second, sines))
    imaginary = tape.add(
        "Add", tape.add("Mul", second, cosines), tape.add("Mul", first, sines)
    )
    if not mixed:
        return tape.add("Concat", real, imaginary, rest, axis=3)
    pairs = tape.add(
        "Concat", tape.unsqueezed(real, -1), tape.unsqueezed(imaginary, -1), axis=-1
    )
    shape = tape.add("Shape", turned, elem_type=INT64)
    return tape.add("Concat", tape.add("Reshape", pairs, shape), rest, axis=3)


def rotary_embedding(tape: Tape, step: Step) -> str:
    """RotaryEmbedding of ONNX Runtime."""
    x, places, cos, sin = (step.input(i) for i in range(4))
    if step.attribute("is_packed_batching", 0) or step.attribute("scale", 1.0) != 1.0:
        raise step.refuse("its rows are packed, or it is scaled")
    mixed = bool(step.attribute("interleaved", 0))
    flat = tape.rank(x) == 3
    heads = tape.add("Transpose", _in_heads(tape, step, x), perm=[0, 2, 1, 3]) if flat else x
    if tape.rank(places) == 1:  # the first position of all rows
        batch, length = (
            tape.add("Shape", heads, start=axis, end=axis + 1, elem_type=INT64)
            for axis in (0, 2)
        )
        zero, one = (tape.constant(np.array(value, np.int64)) for value in (0, 1))
        order = tape.add("Range", zero, tape.squeezed(length, 0), one, elem_type=INT64)
        counted = tape.unsqueezed(tape.add("Add", order, places), 0)
        places = tape.add("Expand", counted, tape.joined(batch, length))
    turned = rotate(tape, heads, places, cos, sin, mixed)
    if not flat:
        return turned
    return tape.like(tape.add("Transpose", turned, perm=[0, 2, 1, 3]), x)


def _in_heads(tape: Tape, step: Step, x: str) -> str:
    """`(batch, positions, heads, size)`; the table tells the size if nothing else does."""
    count = step.attribute("num_heads", 0)
    if count:
        return tape.add("Reshape", x, tape.integers(0, 0, count, -1))
    half = tape.shape(step.input(2))[-1]
    if not isinstance(half, int) or step.attribute("rotary_embedding_dim", 0):
        raise step.refuse("its number of heads is not known")
    return tape.add("Reshape", x, tape.integers(0, 0, -1, 2 * half))
