"""Whether an adapter can be served for a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import (
    manifest_misfits,
    refuse_misfits,
    replaceable_of,
    required_manifest,
)
from onnx_adapt.errors import AdapterError, SlotError
from onnx_adapt.model.file import Model


def refuse_unfed(adapter: Adapter) -> None:
    """Refuse an adapter that would be without effect, or wrong, by its weights alone."""
    if adapter.invocation_tokens or adapter.initial_state:
        what = "invocation tokens" if adapter.invocation_tokens else "a first past"
        raise AdapterError(f"it has {what}, which onnxruntime-genai does not feed")


def checker(model: Model) -> Callable[[Adapter], None]:
    """What raises an AdapterError unless an adapter fits the swappable slots of a model.

    Raises:
        SlotError: If the model has none.
    """
    manifest = required_manifest(model)
    slots = tuple(slot for slot in manifest.slots if slot.swappable)
    weights = tuple(weight for weight in manifest.weights if weight.swappable)
    if not slots and not weights:
        raise SlotError(
            f"the slots of {model.label} are baked: their weights are constants",
            hint="insert without --baked to swap adapters",
        )
    swappable = replace(manifest, slots=slots, weights=weights)
    replaceable = replaceable_of(model, weights)

    def check(adapter: Adapter) -> None:
        refuse_misfits(manifest_misfits(swappable, replaceable, adapter), adapter, model.label)

    return check
