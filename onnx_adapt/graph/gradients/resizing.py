"""Rules for operators that make images larger or smaller."""

from __future__ import annotations

import numpy as np

from onnx_adapt.graph.gradients.rule import Grads, Rule, Step, only
from onnx_adapt.graph.gradients.tape import FLOAT, INT64, Tape

# Resize is linear, axis by axis: along each it is a product with a matrix of its own, whose
# rows are what Resize makes of `1, 0, 0, ...`, of `0, 1, 0, ...` and so on. So the matrix is
# what Resize itself makes of the identity matrix, in whatever mode, and the gradient is the
# product with its transpose. An example: from 2 numbers to 4 in mode `nearest`,
#
#     Resize(identity) = [[1, 1, 0, 0], [0, 0, 1, 1]]
#
# and the gradient `(g0, g1, g2, g3)` becomes `(g0 + g1, g2 + g3)`.

_KEPT = (
    *("mode", "coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a"),
    *("exclude_outside", "antialias"),
)


def resize(tape: Tape, step: Step) -> Grads:
    """Resize in any mode that makes each number of those of the tensor alone."""
    x, scales, sizes = step.input(0), step.input(2), step.input(3)
    policy = step.attribute("keep_aspect_ratio_policy", "stretch")
    if (
        step.attribute("coordinate_transformation_mode", "") == "tf_crop_and_resize"
        or policy != "stretch"
    ):
        raise step.refuse("it crops, or keeps the ratio of its sides")
    rank = tape.rank(x)
    axes = step.attribute("axes", None) or range(rank)
    kept = {name: value for name in _KEPT if (value := step.attribute(name, None)) is not None}
    grad = tape.cast(step.grad, FLOAT)
    for item, axis in enumerate(axes):
        axis %= rank
        size = tape.shape(x)[axis]
        if size is not None and size == tape.shape(step.output)[axis]:
            continue
        place = tape.integers(item)
        if sizes:
            picked = tape.joined(tape.size(x, axis), tape.add("Gather", sizes, place, axis=0))
            given = ("", "", picked)
        else:
            one = tape.constant(np.ones(1, np.float32))
            picked = tape.add("Gather", scales, place, axis=0)
            given = ("", tape.add("Concat", one, picked, axis=0, elem_type=FLOAT), "")
        matrix = tape.add("Resize", _identity(tape, x, axis), *given, elem_type=FLOAT, **kept)
        order = [*(k for k in range(rank) if k != axis), axis]
        moved = tape.permuted(grad, order)
        back = tape.add("MatMul", moved, tape.add("Transpose", matrix, perm=[1, 0]))
        grad = tape.permuted(back, np.argsort(order).tolist())
    return only(tape.cast(grad, tape.elem_type(x)))


def _identity(tape: Tape, x: str, axis: int) -> str:
    """The identity matrix of the size of an axis."""
    size = tape.size(x, axis)
    zeros = tape.add(
        "Expand", tape.constant(np.zeros((), np.float32)), tape.joined(size, size)
    )
    return tape.add("EyeLike", zeros)


def depth_to_space(tape: Tape, step: Step) -> Grads:
    """DepthToSpace: SpaceToDepth, with the channels in the order of the mode."""
    block = step.attribute("blocksize", 1)
    made = tape.add("SpaceToDepth", step.grad, blocksize=block)
    if step.attribute("mode", "DCR") == "DCR":
        return only(made)
    # CRD has (channels, block, block) on axis 1, DCR (block, block, channels).
    height, width = (
        tape.add("Shape", made, start=axis, end=axis + 1, elem_type=INT64) for axis in (2, 3)
    )
    shape = tape.joined(tape.integers(0, block * block, -1), height, width)
    apart = tape.add("Reshape", made, shape)
    turned = tape.add("Transpose", apart, perm=[0, 2, 1, 3, 4])
    return only(tape.like(turned, step.input()))


def space_to_depth(tape: Tape, step: Step) -> Grads:
    """SpaceToDepth: DepthToSpace."""
    return only(tape.add("DepthToSpace", step.grad, blocksize=step.attribute("blocksize", 1)))


RESIZING: dict[str, Rule] = {
    "Resize": resize,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
"""The rules by operator."""
