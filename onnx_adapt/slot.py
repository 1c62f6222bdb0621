"""The formula of a slot, twice: as ONNX nodes, and as the float64 oracle.

    target' = scale * target + gain * (act(norm(source) @ down + down_bias) @ up + up_bias)

A part that is absent emits no node, so the plain slot is MatMul -> Relu -> MatMul -> Add
(Houlsby et al., 2019, https://arxiv.org/abs/1902.00751). A `gate` multiplies the
adapter's term by the mean of a sigmoid over the sequence, and `norm_after` normalises the
term or the sum (AdapterHub `adapters` 1.3). On a channel axis the projections are 1x1
convolutions, with weights in Conv's own layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_adapt.activations import ACTIVATIONS, DTYPES, Array, Emitter
from onnx_adapt.errors import SlotError
from onnx_adapt.graph import SLOT_KEY
from onnx_adapt.manifest import Slot

PARTS = (
    *("down", "up", "down_bias", "up_bias", "scale", "gain"),
    *("norm_weight", "norm_bias", "gate", "gate_bias", "after_weight", "after_bias"),
)
"""Every weight a slot can have."""

EPSILON = 1e-5
"""Epsilon of a slot's own LayerNorms (torch.nn.LayerNorm's default)."""

_CHANNEL_PARTS = frozenset(PARTS[:6])


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last axis.

    Attributes:
        weight: `(width,)`.
        bias: `(width,)` or None.
        epsilon: Added to the variance.
        centred: False for RMSNorm, which leaves the mean in.
    """

    weight: Array
    bias: Array | None = None
    epsilon: float = EPSILON
    centred: bool = True

    def __call__(self, x: Array) -> Array:
        """Normalise `(..., width)` in float64."""
        x = x - x.mean(-1, keepdims=True) if self.centred else x
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weight
        return x if self.bias is None else x + self.bias


def check_slot(slot: Slot, opset: int) -> None:
    """Refuse a slot that has no meaning.

    Raises:
        SlotError: If the activation or a part is unknown, parts are missing, or the
            opset is older than 7.
    """
    parts = set(slot.parts)
    if slot.activation not in ACTIVATIONS:
        raise SlotError(
            f"unknown activation {slot.activation!r}", hint=f"one of {', '.join(ACTIVATIONS)}"
        )
    if unknown := parts - set(PARTS):
        raise SlotError(f"unknown parts {sorted(unknown)}", hint=f"known: {', '.join(PARTS)}")
    needs = {"down_bias": "down", "up_bias": "up", "gain": "up", "norm_weight": "down"}
    needs |= {"up": "down", "down": "up", "norm_bias": "norm_weight", "gate": "up"}
    needs |= {"gate_bias": "gate", "after_weight": "up", "after_bias": "after_weight"}
    for part in slot.parts:
        if needs.get(part, part) not in parts:
            raise SlotError(f"part {part!r} of a slot needs {needs[part]!r}")
    if not parts:
        raise SlotError(f"slot {slot.name!r} has no parts")
    if bool(slot.norm_after) != ("after_weight" in parts) or (
        slot.norm and "down" not in parts
    ):
        raise SlotError(f"slot {slot.name!r}: a normalisation does not fit its parts")
    if slot.norm_after == "sum" and slot.swappable:
        raise SlotError(
            "a normalisation of the sum cannot be switched off", hint="insert it --baked"
        )
    if slot.axis == 1 and (parts - _CHANNEL_PARTS or slot.norm):
        raise SlotError("norm and gate are defined on the last axis, not on channels")
    if opset < 7:
        raise SlotError(
            f"the model uses opset {opset}; slots need 7 or newer",
            hint="convert it with onnx.version_converter",
        )


