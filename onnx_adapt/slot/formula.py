"""The formula of a slot as ONNX nodes; `oracle.py` beside it has it in float64 numpy.

    read    = norm(source)
    target' = scale * target + gain * (act(read @ down + down_bias) @ up + up_bias)

A part that is absent emits no node, so the plain slot is MatMul -> Relu -> MatMul -> Add
(Houlsby et al., 2019, https://arxiv.org/abs/1902.00751). A `gate` multiplies the
adapter's term by the mean of a sigmoid over the sequence, and `norm_after` normalises the
term or the sum (AdapterHub `adapters` 1.3). On a channel axis the projections are 1x1
convolutions, with weights in Conv's own layout. AdapterHub's other residuals have parts
too: where the slot reads the sum of its target and another tensor, `plus`, the terms
`residual * plus` and `skip * read` are added; `switch` turns a `norm_after` of the sum on.

A batched slot can give each row of a batch another adapter: `mask`, one number for each
row and unit, multiplies what the activation gives, and what else differs from row to row
(`up_bias`, `scale`) has an input of its own. It works on `(rows, positions, width)`, and
reshapes to that tensors of another rank. A slot that is on for some tokens alone multiplies
its term by `active`, `(rows, positions, 1)`.

A slot on a weight inside an operator has a formula of its own, in `weight_update.py`.
"""

from __future__ import annotations

import numpy as np
import onnx

from onnx_adapt.errors import SlotError
from onnx_adapt.slot.activations import ACTIVATIONS, Emitter
from onnx_adapt.slot.coupling import emit_coupling
from onnx_adapt.slot.manifest import SLOT_KEY, Slot
from onnx_adapt.slot.names import slot_prefix
from onnx_adapt.slot.parts import ACTIVE, PARTS
from onnx_adapt.slot.weight_update import emit_weight_update

EPSILON = float(np.float32(1e-5))
"""Epsilon of a slot's own LayerNorms: torch.nn.LayerNorm's, as an attribute holds it."""


def slot_nodes(
    slot: Slot, opset: int, norm: onnx.NodeProto | None = None
) -> list[onnx.NodeProto]:
    """The nodes of a slot, from `slot.inner` and `slot.source` to `slot.output`.

    Args:
        slot: The slot.
        opset: Version of the model's default operator set.
        norm: The base's normalisation node that `slot.norm` means.
    """
    emit = Emitter(slot_prefix(slot.name), opset, slot.dtype)
    if "f_down" in slot.parts:
        emit_coupling(emit, slot)
        return _marked(emit, slot)
    if slot.on_weight:
        emit_weight_update(emit, slot)
        return _marked(emit, slot)
    w = _emit_weights(emit, slot)
    out = _emit_rows(emit, slot, slot.inner, [slot.width])
    if "scale" in w:
        out = emit.node("Mul", out, w["scale"], label="scaled")
    if "residual" in w:
        plus = _emit_rows(emit, slot, slot.plus, [slot.width])
        out = emit.node("Add", out, emit.node("Mul", plus, w["residual"]))
    if "up" in w:
        features = [] if "table" in w else [slot.source_width]
        read = _emit_rows(emit, slot, _emit_read(emit, slot, norm), features)
        if "skip" in w:
            out = emit.node("Add", out, emit.node("Mul", read, w["skip"]))
        out = emit.node("Add", out, _emit_term(emit, slot, w, read), label="sum")
    if slot.norm_after == "sum":
        after = _emit_norm(emit, out, w["after_weight"], w.get("after_bias", ""), "after")
        change = emit.node("Mul", emit.node("Sub", after, slot.inner), w["switch"])
        emit.node("Add", slot.inner, change, label="switched")
    if _is_reshaped(slot):
        _emit_back(emit, slot, out)
    return _marked(emit, slot)


