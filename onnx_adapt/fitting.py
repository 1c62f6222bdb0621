"""Whether an adapter fits a model, and whether a model's slots are still whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx

from onnx_adapt import walk
from onnx_adapt.activations import DTYPES, Array
from onnx_adapt.adapter import Adapter, same_base
from onnx_adapt.errors import AdapterError, AdaptError, SlotError
from onnx_adapt.graph import FLOATS
from onnx_adapt.initializers import check_model_weights
from onnx_adapt.manifest import Manifest, OpenWeight, Slot, read_manifest, slot_of
from onnx_adapt.model_file import Model
from onnx_adapt.slot import bottleneck_axis, part_shape


def required_manifest(model: Model) -> Manifest:
    """The manifest of a model that must have slots.

    Raises:
        SlotError: If it has none.
    """
    manifest = read_manifest(model.proto)
    if manifest is None:
        raise SlotError(
            f"{model.label} has no slots", hint="`onnx-adapt insert` puts some into it"
        )
    return manifest


def misfits(model: Model, adapter: Adapter, *, allow_partial: bool = False) -> list[str]:
    """Why an adapter cannot be used with a model; empty if it can.

    Args:
        model: A model with slots.
        adapter: The adapter.
        allow_partial: Do not mind slots that the adapter has no weights for.

    Raises:
        SlotError: If the model has no slots.
    """
    manifest = required_manifest(model)
    found: list[str] = []
    if adapter.fingerprint and not same_base(adapter.fingerprint, manifest.fingerprint):
        found.append(
            "it was made for another base model: its fingerprint is "
            f"{adapter.fingerprint[:19]}..., the model's {manifest.fingerprint[:19]}..."
        )
    slots = {slot.name: slot for slot in manifest.slots}
    found += [
        f"the model has no slot {name!r}" for name in adapter.weights if name not in slots
    ]
    for name, slot in slots.items():
        if name in adapter.weights:
            found += _slot_misfits(slot, adapter)
        elif not allow_partial:
            found.append(f"it has no weights for slot {name!r}")
    found += _replaced_misfits(model, manifest.weights, adapter, allow_partial=allow_partial)
    found += [f"{key!r} holds NaN or infinity" for key, value in _odd(adapter)]
    return found


def _odd(adapter: Adapter) -> Iterator[tuple[str, Array]]:
    for key, value in adapter.feeds().items():
        if not np.isfinite(value.astype(np.float64)).all():
            yield key, value


def _slot_misfits(slot: Slot, adapter: Adapter) -> Iterator[str]:
    weights = adapter.weights[slot.name]
    missing = [part for part in slot.parts if part not in weights]
    extra = [part for part in weights if part not in slot.parts]
    if missing or extra:
        yield (
            f"slot {slot.name!r} has the parts {', '.join(slot.parts)}; the adapter has "
            f"{', '.join(sorted(weights))}"
        )
        return
    trained = adapter.activations.get(slot.name, slot.activation)
    if trained != slot.activation:
        yield f"slot {slot.name!r} computes {slot.activation}, the adapter needs {trained}"
    sizes: dict[str, int] = {}
    for part in slot.parts:
        value, axis = weights[part], bottleneck_axis(slot, part)
        size = slot.bottleneck
        if axis is not None and not size and value.ndim > axis:
            size = sizes[part] = value.shape[axis]
        expected = part_shape(slot, part, size)
        if value.shape != expected:
            yield f"{slot.weight(part)!r} has shape {list(value.shape)}, not {list(expected)}"
        if value.dtype != DTYPES[slot.dtype]:
            yield f"{slot.weight(part)!r} is {value.dtype}, the slot {slot.dtype}"
    if len(set(sizes.values())) > 1:
        yield f"the weights for slot {slot.name!r} have different bottlenecks: {sizes}"


def _replaced_misfits(
    model: Model, weights: Sequence[OpenWeight], adapter: Adapter, *, allow_partial: bool
) -> Iterator[str]:
    known = {weight.name for weight in weights}
    stored = {t.name: t for t in model.proto.graph.initializer if t.name in known}
    for name, value in adapter.replaced.items():
        if name not in stored:
            yield f"the model has no replaceable weight {name!r}"
            continue
        tensor = stored[name]
        if value.shape != tuple(tensor.dims):
            yield f"{name!r} has shape {list(value.shape)}, not {list(tensor.dims)}"
        if str(value.dtype) != FLOATS.get(tensor.data_type):
            yield f"{name!r} is {value.dtype}, the model's {FLOATS.get(tensor.data_type)}"
    if not allow_partial:
        yield from (f"it has no {name!r}" for name in known if name not in adapter.replaced)


def require_fit(model: Model, adapter: Adapter, *, allow_partial: bool = False) -> None:
    """Raise unless an adapter fits a model.

    Raises:
        AdapterError: With the first misfits.
    """
    found = misfits(model, adapter, allow_partial=allow_partial)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise AdapterError(
            f"adapter {adapter.name!r} does not fit {model.label}: "
            + "; ".join(found[:3])
            + more,
            hint="`onnx-adapt check` lists everything; --allow-partial leaves slots without "
            "weights off",
        )


def overlaps(adapters: Sequence[Adapter]) -> list[str]:
    """Slots and weights that two of several adapters both have."""
    owner: dict[str, str] = {}
    found = []
    for adapter in adapters:
        for key in adapter.feeds():
            if key in owner:
                found.append(f"{key!r} is in adapter {owner[key]!r} and in {adapter.name!r}")
            owner[key] = adapter.name
    return found


def damages(model: Model) -> list[str]:
    """What other tools did to the slots of a model; empty if they are whole.

    Raises:
        SlotError: If the model has no slots.
    """
    manifest = required_manifest(model)
    found: list[str] = []
    try:
        check_model_weights(model.proto, manifest)
    except AdaptError as error:
        found.append(f"{error.message} ({error.hint})")
    present = {
        slot_of(node) for scope in walk.scopes(model.proto.graph) for node in scope.graph.node
    }
    found += [
        f"slot {slot.name!r}: its nodes have lost their mark or are gone"
        for slot in manifest.slots
        if slot.name not in present
    ]
    found += _shared_symbols(model.proto, manifest.slots)
    found += _stale_types(model.proto)
    return found


def _shared_symbols(proto: onnx.ModelProto, slots: Sequence[Slot]) -> Iterator[str]:
    """ONNX Runtime plans memory by symbols: two slots must not share one."""
    owner: dict[str, str] = {}
    declared = {value.name: value for value in proto.graph.input}
    for slot in slots:
        for part in slot.parts:
            value = declared.get(slot.weight(part))
            for dim in value.type.tensor_type.shape.dim if value else ():
                if dim.dim_param and owner.setdefault(dim.dim_param, slot.name) != slot.name:
                    yield (
                        f"slots {owner[dim.dim_param]!r} and {slot.name!r} share the symbolic "
                        f"dimension {dim.dim_param!r}"
                    )


def _stale_types(proto: onnx.ModelProto) -> Iterator[str]:
    """Recorded shapes inside slots with the empty default baked in."""
    for scope in walk.scopes(proto.graph):
        for value in scope.graph.value_info:
            dims = value.type.tensor_type.shape.dim
            empty = any(dim.HasField("dim_value") and dim.dim_value == 0 for dim in dims)
            if value.name.startswith("adapter.") and empty:
                yield (
                    f"the recorded shape of {value.name!r} has the empty bottleneck in it; "
                    "drop the model's value_info"
                )
