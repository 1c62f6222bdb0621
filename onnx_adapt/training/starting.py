"""What trains, and its values before the first step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import for_file, require_fit, required_manifest
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.weights import read_weights
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.slot.manifest import Manifest, Slot
from onnx_adapt.slot.names import weight_name
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.required import default_tensors
from onnx_adapt.slot.weights import fresh_weights, is_off


def slots_to_train(model: Model) -> list[Slot]:
    """The slots of a model whose weights can be fed.

    Raises:
        TrainingError: If there is none, and no replaceable weight either.
    """
    manifest = required_manifest(model)
    slots = [slot for slot in owners(manifest.slots) if slot.swappable]
    if not slots and not any(weight.swappable for weight in manifest.weights):
        raise TrainingError(
            f"the slots of {model.label} are baked, so nothing can be fed to them",
            hint="insert without --baked, train, and fill the result",
        )
    return slots


def weights_to_train(
    model: Model, bottleneck: int, begin: Adapter | None, seed: int
) -> dict[str, Array]:
    """The weights that train, before the first step, by input.

    Args:
        model: A model with slots.
        bottleneck: The bottleneck of slots that have none of their own.
        begin: An adapter to go on from, or None.
        seed: Seed of the random ones.

    Raises:
        AdapterError: If the adapter does not fit.
    """
    slots = slots_to_train(model)
    if begin is not None:
        require_fit(model, begin, allow_partial=True)
        begin = for_file(required_manifest(model), begin)
    stored = read_weights(model, slots)
    rng = np.random.default_rng((seed, 2))
    weights: dict[str, Array] = {}
    for slot in slots:
        made: Mapping[str, Array] = fresh_weights(slot, slot.bottleneck or bottleneck, rng)
        if begin is not None and slot.name in begin.weights:
            made = begin.weights[slot.name]
        elif not is_off(stored[slot.name]):
            made = stored[slot.name]
        weights |= {weight_name(slot.name, part): value for part, value in made.items()}
    return weights | _replaceable(model, required_manifest(model), begin)


def _replaceable(model: Model, manifest: Manifest, begin: Adapter | None) -> dict[str, Array]:
    """The replaceable weights of the base, such as a head, which train as well."""
    swappable = [weight for weight in manifest.weights if weight.swappable]
    stored = default_tensors(model.proto, swappable)
    given = begin.replaced if begin is not None else {}
    return {
        name: given[name] if name in given else read_tensor(model, tensor)
        for name, tensor in stored.items()
    }


def adapter_of(
    name: str, weights: Mapping[str, Array], begun: Mapping[str, Array], model: Model
) -> Adapter:
    """Trained weights as an adapter.

    Args:
        name: The name of the adapter.
        weights: The trained weights, in float32.
        begun: What `weights_to_train` gave, in the element types of the model.
        model: The model.
    """
    manifest = required_manifest(model)
    typed = {key: np.ascontiguousarray(weights[key], begun[key].dtype) for key in begun}
    slots = slots_to_train(model)
    by_slot = {
        slot.name: {part: typed[weight_name(slot.name, part)] for part in slot.parts}
        for slot in slots
    }
    replaced = {w.name: typed[w.name] for w in manifest.weights if w.swappable}
    activations = {slot.name: slot.activation for slot in slots}
    return Adapter(name, by_slot, replaced, activations, manifest.fingerprint)