def _emit_weights(emit: Emitter, slot: Slot) -> dict[str, str]:
    """The names of the weights by part; a batched slot combines each with its value by row.

    Combining the two small tensors here costs less than applying both to the large one.
    """
    w = {part: slot.weight(part) for part in slot.parts}
    for part in slot.parts if slot.batched else ():
        row = PARTS[part].row
        in_conv = slot.axis == 1 and part == "up_bias"  # Conv takes a bias of one axis only
        if row and not row.masks and not in_conv:
            w[part] = emit.node(row.op, w[part], slot.weight(row.name))
    return w


def _is_reshaped(slot: Slot) -> bool:
    return slot.batched and slot.axis == -1 and slot.rank != 3


def _emit_rows(emit: Emitter, slot: Slot, x: str, features: list[int]) -> str:
    """Reshape a tensor to `(rows, positions, *features)`, with as many rows as the mask.

    A mask of no rows makes it `(1, 0, *features)`, which meets the mask's `(0, 1, r)` as
    `(0, 0, r)`: beside a 0 the -1 of a Reshape would have no meaning.
    """
    if not _is_reshaped(slot):
        return x
    for node in emit.nodes:
        if node.op_type == "Reshape" and node.input[0] == x:
            return str(node.output[0])
    shape = emit.node("Shape", slot.weight(slot.row_parts[0]))  # (rows, 1, r)
    rows_and_one = emit.node("Gather", shape, _emit_int64(emit, [0, 1]), axis=0)
    rows = emit.node("ReduceMax", rows_and_one, keepdims=1)
    sizes = emit.node("Concat", rows, _emit_int64(emit, [-1, *features]), axis=0)
    return emit.node("Reshape", x, sizes, label="by_row")


def _emit_back(emit: Emitter, slot: Slot, x: str) -> None:
    """Reshape a tensor by row to the shape of the target, even if that has an empty axis.

    A 0 among the sizes of a Reshape copies an axis of its input unless `allowzero` says
    otherwise, which came with opset 14. Before, an empty axis is given as -1, so ONNX
    Runtime refuses two of them at once where the rank is 4 or more.
    """
    if slot.rank == 2:
        emit.node("Reshape", x, _emit_int64(emit, [-1, slot.width]), label="reshaped")
        return
    sizes = emit.node("Shape", slot.inner)
    if emit.opset >= 14:
        emit.node("Reshape", x, sizes, label="reshaped", allowzero=1)
        return
    empty = emit.node("Equal", sizes, _emit_int64(emit, [0]))
    minus = emit.node("Cast", empty, to=onnx.TensorProto.INT64)
    emit.node("Reshape", x, emit.node("Sub", sizes, minus), label="reshaped")


def _emit_int64(emit: Emitter, values: list[int]) -> str:
    sizes = onnx.helper.make_tensor("", onnx.TensorProto.INT64, [len(values)], values)
    return emit.node("Constant", value=sizes)


def _marked(emit: Emitter, slot: Slot) -> list[onnx.NodeProto]:
    emit.nodes[-1].output[0] = slot.output
    for node in emit.nodes:
        mark_node(node, slot)
    return emit.nodes


def mark_node(node: onnx.NodeProto, slot: Slot) -> None:
    """Mark a node as one of a slot's."""
    node.metadata_props.add(key=SLOT_KEY, value=slot.name)


def _emit_read(emit: Emitter, slot: Slot, norm: onnx.NodeProto | None) -> str:
    """Emit what the adapter reads: the source, plus `plus`, normalised."""
    x = emit.node("Add", slot.source, slot.plus, label="read") if slot.plus else slot.source
    if norm is None:
        return x
    if norm.op_type == "LayerNormalization" and emit.opset < 17:
        weight, bias = map(str, (*norm.input[1:], "")[:2])
        epsilon = next((item.f for item in norm.attribute if item.name == "epsilon"), EPSILON)
        return _emit_norm(emit, x, weight, bias, "norm", epsilon)
    again = onnx.NodeProto()
    again.CopyFrom(norm)
    again.name = f"{emit.prefix}/norm"
    again.input[0] = x
    del again.output[1:], again.metadata_props[:]
    again.output[0] = again.name
    emit.nodes.append(again)
    return str(again.name)