def part_shape(slot: Slot, part: str, bottleneck: int) -> tuple[int, ...]:
    """The shape of one weight for a given bottleneck.

    `down` is `(source_width, r)` and `up` is `(r, width)`; on a channel axis they are
    `(r, source_width, 1, ...)` and `(width, r, 1, ...)` as Conv has them.
    """
    wide, source, r = slot.width, slot.source_width, bottleneck
    ones = (1,) * (slot.rank - 2) if slot.axis == 1 else ()
    shapes: dict[str, tuple[int, ...]] = {
        "down": (r, source, *ones) if slot.axis == 1 else (source, r),
        "up": (wide, r, *ones) if slot.axis == 1 else (r, wide),
        "down_bias": (r,),
        "up_bias": (wide,),
        "scale": (wide, *ones),
        "gain": (wide, *ones),
        "norm_weight": (source,),
        "norm_bias": (source,),
        "gate": (source, 1),
        "gate_bias": (1,),
        "after_weight": (wide,),
        "after_bias": (wide,),
    }
    return shapes[part]


def bottleneck_axis(slot: Slot, part: str) -> int | None:
    """The axis of a weight that is the bottleneck, or None."""
    axes = {"down": 0, "up": 1} if slot.axis == 1 else {"down": 1, "up": 0}
    return {**axes, "down_bias": 0}.get(part)


def neutral_weights(slot: Slot, bottleneck: int = 0) -> dict[str, Array]:
    """Weights with which the slot's output is its target, by part."""
    ones = {"scale", "gain", "norm_weight", "after_weight"}
    dtype = DTYPES[slot.dtype]
    return {
        part: np.full(part_shape(slot, part, bottleneck), part in ones, dtype)
        for part in slot.parts
    }


def fresh_weights(slot: Slot, bottleneck: int, rng: np.random.Generator) -> dict[str, Array]:
    """Weights to train from: `up` is zero, so the slot starts as the identity.

    `down` is Kaiming-uniform as `torch.nn.Linear` has it (a = sqrt(5)): uniform in
    +-1/sqrt(fan_in).
    """
    weights = neutral_weights(slot, bottleneck)
    if "down" in weights:
        bound = slot.source_width**-0.5
        drawn = rng.uniform(-bound, bound, weights["down"].shape)
        weights["down"] = drawn.astype(weights["down"].dtype)
    return weights


def slot_nodes(
    slot: Slot, opset: int, norm: onnx.NodeProto | None = None
) -> list[onnx.NodeProto]:
    """The nodes of a slot, from `slot.inner` and `slot.source` to `slot.output`.

    Args:
        slot: The slot.
        opset: Version of the model's default operator set.
        norm: The base's normalisation node that `slot.norm` means.
    """
    emit = Emitter(f"adapter.{slot.name}", opset, slot.dtype)
    w = {part: slot.weight(part) for part in slot.parts}
    out = emit.node("Mul", slot.inner, w["scale"], label="scaled") if "scale" in w else ""
    if "down" in w:
        term = _emit_term(emit, slot, w, norm)
        out = emit.node("Add", out or slot.inner, term, label="sum")
    if slot.norm_after == "sum":
        out = _emit_norm(emit, out, w["after_weight"], w.get("after_bias", ""), "after")
    emit.nodes[-1].output[0] = slot.output
    for node in emit.nodes:
        node.metadata_props.add(key=SLOT_KEY, value=slot.name)
    return emit.nodes


def _emit_term(
    emit: Emitter, slot: Slot, w: dict[str, str], norm: onnx.NodeProto | None
) -> str:
    x = slot.source
    if norm is not None:
        again = onnx.NodeProto()
        again.CopyFrom(norm)
        again.name = f"{emit.prefix}/norm"
        again.input[0] = x
        del again.output[1:], again.metadata_props[:]
        again.output[0] = x = again.name
        emit.nodes.append(again)
    if "norm_weight" in w:
        x = _emit_norm(emit, x, w["norm_weight"], w.get("norm_bias", ""), "norm_own")
    x = _emit_projection(emit, slot, x, w["down"], w.get("down_bias", ""), "down")
    x = ACTIVATIONS[slot.activation][0](emit, x)
    x = _emit_projection(emit, slot, x, w["up"], w.get("up_bias", ""), "up")
    if "gain" in w:
        x = emit.node("Mul", x, w["gain"], label="gained")
    if "gate" in w:
        x = emit.node("Mul", x, _emit_gate(emit, slot.source, w), label="gated")
    if slot.norm_after == "term":
        x = _emit_norm(emit, x, w["after_weight"], w.get("after_bias", ""), "after")
    return x


