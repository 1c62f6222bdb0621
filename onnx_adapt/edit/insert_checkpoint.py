"""Insert the slots of a trained checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.edit.base_weights import make_replaceable
from onnx_adapt.edit.graft import insert_slots, manifest_of
from onnx_adapt.errors import ArgumentError, SlotError
from onnx_adapt.graph.index import ModelIndex, index_model
from onnx_adapt.graph.replaceable import ReplacementPlan
from onnx_adapt.graph.written_out import unfuse
from onnx_adapt.model.file import PROTOBUF_LIMIT, Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.model.tensors import tensor_of
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.places import owners, refuse_stacking
from onnx_adapt.slot.weights import bottleneck_of, neutral_weights

if TYPE_CHECKING:
    from onnx_adapt.checkpoints.load import Checkpoint  # slow to import, and mostly not needed


def insert_checkpoint(
    model: ModelLike,
    checkpoint: Checkpoint,
    *,
    baked: bool = False,
    batched: bool = False,
    stack: bool = True,
) -> Model:
    """Insert the slots that a trained checkpoint needs.

    The checkpoint brings its own places and parts. The slots are empty, so the model gives
    the base's outputs until `checkpoint.adapter` is fed or filled in; with `baked` they
    hold the trained weights.

    Args:
        model: The model that the checkpoint was loaded for; it is left as it was.
        checkpoint: What `load_checkpoint` returned.
        baked: Put the trained weights into the model as constants.
        batched: Let one run give each row of a batch another adapter.
        stack: Insert behind slots that are at a place already; if not, that is refused.

    Raises:
        SiteRefusedError: If a place has a slot; `convert` makes another adapter for that.
        SlotError: If the checkpoint was loaded for another model, the slots cannot be
            batched, or the weights to bake in pass 2 GB.

    Example:
        >>> import onnx_adapt as oa
        >>> case = "tests/cases/peft_bert_lora_default_ts"
        >>> base = oa.open_model(case + "/base.onnx")
        >>> trained = oa.load_checkpoint(case + "/adapter", base)
        >>> len(oa.list_slots(oa.insert_checkpoint(base, trained)))
        4
    """
    model = as_model(model)
    known = manifest_of(model)
    if not isinstance(getattr(checkpoint, "adapter", None), Adapter):
        raise ArgumentError(
            f"{type(checkpoint).__name__} is no checkpoint for this model",
            hint="load it first: oa.load_checkpoint(path, model)",
        )
    if checkpoint.base != known.fingerprint:
        raise SlotError(
            "the checkpoint was loaded for another model", hint="load it for this one"
        )
    if checkpoint.adapter.initial_state:
        raise SlotError(
            f"adapter {checkpoint.adapter.name!r} needs no slots: it is the first past of a "
            "decoder, and AdapterSession feeds it to the model as it is",
            hint="make its file with `onnx-adapt convert CHECKPOINT --for MODEL.onnx -o "
            "NAME.safetensors`, or save_adapter",
        )
    if baked:
        _refuse_large(checkpoint.adapter)
    if not stack:
        refuse_stacking(known.slots, checkpoint.slots)
    result, unfused = unfuse(model.copy(), checkpoint.unfused, known.slots, known.unfused)
    known = replace(known, unfused=unfused)
    adapter = checkpoint.adapter
    plans = [_baked_plan(o, adapter) if baked else o for o in checkpoint.replacements]
    index = index_model(result)
    slots = _baked_slots(checkpoint) if baked else list(checkpoint.slots)
    if batched:
        slots = [replace(s, batched=True, rank=_rank(index, s)) for s in slots]
    weights = {
        s.name: adapter.weights[s.name] if baked else neutral_weights(s) for s in owners(slots)
    }
    make_replaceable(result.proto, plans)
    weights_of_base = (*known.weights, *(plan.weight for plan in plans))
    return insert_slots(result, index, replace(known, weights=weights_of_base), slots, weights)


def _baked_slots(checkpoint: Checkpoint) -> list[Slot]:
    """The slots of a checkpoint, each with the bottleneck of its trained weights."""
    weights = checkpoint.adapter.weights
    return [
        replace(slot, swappable=False, bottleneck=bottleneck_of(slot, weights[slot.owner]))
        for slot in checkpoint.slots
    ]


def _refuse_large(adapter: Adapter) -> None:
    """Refuse trained weights that no model file holds."""
    if adapter.size > PROTOBUF_LIMIT:
        raise SlotError(
            f"the trained weights are {adapter.size / 1e9:.1f} GB, and a model that they are "
            "baked into cannot pass protobuf's 2 GB",
            hint="insert them swappable: then they are a file of their own",
        )


def _rank(index: ModelIndex, slot: Slot) -> int:
    """The number of axes of a slot's tensor, or 0 if it is unknown."""
    return len(index.views[slot.graph].type_of(slot.tensor).shape or ())


def _baked_plan(plan: ReplacementPlan, adapter: Adapter) -> ReplacementPlan:
    """Plan to replace a weight by its trained value; the base's stays for `remove`."""
    weight = replace(plan.weight, copied=True, swappable=False, trained=True)
    value = tensor_of(weight.name, adapter.replaced[weight.name])
    return replace(plan, weight=weight, default=value)
