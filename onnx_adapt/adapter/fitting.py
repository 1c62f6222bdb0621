"""Check whether an adapter fits a model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from onnx_adapt.adapter.data import Adapter, same_base
from onnx_adapt.dtypes import DTYPES, FLOATS
from onnx_adapt.errors import AdapterError, SlotError, UncheckedWarning
from onnx_adapt.slot.base_changes import ReplaceableWeight
from onnx_adapt.slot.manifest import Manifest, Slot, read_manifest
from onnx_adapt.slot.parts import part_of
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.required import default_tensors
from onnx_adapt.slot.weights import bottleneck_axis, bottleneck_of, part_shape, row_shape

if TYPE_CHECKING:
    from onnx_adapt.model.file import Model


def required_manifest(model: Model) -> Manifest:
    """Return the manifest of a model that must have slots.

    Raises:
        SlotError: If it has no slots.
    """
    manifest = read_manifest(model.proto)
    if manifest is None:
        raise SlotError(
            f"{model.label} has no slots", hint="`onnx-adapt insert` puts some into it"
        )
    return manifest


Replaceable = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and element type of each weight of the base that adapters may replace."""


def misfits(model: Model, adapter: Adapter, *, allow_partial: bool = False) -> list[str]:
    """List why an adapter cannot be used with a model; the list is empty if it can.

    Args:
        model: A model with slots.
        adapter: The adapter.
        allow_partial: Accept an adapter without weights for some slots.

    Raises:
        SlotError: If the model has no slots.
    """
    manifest = required_manifest(model)
    replaceable = replaceable_of(model, manifest.weights)
    return manifest_misfits(manifest, replaceable, adapter, allow_partial=allow_partial)


def replaceable_of(model: Model, weights: Iterable[ReplaceableWeight]) -> Replaceable:
    """Shape and element type of replaceable weights of a model."""
    found = default_tensors(model.proto, weights)
    return {
        name: (tuple(tensor.dims), FLOATS.get(tensor.data_type, ""))
        for name, tensor in found.items()
    }


def for_file(manifest: Manifest, adapter: Adapter) -> Adapter:
    """What one of several files of a model takes of an adapter that is for all of them.

    It is the adapter itself if it is for one model. A file in another precision takes the
    weights rounded to its own.
    """
    bases = (adapter.fingerprint, *adapter.other_bases)
    if not adapter.other_bases or not any(same_base(b, manifest.fingerprint) for b in bases):
        return adapter
    slots = {slot.name: slot for slot in owners(manifest.slots)}
    weights = {
        name: {p: np.ascontiguousarray(v, DTYPES[slots[name].dtype]) for p, v in parts.items()}
        for name, parts in adapter.weights.items()
        if name in slots
    }
    known = {weight.name for weight in manifest.weights}
    return replace(
        adapter,
        weights=weights,
        replaced={k: v for k, v in adapter.replaced.items() if k in known},
        activations={k: v for k, v in adapter.activations.items() if k in slots},
        stacks={k: v for k, v in adapter.stacks.items() if k in slots},
        fingerprint=manifest.fingerprint,
        other_bases=(),
    )


def manifest_misfits(
    manifest: Manifest,
    replaceable: Replaceable,
    adapter: Adapter,
    *,
    allow_partial: bool = False,
) -> list[str]:
    """List why an adapter cannot be used with a model, from the model's record alone."""
    adapter = for_file(manifest, adapter)
    found: list[str] = []
    if adapter.fingerprint and not same_base(adapter.fingerprint, manifest.fingerprint):
        found.append(
            "it was made for another base model: its fingerprint is "
            f"{adapter.fingerprint[:19]}..., the model's {manifest.fingerprint[:19]}..."
        )
    slots = {slot.name: slot for slot in owners(manifest.slots)}
    found += [
        f"the model has no slot {name!r}" for name in adapter.weights if name not in slots
    ]
    for name, slot in slots.items():
        if name in adapter.weights:
            found += _slot_misfits(slot, adapter)
        elif not allow_partial:
            found.append(f"it has no weights for slot {name!r}")
    if adapter.invocation_tokens:
        found += [
            f"it is on from its invocation tokens on (aLoRA), and slot {name!r} always is"
            for name in adapter.weights
            if name in slots and not slots[name].by_token
        ]
    if len(rows := rows_of(manifest, adapter)) > 1:
        found.append(f"it has values for different numbers of rows: {sorted(rows)}")
    found += _replaced_misfits(replaceable, adapter, allow_partial=allow_partial)
    found += [f"{key!r} holds NaN or infinity" for key in _odd(adapter)]
    return found


def unchecked(manifest: Manifest, adapter: Adapter) -> list[str]:
    """List what an adapter does not say of itself, and so cannot be checked."""
    found = []
    if not adapter.fingerprint:
        found.append("base not checked: the adapter has no fingerprint")
    silent = [
        slot.name
        for slot in owners(manifest.slots)
        if slot.name in adapter.weights and any(part_of(p).projects for p in slot.parts)
        if slot.name not in adapter.activations
    ]
    if silent:
        more = ", ..." if len(silent) > 1 else ""
        found.append(f"activation not checked: the adapter has none for {silent[0]!r}{more}")
    return found


