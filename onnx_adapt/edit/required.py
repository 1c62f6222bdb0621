"""Give slots that must be fed their defaults back, so that every edit works on them."""

from __future__ import annotations

from dataclasses import replace

from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import tensor_of
from onnx_adapt.slot.manifest import Slot, read_manifest, write_manifest
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.required import default_tensors, must_be_fed
from onnx_adapt.slot.weights import neutral_rows, neutral_weights


def with_defaults(model: Model) -> Model:
    """Undo `export`: the slots are off when nothing is fed, and the weights are the base's.

    A model whose weights have their defaults is returned as it is.
    """
    manifest = read_manifest(model.proto)
    if manifest is None or not must_be_fed(manifest):
        return model
    result = model.copy()
    for slot in owners(manifest.slots):
        _add_defaults(result, slot)
    for name, tensor in default_tensors(result.proto, manifest.weights).items():
        if tensor.name != name:  # setting a name would make an absent one present
            tensor.name = name
    slots = tuple(replace(slot, required=False) for slot in manifest.slots)
    weights = tuple(replace(weight, default="") for weight in manifest.weights)
    write_manifest(result.proto, replace(manifest, slots=slots, weights=weights))
    return result


def _add_defaults(model: Model, slot: Slot) -> None:
    if not slot.required:
        return
    neutral = {**neutral_weights(slot, slot.bottleneck), **neutral_rows(slot)}
    for part, value in neutral.items():
        model.proto.graph.initializer.append(tensor_of(slot.weight(part), value))
