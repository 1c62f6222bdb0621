"""A slot on a weight inside an operator, as ONNX nodes.

    weight' = scale * weight + gain * (down @ up)

It is for weights whose product with the activations is no tensor of the graph: those of
ONNX Runtime's Attention, of recurrent layers, of experts that are stacked in one tensor. The
weight is `(rows, columns)`, with `down` `(rows, r)` and `up` `(r, columns)`, whichever of the
two the operator sums over; or a stack of such matrices, `(groups, rows, columns)`. The parts
of a stack are written side by side, so that the bottleneck is the axis that it is elsewhere:
`down` is `(groups * rows, r)` and `up` is `(r, groups * columns)`. For example, LoRA of rank 4
on 8 experts of `(128, 32)` has `down` `(1024, 4)` and `up` `(4, 256)`.

The update costs `2 * groups * rows * r * columns` operations in each run, however many tokens
there are, and a copy of the weight.
"""

from __future__ import annotations

import math

import onnx

from onnx_adapt.errors import SlotError
from onnx_adapt.slot.activations import Emitter
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.weights import matrices

_PARTS = {"down", "up", "scale", "gain"}
_MOST_AXES = 3


def check_weight_slot(slot: Slot) -> None:
    """Refuse a slot on a weight that has no meaning.

    Raises:
        SlotError: If it has parts or settings of slots on activations, or one run is to give
            each row of a batch another adapter.
    """
    if slot.batched:
        raise SlotError(
            f"slot {slot.name!r} cannot give each row an adapter: it changes the weight "
            f"{slot.tensor!r}, which all rows of a run share",
            hint="insert it without --batched; rows are then run by adapter",
        )
    groups, rows, columns = matrices(slot.weight_shape)
    shape = slot.weight_shape
    vector = len(shape) == 1
    plain = slot.activation == "identity" and slot.axis == -1
    plain = plain and not (slot.norm or slot.norm_after or slot.plus or slot.window)
    fits = len(shape) <= _MOST_AXES and slot.width == groups * columns
    fits = fits and slot.source_width == groups * rows and math.prod(shape) > 0
    other = sorted(set(slot.parts) - (_PARTS if not vector else {"scale"}))
    if other or not plain or not fits:
        raise SlotError(
            f"slot {slot.name!r} cannot be on a weight of shape {list(shape)}"
            + (f": it has the part {other[0]!r}" if other else ""),
            hint="a slot on a weight has down, up, scale and gain; on a vector, scale alone",
        )


def emit_weight_update(emit: Emitter, slot: Slot) -> None:
    """Emit the nodes from the weight to the changed weight."""
    out = slot.inner
    if "scale" in slot.parts:
        out = emit.node("Mul", out, _emit_by_column(emit, slot, "scale"), label="scaled")
    if "up" in slot.parts:
        product = emit.node("MatMul", *_emit_factors(emit, slot), label="product")
        if "gain" in slot.parts:
            gain = _emit_by_column(emit, slot, "gain")
            product = emit.node("Mul", product, gain, label="gained")
        emit.node("Add", out, product, label="sum")


def _emit_factors(emit: Emitter, slot: Slot) -> tuple[str, str]:
    """Cut the two factors into those of each matrix of a stack.

    A 0 among the sizes of a Reshape copies an axis of its input: the bottleneck, which may be
    0 itself.
    """
    down, up = slot.weight("down"), slot.weight("up")
    if len(slot.weight_shape) < _MOST_AXES:
        return down, up
    groups, rows, columns = matrices(slot.weight_shape)
    if emit.opset < 13:
        down = emit.node("Unsqueeze", down, axes=[0], label="down")
    else:
        down = emit.node("Unsqueeze", down, _int64(emit, [0]), label="down")
    down = emit.node("Reshape", down, _int64(emit, [groups, rows, 0]), label="each_down")
    up = emit.node("Reshape", up, _int64(emit, [0, groups, columns]))
    return down, emit.node("Transpose", up, perm=[1, 0, 2], label="each_up")


def _emit_by_column(emit: Emitter, slot: Slot, part: str) -> str:
    """Shape a part with a value for each column so that it multiplies the weight."""
    if len(slot.weight_shape) < _MOST_AXES:
        return slot.weight(part)
    groups, _, columns = matrices(slot.weight_shape)
    return emit.node("Reshape", slot.weight(part), _int64(emit, [groups, 1, columns]))


def _int64(emit: Emitter, values: list[int]) -> str:
    sizes = onnx.helper.make_tensor("", onnx.TensorProto.INT64, [len(values)], values)
    return emit.node("Constant", value=sizes)
