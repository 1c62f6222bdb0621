"""A NICE coupling (Dinh et al., 2014) as ONNX nodes: the one slot of another shape."""

from __future__ import annotations

import onnx

from onnx_adapt.slot.activations import ACTIVATIONS, Emitter
from onnx_adapt.slot.manifest import Slot


def emit_coupling(emit: Emitter, slot: Slot) -> None:
    """Emit the coupling; each network is a projection, the activation and a projection."""
    half = slot.width // 2
    halves = [f"{emit.prefix}/half_1", f"{emit.prefix}/half_2"]
    sizes = onnx.helper.make_tensor("", onnx.TensorProto.INT64, [2], [half, half])
    if emit.opset < 13:
        split = onnx.helper.make_node(
            "Split", [slot.inner], halves, axis=-1, split=[half, half]
        )
    else:
        lengths = emit.node("Constant", label="halves", value=sizes)
        split = onnx.helper.make_node("Split", [slot.inner, lengths], halves, axis=-1)
    split.name = f"{emit.prefix}/split"
    emit.nodes.append(split)
    first = emit.node("Add", halves[0], _emit_network(emit, slot, halves[1], "f"), label="y1")
    second = emit.node("Add", halves[1], _emit_network(emit, slot, first, "g"), label="y2")
    emit.node("Concat", first, second, label="sum", axis=-1)


def _emit_network(emit: Emitter, slot: Slot, x: str, which: str) -> str:
    for part in ("down", "up"):
        x = emit.node("MatMul", x, slot.weight(f"{which}_{part}"), label=f"{which}_{part}")
        x = emit.node("Add", x, slot.weight(f"{which}_{part}_bias"))
        if part == "down":
            x = ACTIVATIONS[slot.activation][0](emit, x)
    return x