def _emit_projection(
    emit: Emitter, slot: Slot, x: str, weight: str, bias: str, label: str
) -> str:
    if slot.axis == 1:
        return emit.node("Conv", x, weight, *([bias] if bias else []), label=label)
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


def _emit_norm(emit: Emitter, x: str, weight: str, bias: str, label: str) -> str:
    if emit.opset >= 17:
        inputs = [x, weight, bias] if bias else [x, weight]
        return emit.node("LayerNormalization", *inputs, label=label, axis=-1, epsilon=EPSILON)
    if emit.opset < 11:
        raise SlotError(
            f"a normalisation inside a slot needs opset 11; the model uses {emit.opset}",
            hint="convert it with onnx.version_converter",
        )
    x = emit.node("Sub", x, _emit_mean(emit, x, -1))
    variance = _emit_mean(emit, emit.node("Mul", x, x), -1)
    deviation = emit.node("Sqrt", emit.node("Add", variance, emit.number(EPSILON)))
    x = emit.node("Mul", emit.node("Div", x, deviation), weight, label=label)
    return emit.node("Add", x, bias) if bias else x


def slot_value(
    slot: Slot,
    target: Array,
    source: Array,
    weights: Mapping[str, Array],
    norm: Norm | None = None,
) -> Array:
    """The oracle: what a slot's output is, in float64.

    Args:
        slot: The slot.
        target: `(batch, ..., width)`, or `(batch, width, ...)` on a channel axis.
        source: The same with `source_width`.
        weights: The slot's weights by part.
        norm: The base's normalisation that `slot.norm` means.

    Returns:
        An array of `target`'s shape.
    """
    w = {part: np.asarray(weights[part], np.float64) for part in slot.parts}
    x, y = source.astype(np.float64), target.astype(np.float64)
    if slot.axis == 1:
        x, y = np.moveaxis(x, 1, -1), np.moveaxis(y, 1, -1)
        w = {part: _flat(part, value) for part, value in w.items()}
    out = y * w["scale"] if "scale" in w else y
    if "down" in w:
        out = out + _term(slot, x, w, norm)
    if slot.norm_after == "sum":
        out = Norm(w["after_weight"], w.get("after_bias"))(out)
    return np.moveaxis(out, -1, 1) if slot.axis == 1 else out


def _flat(part: str, value: Array) -> Array:
    """A Conv-layout weight in the layout of the formula."""
    flat = value.reshape(value.shape[: 2 if part in ("down", "up") else 1])
    return flat.T if part in ("down", "up") else flat


def _term(slot: Slot, x: Array, w: dict[str, Array], norm: Norm | None) -> Array:
    gate = x
    if norm is not None:
        x = norm(x)
    if "norm_weight" in w:
        x = Norm(w["norm_weight"], w.get("norm_bias"))(x)
    hidden = ACTIVATIONS[slot.activation][1](x @ w["down"] + w.get("down_bias", 0))
    term = (hidden @ w["up"] + w.get("up_bias", 0)) * w.get("gain", 1)
    if "gate" in w:
        opening = ACTIVATIONS["sigmoid"][1](gate @ w["gate"] + w.get("gate_bias", 0))
        term = term * opening.mean(1, keepdims=True)
    if slot.norm_after == "term":
        term = Norm(w["after_weight"], w.get("after_bias"))(term)
    return term
