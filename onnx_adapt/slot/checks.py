"""Refuse slots that have no meaning: parts that do not fit each other, or their place."""

from __future__ import annotations

from collections.abc import Collection

from onnx_adapt.errors import SlotError
from onnx_adapt.slot.activations import ACTIVATIONS
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import PARTS, coupling_parts
from onnx_adapt.slot.weight_update import check_weight_slot


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
    if slot.on_weight:
        check_weight_slot(slot)
    _check_batched(slot)
    _check_by_token(slot)
    coupling = coupling_parts()
    if parts & set(coupling):
        if parts != set(coupling) or slot.width % 2 or slot.axis == 1 or opset < 11:
            raise SlotError(
                f"slot {slot.name!r}: a coupling has all of {', '.join(coupling)}, an even "
                "width on the last axis, and needs opset 11"
            )
        return
    for part in slot.parts:
        needs = PARTS[part].needs
        if needs and parts.isdisjoint(needs):
            raise SlotError(f"part {part!r} of a slot needs {needs[0]!r}")
    if {"table", "down"} <= parts:
        raise SlotError(f"slot {slot.name!r} has both 'table' and 'down'")
    if not parts:
        raise SlotError(f"slot {slot.name!r} has no parts")
    if not _fits_its_form(slot, parts):
        raise SlotError(f"slot {slot.name!r}: its parts do not fit its form")
    last_only = any(PARTS[part].channels is None for part in slot.parts)
    if slot.axis == 1 and (last_only or slot.norm):
        raise SlotError("norm and gate are defined on the last axis, not on channels")
    if opset < 7:
        raise SlotError(
            f"the model uses opset {opset}; slots need 7 or newer",
            hint="convert it with onnx.version_converter",
        )


def _fits_its_form(slot: Slot, parts: Collection[str]) -> bool:
    """Whether the parts agree with the fields that say where a norm or a sum is."""
    return (
        slot.norm_after in ("", "term", "sum")
        and bool(slot.norm_after) == ("after_weight" in parts)
        and (slot.norm_after == "sum") == ("switch" in parts)
        and ("down" in parts or not slot.norm)
        and (bool(slot.plus) or "residual" not in parts)
    )


def _check_batched(slot: Slot) -> None:
    if not slot.batched:
        return
    if other := [part for part in slot.parts if PARTS[part].closed]:
        raise SlotError(
            f"slot {slot.name!r} cannot give each row an adapter: its part {other[0]!r} makes "
            "its term no sum over the bottleneck",
            hint="insert it without --batched; rows are then run by adapter",
        )
    if slot.rank < 2:
        raise SlotError(
            f"slot {slot.name!r} cannot give each row an adapter: the rank of tensor "
            f"{slot.tensor!r} is {slot.rank or 'unknown'}",
            hint="insert it without --batched; rows are then run by adapter",
        )
    if slot.bottleneck or not slot.swappable:
        raise SlotError(
            f"slot {slot.name!r} cannot give each row an adapter: its bottleneck is fixed",
            hint="leave out --bottleneck and --baked, or --batched",
        )


def _check_by_token(slot: Slot) -> None:
    if not slot.by_token:
        return
    if slot.batched:
        raise SlotError(
            f"slot {slot.name!r} is on for some tokens alone, and cannot be batched as well",
            hint="insert it without --batched; rows are then run by adapter",
        )
    if not slot.swappable:
        raise SlotError(
            f"slot {slot.name!r} is on for some tokens alone, and which they are is fed",
            hint="insert it without --baked",
        )
    if slot.on_weight or slot.axis == 1 or slot.rank not in (2, 3) or "down" not in slot.parts:
        raise SlotError(
            f"slot {slot.name!r} cannot be on for some tokens alone: tensor {slot.tensor!r} "
            "is not of the shape (batch, sequence, width)"
        )
