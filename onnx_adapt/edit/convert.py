"""Convert a trained checkpoint into an adapter for slots that a model already has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import require_fit, required_manifest
from onnx_adapt.checkpoints.load import Checkpoint, load_checkpoint
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.edit.remove import remove
from onnx_adapt.errors import CheckpointError
from onnx_adapt.model.file import Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.model.paths import as_path
from onnx_adapt.slot.manifest import Slot, read_manifest
from onnx_adapt.slot.parts import PARTS
from onnx_adapt.slot.weights import bottleneck_of, neutral_weights, stacks_of


def convert(
    path: str | os.PathLike[str],
    model: ModelLike,
    *,
    name: str = "",
    base_weights: str | os.PathLike[str] | None = None,
    part: str = "",
    module_map: Mapping[str, str] | None = None,
    allow_missing: Sequence[str] = (),
    allow_partial: bool = False,
) -> Adapter:
    """Read a checkpoint as an adapter for a model that has slots for it.

    Args:
        path: The checkpoint, a folder or a file, as `load_checkpoint` takes it.
        model: The model with slots.
        name: The adapter's name; by default AdapterHub's, or that of the folder or file.
        base_weights: The base's weights, for a graph that lost its names.
        part: Only the checkpoint's modules under this path are wanted, and the graph is that
            part of the model.
        module_map: Beginnings of the checkpoint's module paths, and what to call them.
        allow_missing: Globs of the checkpoint's modules that the model may lack.
        allow_partial: Leave slots off that the checkpoint has nothing for.

    Raises:
        CheckpointError: If the checkpoint needs a slot that the model does not have.
        AdapterError: If it leaves slots without weights.

    Example:
        >>> import onnx_adapt as oa
        >>> case = "tests/cases/peft_bert_lora_default_ts"
        >>> base = oa.open_model(case + "/base.onnx")
        >>> checkpoint = oa.load_checkpoint(case + "/adapter", base)
        >>> model = oa.insert_checkpoint(base, checkpoint)
        >>> len(oa.convert(case + "/adapter", model, name="again").weights)
        4
    """
    path, model = as_path(path, "a checkpoint"), as_model(model)
    base = remove(model) if read_manifest(model.proto) else model
    checkpoint = load_checkpoint(
        path,
        base,
        name=name,
        base_weights=base_weights,
        part=part,
        module_map=module_map,
        allow_missing=allow_missing,
    )
    if checkpoint.adapter.initial_state:
        return checkpoint.adapter  # which needs no slots
    adapter = _for_slots(model, checkpoint)
    require_fit(model, adapter, allow_partial=allow_partial)
    return adapter


def _for_slots(model: Model, checkpoint: Checkpoint) -> Adapter:
    """The weights of a checkpoint, for the slots that a model has.

    Raises:
        CheckpointError: If the checkpoint needs a slot that the model does not have.
    """
    manifest = required_manifest(model)
    found = _counterparts(model.label, checkpoint, manifest.slots)
    weights: dict[str, dict[str, Array]] = {}
    activations = {}
    for wanted, slot in found:
        given = checkpoint.adapter.weights[wanted.owner]
        absent = neutral_weights(slot, bottleneck_of(wanted, given))
        converted = {
            part: np.ascontiguousarray(given.get(part, absent[part]), DTYPES[slot.dtype])
            for part in slot.parts
        }
        first = weights.setdefault(slot.owner, converted)
        if any(not np.array_equal(first[part], value) for part, value in converted.items()):
            raise CheckpointError(
                f"slot {slot.owner!r} of {model.label} has one set of weights for several "
                f"places, and the checkpoint has others for {slot.tensor!r}",
                hint=_HINT,
            )
        activations[slot.owner] = wanted.activation
    return replace(
        checkpoint.adapter,
        weights=weights,
        activations=activations,
        fingerprint=manifest.fingerprint,
        stacks=stacks_of(slot for _, slot in found),
    )


_HINT = "insert --adapter makes a model with the slots this checkpoint needs"


def _counterparts(
    label: str, checkpoint: Checkpoint, slots: Sequence[Slot]
) -> list[tuple[Slot, Slot]]:
    """Find the slot of a model for each that a checkpoint wants, place by place.

    Raises:
        CheckpointError: If one is missing, or would act at a place where none is wanted.
    """
    free = list(slots)
    found: list[tuple[Slot, Slot]] = []
    chosen: dict[str, str] = {}
    for wanted in checkpoint.slots:
        slot = _counterpart(wanted, free, chosen.get(wanted.owner, wanted.owner))
        if slot is None:
            raise CheckpointError(
                f"{label} has no slot like {wanted.name!r} at {wanted.tensor!r} with "
                f"the parts {', '.join(wanted.parts)}",
                hint=_HINT,
            )
        free.remove(slot)
        found.append((wanted, slot))
        chosen.setdefault(wanted.owner, slot.owner)
    used = {slot.owner for _, slot in found}
    if idle := [slot for slot in free if slot.owner in used]:
        raise CheckpointError(
            f"slot {idle[0].owner!r} of {label} has one set of weights for several places, "
            f"and the checkpoint changes nothing at {idle[0].tensor!r}",
            hint=_HINT,
        )
    return found


def _counterpart(wanted: Slot, slots: Sequence[Slot], owner: str) -> Slot | None:
    """Find the slot that computes what is wanted; it may have more parts, but not fewer.

    One with the weights of `owner` comes first.
    """
    alike = [slot for slot in slots if _same_form(wanted, slot)]
    alike.sort(key=lambda slot: (slot.owner != owner, slot.name != wanted.name))
    return alike[0] if alike else None


def _same_form(wanted: Slot, slot: Slot) -> bool:
    ours, theirs = (
        (
            s.graph,
            s.tensor,
            s.axis,
            s.width,
            s.source_width,
            s.norm,
            s.norm_after,
            s.window,
            s.readers,
        )
        for s in (slot, wanted)
    )
    own = (slot.source == slot.inner) == (wanted.source == wanted.inner)
    reads = own and (slot.source == slot.inner or slot.source == wanted.source)
    if wanted.by_token and not slot.by_token:
        return False
    fixed = all(PARTS[part].optional for part in set(slot.parts) - set(wanted.parts))
    return ours == theirs and reads and fixed and set(wanted.parts) <= set(slot.parts)