def _emit_term(emit: Emitter, slot: Slot, w: dict[str, str], read: str) -> str:
    x = read
    if "norm_weight" in w:
        x = _emit_norm(emit, x, w["norm_weight"], w.get("norm_bias", ""), "norm_own")
    if "table" in w:
        x = emit.node("Gather", w["table"], x, label="down")
    else:
        window = _window_attributes(slot)
        x = _emit_projection(emit, x, w["down"], w.get("down_bias", ""), "down", slot, window)
    x = ACTIVATIONS[slot.activation][0](emit, x)
    if slot.batched:
        x = emit.node("Mul", x, slot.weight("mask"), label="masked")
    x = _emit_projection(emit, x, w["up"], w.get("up_bias", ""), "up", slot, {})
    if slot.batched and slot.axis == 1 and "up_bias" in w:
        x = emit.node("Add", x, slot.weight("row_up_bias"))
    if slot.by_token:
        active = slot.weight(ACTIVE.name)
        if slot.rank == 2:  # of the positions of all rows, one after the other
            active = emit.node("Reshape", active, _emit_int64(emit, [-1, 1]))
        x = emit.node("Mul", x, active, label="activated")
    if "gain" in w:
        x = emit.node("Mul", x, w["gain"], label="gained")
    if "gate" in w:
        x = emit.node("Mul", x, _emit_gate(emit, read, w), label="gated")
    if slot.norm_after == "term":
        x = _emit_norm(emit, x, w["after_weight"], w.get("after_bias", ""), "after")
    return x


def _window_attributes(slot: Slot) -> dict[str, list[int]]:
    """The window of a slot as attributes of Conv; empty for a 1x1 projection."""
    n = slot.rank - 2
    if not slot.window:
        return {}
    kernel, strides, rest = slot.window[:n], slot.window[n : 2 * n], slot.window[2 * n :]
    names = ("kernel_shape", "strides", "pads", "dilations")
    values = (kernel, strides, rest[: 2 * n], rest[2 * n :])
    return {name: list(value) for name, value in zip(names, values, strict=True)}


def _emit_projection(
    emit: Emitter,
    x: str,
    weight: str,
    bias: str,
    label: str,
    slot: Slot,
    window: dict[str, list[int]],
) -> str:
    if slot.axis == 1:
        return emit.node("Conv", x, weight, *([bias] if bias else []), label=label, **window)
    x = emit.node("MatMul", x, weight, label=label)
    return emit.node("Add", x, bias, label=f"{label}_biased") if bias else x


def _emit_gate(emit: Emitter, source: str, w: dict[str, str]) -> str:
    gate = emit.node("MatMul", source, w["gate"], label="gate")
    if "gate_bias" in w:
        gate = emit.node("Add", gate, w["gate_bias"])
    return _emit_mean(emit, emit.node("Sigmoid", gate), 1)


def _emit_mean(emit: Emitter, x: str, axis: int) -> str:
    if emit.opset < 18:
        return emit.node("ReduceMean", x, axes=[axis], keepdims=1)
    axes = onnx.helper.make_tensor("", onnx.TensorProto.INT64, [1], [axis])
    return emit.node("ReduceMean", x, emit.node("Constant", value=axes), keepdims=1)


def _emit_norm(
    emit: Emitter, x: str, weight: str, bias: str, label: str, epsilon: float = EPSILON
) -> str:
    if emit.opset >= 17:
        inputs = [x, weight, bias] if bias else [x, weight]
        return emit.node("LayerNormalization", *inputs, label=label, axis=-1, epsilon=epsilon)
    if emit.opset < 11:
        raise SlotError(
            f"a normalisation inside a slot needs opset 11; the model uses {emit.opset}",
            hint="convert it with onnx.version_converter",
        )
    x = emit.node("Sub", x, _emit_mean(emit, x, -1))
    variance = _emit_mean(emit, emit.node("Mul", x, x), -1)
    deviation = emit.node("Sqrt", emit.node("Add", variance, emit.number(epsilon)))
    x = emit.node("Mul", emit.node("Div", x, deviation), weight, label=label)
    return emit.node("Add", x, bias) if bias else x