def warn_unchecked(manifest: Manifest, adapter: Adapter, told: set[str]) -> None:
    """Warn, at the line that called the package, of what cannot be checked.

    Args:
        manifest: The record of the model.
        adapter: The adapter.
        told: Warnings that were given before and are not repeated.
    """
    found = unchecked(manifest, adapter)
    message = f"adapter {adapter.name!r}: {'; '.join(found)}; make_adapter stamps both"
    if not found or message in told:
        return
    told.add(message)
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("onnx_adapt."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UncheckedWarning, stacklevel=level)


def _odd(adapter: Adapter) -> Iterator[str]:
    for key, value in adapter.tensors().items():
        if not np.isfinite(value).all():
            yield key


def _slot_misfits(slot: Slot, adapter: Adapter) -> Iterator[str]:
    weights = adapter.weights[slot.name]
    by_row = [part for part in slot.row_parts if part in weights]
    known = (*slot.parts, *(slot.row_parts if by_row else ()))
    missing = [part for part in known if part not in weights]
    extra = [part for part in weights if part not in known]
    if missing or extra:
        yield (
            f"slot {slot.name!r} has the parts {', '.join(known)}; the adapter has "
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
        if axis is not None and value.ndim > axis:
            if size and value.shape[axis] != size:
                yield (
                    f"slot {slot.name!r} has a fixed bottleneck of {size}, the adapter "
                    f"{value.shape[axis]}: insert without --bottleneck for any size"
                )
                return
            size = sizes[part] = value.shape[axis]
        expected = part_shape(slot, part, size)
        if value.shape != expected:
            yield f"{slot.weight(part)!r} has shape {list(value.shape)}, not {list(expected)}"
        if value.dtype != DTYPES[slot.dtype]:
            yield f"{slot.weight(part)!r} is {value.dtype}, the slot {slot.dtype}"
    if len(set(sizes.values())) > 1:
        yield f"the weights for slot {slot.name!r} have different bottlenecks: {sizes}"
    for name in by_row:
        value, size = weights[name], bottleneck_of(slot, {p: weights[p] for p in slot.parts})
        expected = row_shape(slot, name, len(value) if value.ndim else 1, size)
        if value.shape != expected:
            yield f"{slot.weight(name)!r} has shape {list(value.shape)}, not {list(expected)}"
        if value.dtype != DTYPES[slot.dtype]:
            yield f"{slot.weight(name)!r} is {value.dtype}, the slot {slot.dtype}"


def rows_of(manifest: Manifest, adapter: Adapter) -> set[int]:
    """For how many rows an adapter of `pack_rows` has values; empty for any other adapter."""
    return {
        len(value)
        for slot in manifest.slots
        for name in slot.row_parts
        if (value := adapter.weights.get(slot.name, {}).get(name)) is not None and value.ndim
    }


def _replaced_misfits(
    replaceable: Replaceable, adapter: Adapter, *, allow_partial: bool
) -> Iterator[str]:
    for name, value in adapter.replaced.items():
        if name not in replaceable:
            yield f"the model has no replaceable weight {name!r}"
            continue
        shape, dtype = replaceable[name]
        if value.shape != shape:
            yield f"{name!r} has shape {list(value.shape)}, not {list(shape)}"
        if str(value.dtype) != dtype:
            yield f"{name!r} is {value.dtype}, the model's {dtype}"
    if not allow_partial:
        missing = [name for name in replaceable if name not in adapter.replaced]
        yield from (f"it has no {name!r}" for name in missing)


def require_fit(model: Model, adapter: Adapter, *, allow_partial: bool = False) -> None:
    """Raise unless an adapter fits a model.

    Raises:
        AdapterError: With the first three misfits; or if it is the first past of a decoder,
            which is fed and has no weights.
    """
    if adapter.initial_state and not adapter.feeds():
        raise AdapterError(
            f"adapter {adapter.name!r} is the first past of a decoder, and has no weights for "
            f"the slots of {model.label}",
            hint="AdapterSession feeds it; `onnx-adapt run --adapter` shows what it does",
        )
    found = misfits(model, adapter, allow_partial=allow_partial)
    refuse_misfits(found, adapter, model.label)


def refuse_misfits(found: Sequence[str], adapter: Adapter, label: str) -> None:
    """Raise if there are misfits.

    Raises:
        AdapterError: With the first three.
    """
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise AdapterError(
            f"adapter {adapter.name!r} does not fit {label}: " + "; ".join(found[:3]) + more,
            hint="`onnx-adapt check` lists everything; --allow-partial leaves slots without "
            "weights off",
        )


def overlaps(adapters: Sequence[Adapter]) -> list[str]:
    """List slots and weights that are in more than one adapter."""
    owner: dict[str, str] = {}
    found = []
    for adapter in adapters:
        for key in adapter.feeds():
            if key in owner:
                found.append(f"{key!r} is in adapter {owner[key]!r} and in {adapter.name!r}")
            owner[key] = adapter.name
    return found
