"""Whether an adapter fits a model, and whether a model's slots are still whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx

from onnx_adapt import walk
from onnx_adapt.activations import DTYPES, Array
from onnx_adapt.adapter import Adapter, same_base
from onnx_adapt.errors import AdapterError, AdaptError, SlotError
from onnx_adapt.graph import FLOATS, default_opset, elem_name
from onnx_adapt.initializers import check_model_weights
from onnx_adapt.manifest import Manifest, OpenWeight, Slot, read_manifest, slot_of
from onnx_adapt.model_file import Model
from onnx_adapt.norms import own_norm
from onnx_adapt.slot import bottleneck_axis, part_shape, slot_nodes


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
    lost = _lost_record(model)
    if lost:
        return lost
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
    found += _changed_nodes(model.proto, manifest.slots)
    found += _shared_symbols(model.proto, manifest.slots)
    found += _changed_inputs(model.proto, manifest.slots)
    found += _stale_types(model.proto, manifest.slots)
    return found


def _lost_record(model: Model) -> list[str]:
    """What shows that a model without a manifest once had one."""
    if read_manifest(model.proto) is not None:
        return []
    names = {
        name.removeprefix("adapter.").rpartition("/")[0]
        for scope in walk.scopes(model.proto.graph)
        for name in (str(node.name) for node in scope.graph.node)
        if name.startswith("adapter.") and "/" in name
    }
    if not names:
        return []
    return [
        f"the record of its slots is gone from the model's metadata, and with it "
        f"{', '.join(map(repr, sorted(names)))} (another tool rewrote it; insert again)"
    ]


def _changed_inputs(proto: onnx.ModelProto, slots: Sequence[Slot]) -> Iterator[str]:
    """Inputs of slots that are declared otherwise than they were inserted."""
    declared = {value.name: value.type.tensor_type for value in proto.graph.input}
    for slot in slots:
        for part in slot.parts if slot.swappable else ():
            found = declared.get(slot.weight(part))
            if found is None:
                continue
            if FLOATS.get(found.elem_type) != slot.dtype:
                kind = elem_name(found.elem_type)
                yield f"input {slot.weight(part)!r} is declared as {kind}"
            axis = bottleneck_axis(slot, part)
            fixed = axis is not None and found.shape.dim[axis].HasField("dim_value")
            if fixed and not slot.bottleneck:
                yield (
                    f"slot {slot.name!r} is swappable only for one bottleneck: input "
                    f"{slot.weight(part)!r} was given a fixed size"
                )


def _changed_nodes(proto: onnx.ModelProto, slots: Sequence[Slot]) -> Iterator[str]:
    """Slots whose operators are not those that were inserted."""
    present: dict[str, list[onnx.NodeProto]] = {}
    for scope in walk.scopes(proto.graph):
        for node in scope.graph.node:
            if slot_of(node):
                present.setdefault(slot_of(node), []).append(node)
    for slot in slots:
        nodes = present.get(slot.name, [])
        constants = [node for node in nodes if "/norm_constant_" in node.name]
        wanted = slot_nodes(slot, default_opset(proto), own_norm(nodes))
        there = [node.op_type for node in nodes if node not in constants]
        if nodes and there != [node.op_type for node in wanted]:
            yield f"slot {slot.name!r} has other operators than were inserted: {there}"


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


def _stale_types(proto: onnx.ModelProto, slots: Sequence[Slot]) -> Iterator[str]:
    """Recorded shapes inside slots with the bottleneck of one adapter in them.

    ONNX Runtime believes them and plans memory by them.
    """
    free = {f"adapter.{slot.name}": slot for slot in slots if not slot.bottleneck}
    for scope in walk.scopes(proto.graph):
        for value in scope.graph.value_info:
            slot = free.get(value.name.rpartition("/")[0])
            dims = value.type.tensor_type.shape.dim
            if slot is None or len(dims) < 2:
                continue
            dim = dims[1 if slot.axis == 1 else len(dims) - 1]
            known = {slot.width, slot.source_width}
            if "/down" not in value.name:
                known.add(1)  # means and variances, which are no wider
            if dim.HasField("dim_value") and dim.dim_value not in known:
                yield (
                    f"the recorded shape of {value.name!r} has the bottleneck {dim.dim_value} "
                    "in it; drop the model's value_info"
                )
