"""Slots whose weights must be fed, because the model has no default for them.

`edit/export.py` makes such models. Runtimes that cannot replace an initializer run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from onnx_adapt.dtypes import Array
from onnx_adapt.slot.base_changes import ReplaceableWeight
from onnx_adapt.slot.manifest import Manifest, Slot
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.weights import neutral_rows, neutral_weights

if TYPE_CHECKING:
    import onnx


def neutral_slot(slot: Slot) -> dict[str, Array]:
    """Weights by part that turn a slot off, none of them empty; rows of a batch included.

    The bottleneck is 1 unless it is fixed, because some runtimes have no empty tensors. A
    bottleneck of width 768 has `down` of `(768, 1)` and `up` of `(1, 768)`, all zero.
    """
    return {**neutral_weights(slot, slot.bottleneck or 1), **neutral_rows(slot)}


def neutral_feeds(slots: Iterable[Slot]) -> dict[str, Array]:
    """What to feed to the slots that must be fed, so that they are off, by input name."""
    return {
        slot.weight(part): value
        for slot in owners(slots)
        if slot.required
        for part, value in neutral_slot(slot).items()
    }


def required_feeds(
    manifest: Manifest | None, base_values: Callable[[], Mapping[str, Array]]
) -> dict[str, Array]:
    """What to feed to a model beside its own inputs, so that it computes its base.

    It is empty for a model that has its defaults.

    Args:
        manifest: The model's record, or None if it has no slots.
        base_values: Reads the base's own values of replaceable weights; it is called where
            the model has no default for some of them.
    """
    if manifest is None:
        return {}
    kept = [weight.name for weight in manifest.weights if weight.default]
    base = base_values() if kept else {}
    return {**neutral_feeds(manifest.slots), **{name: base[name] for name in kept}}


def must_be_fed(manifest: Manifest) -> bool:
    """Whether the model of a record needs its weights fed in every run."""
    return any(slot.required for slot in manifest.slots) or any(
        weight.default for weight in manifest.weights
    )


def default_tensors(
    proto: onnx.ModelProto, weights: Iterable[ReplaceableWeight]
) -> dict[str, onnx.TensorProto]:
    """The initializers that hold the defaults of replaceable weights, by the weight's name."""
    names = {weight.default or weight.name: weight.name for weight in weights}
    stored = proto.graph.initializer
    return {names[tensor.name]: tensor for tensor in stored if tensor.name in names}
