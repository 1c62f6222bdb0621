"""Remove slots from a model; without any slot it is the base again, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx_adapt.edit.base_weights import undo_replaceable
from onnx_adapt.edit.export import require_feeds
from onnx_adapt.edit.graft import remove_nodes
from onnx_adapt.edit.heads import remove_heads
from onnx_adapt.edit.insert import list_slots
from onnx_adapt.edit.ranges import undo_widening
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.edit.unfuse import names_now, still_needed, undo_unfusing
from onnx_adapt.edit.weight_inputs import undo_dropped_inputs
from onnx_adapt.edit.weights import check_model_weights, drop_weights
from onnx_adapt.errors import SlotError
from onnx_adapt.model.externalise import internalise
from onnx_adapt.model.file import Model
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.slot.manifest import read_manifest, write_manifest
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.required import must_be_fed


def remove(model: ModelLike, *, slots: str | Sequence[str] | None = None) -> Model:
    """Remove slots from a model; when the last one is gone it is the base again.

    Args:
        model: The model; it is left as it was.
        slots: Names of slots, each of which goes from all its places; by default all.

    Raises:
        SlotError: If the model has no such slots, or another tool damaged them.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> adapted = oa.insert(base, after="conv2d_5")
        >>> oa.remove(adapted).proto == base.proto
        True
    """
    model = as_model(model)
    manifest = read_manifest(model.proto)
    if manifest is None:
        raise SlotError(f"{model.label} has no slots", hint="there is nothing to remove")
    slots = [slots] if isinstance(slots, str) else slots
    by_name = {slot.name: slot for slot in owners(manifest.slots)}
    for name in slots or ():
        if name not in by_name:
            raise SlotError(f"no slot is called {name!r}", hint=f"slots: {', '.join(by_name)}")
    check_model_weights(model.proto, manifest)
    if must_be_fed(manifest):
        result = remove(with_defaults(model), slots=slots)
        return require_feeds(result) if list_slots(result) else result
    doomed = set(by_name if slots is None else slots)
    everywhere = {slot.name for slot in manifest.slots if slot.owner in doomed}
    result = model.copy()
    kept = remove_nodes(result.proto, manifest.slots, everywhere)
    drop_weights(result.proto, [by_name[name] for name in doomed])
    if kept:
        apart = still_needed(result.proto, manifest.unfused, kept)
        together = [item for item in manifest.unfused if item not in apart]
        remaining = replace(manifest, slots=kept, unfused=apart)
        undo_unfusing(result.proto, together, names_now(remaining))
        write_manifest(result.proto, remaining)
        return result
    undo_unfusing(result.proto, manifest.unfused)
    remove_heads(result.proto, manifest.heads)
    undo_replaceable(result.proto, manifest.weights)
    undo_widening(result.proto, manifest.widened)
    undo_dropped_inputs(result.proto, manifest.inputs)
    write_manifest(result.proto, None)
    result.proto.ir_version = manifest.ir_version
    if not manifest.ir_version:
        result.proto.ClearField("ir_version")  # the base had none
    payloads = internalise(model.path, result.proto, model.payloads)
    return replace(result, payloads=payloads, canonical=manifest.canonical)


def written_out_base(model: Model) -> Model:
    """Take the slots out of a model, and leave written out what was fused in its base.

    Raises:
        SlotError: If another tool damaged the slots.
    """
    manifest = read_manifest(model.proto)
    if manifest is None or not manifest.unfused:
        return remove(model)
    plain = model.copy()
    write_manifest(plain.proto, replace(manifest, unfused=()))
    return remove(plain)


def base_notes(adapted: Model, result: Model) -> list[str]:
    """Explain why the result of `remove` is not the base byte for byte; empty if it is.

    Raises:
        ModelFileError: If data of the model cannot be read.
    """
    manifest = read_manifest(adapted.proto)
    if manifest is None or list_slots(result):
        return []
    notes = []
    if manifest.inlined:
        notes.append("the base's functions were inlined on insertion and stay inlined")
    elif fingerprint(result) != manifest.fingerprint:
        notes.append("the model was changed after the slots were inserted; the changes stay")
    if not manifest.canonical:
        notes.append("the base's file was not encoded as protobuf encodes it; this one is")
    return notes
