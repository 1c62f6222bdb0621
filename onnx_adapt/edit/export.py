"""Export a model with slots for runtimes that cannot replace an initializer."""

from __future__ import annotations

from dataclasses import replace

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.edit.weights import check_model_weights, drop_named, read_weights
from onnx_adapt.errors import SlotError
from onnx_adapt.model.file import Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.slot.manifest import Manifest, write_manifest
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.required import default_tensors, must_be_fed, neutral_slot
from onnx_adapt.slot.weights import is_empty, is_off, neutral_rows


def export(model: ModelLike, *, name: str = "neutral") -> tuple[Model, Adapter]:
    """Make the weights of slots inputs that must be fed, for runtimes that need them so.

    The result has no default for them, so every run feeds an adapter. The neutral one, with
    which the model computes its base, is returned beside it. It has a bottleneck of 1,
    because some runtimes have no empty tensors; other adapters may bring any bottleneck.
    `verify`, `check`, `fill`, `remove` and `AdapterSession` take the result as they take
    the model itself, and `fill` gives the slots their defaults back.

    Args:
        model: A model with swappable slots that are off; it is left as it was.
        name: The name of the neutral adapter.

    Returns:
        The model, and the adapter to feed where no other is chosen.

    Raises:
        SlotError: If the slots are damaged, baked, filled or exported already.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> model, neutral = oa.export(oa.insert(base, after="conv2d_5"))
        >>> [value.name for value in model.proto.graph.input]
        ['input_1', 'adapter.conv2d_5.down', 'adapter.conv2d_5.up']
        >>> neutral.weights["conv2d_5"]["down"].shape
        (1, 32, 1, 1)
        >>> oa.remove(model).proto == base.proto
        True
    """
    model = as_model(model)
    manifest = required_manifest(model)
    check_model_weights(model.proto, manifest)
    _refuse(model, manifest)
    return require_feeds(model), _neutral(model, manifest, name)


def require_feeds(model: Model) -> Model:
    """Take the defaults of swappable slots and weights out of a model.

    The values of replaceable weights stay under another name, so that `remove` can restore
    the base byte for byte.
    """
    manifest = required_manifest(model)
    result = model.copy()
    graph = result.proto.graph
    slots = tuple(replace(slot, required=slot.swappable) for slot in manifest.slots)
    drop_named(graph.initializer, {name for s in slots if s.required for name in s.inputs})
    taken = {tensor.name for tensor in graph.initializer}
    swappable = [weight for weight in manifest.weights if weight.swappable]
    kept = {}
    for weight, tensor in default_tensors(result.proto, swappable).items():
        tensor.name = kept[weight] = _free_name(f"{weight}.default", taken)
    weights = tuple(replace(w, default=kept.get(w.name, "")) for w in manifest.weights)
    write_manifest(result.proto, replace(manifest, slots=slots, weights=weights))
    return result


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _neutral(model: Model, manifest: Manifest, name: str) -> Adapter:
    """The defaults of the model as an adapter; those of empty slots get a bottleneck of 1."""
    slots = [slot for slot in owners(manifest.slots) if slot.swappable]
    stored = read_weights(model, slots)
    weights = {
        slot.name: neutral_slot(slot)
        if is_empty(slot, stored[slot.name])
        else {**stored[slot.name], **neutral_rows(slot)}
        for slot in slots
    }
    swappable = [weight for weight in manifest.weights if weight.swappable]
    defaults = default_tensors(model.proto, swappable)
    replaced = {key: read_tensor(model, tensor) for key, tensor in defaults.items()}
    activations = {slot.name: slot.activation for slot in slots}
    return Adapter(name, weights, replaced, activations, manifest.fingerprint)


def _refuse(model: Model, manifest: Manifest) -> None:
    """Refuse a model whose slots cannot be fed, are fed already, or hold an adapter."""
    slots = [slot for slot in owners(manifest.slots) if slot.swappable]
    weights = [weight for weight in manifest.weights if weight.swappable]
    if must_be_fed(manifest):
        raise SlotError(
            f"{model.label} is exported already: the weights of its slots must be fed",
            hint="use it as it is",
        )
    if not slots and not weights:
        raise SlotError(
            f"the slots of {model.label} are baked: their weights are constants",
            hint="such a model needs no feeds and runs everywhere as it is",
        )
    stored = read_weights(model, slots)
    full = [slot.name for slot in slots if not is_off(stored[slot.name])]
    full += [weight.name for weight in weights if weight.trained]
    if full:
        raise SlotError(
            f"{model.label} is filled: {full[0]!r} has trained weights, which would be lost",
            hint="export the model from before `fill`; `onnx-adapt extract` writes the "
            "adapter that is in this one",
        )
