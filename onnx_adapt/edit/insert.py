"""Insert slots into a model and take them out again."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.inliner

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.edit.base_weights import close_base_weights, open_base_weights
from onnx_adapt.edit.graft import manifest_of, put_in, restore_inputs, take_out
from onnx_adapt.edit.plan import Recipe, plan_slot
from onnx_adapt.edit.ranges import restore_ranges
from onnx_adapt.edit.weights import check_model_weights, drop_weights
from onnx_adapt.errors import AmbiguousSiteError, RunError, SiteError, SlotError
from onnx_adapt.graph.index import ModelIndex, index_model, require_finite
from onnx_adapt.graph.names import free_name, reserved_names
from onnx_adapt.graph.replaceable import Opening
from onnx_adapt.graph.resolve import resolve
from onnx_adapt.graph.sites import Site, Survey, survey_model
from onnx_adapt.model import elsewhere as moved
from onnx_adapt.model.file import Model
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.model.tensors import tensor_of
from onnx_adapt.slot.manifest import Slot, read_manifest, write_manifest
from onnx_adapt.slot.parts import in_order
from onnx_adapt.slot.weights import bottleneck_of, fresh_weights, neutral_weights

BAKED_BOTTLENECK = 64
"""Bottleneck of a baked slot when none is given (Houlsby et al., 2019)."""

if TYPE_CHECKING:
    from onnx_adapt.checkpoints.load import Checkpoint  # slow to import, and mostly not needed

_log = logging.getLogger(__name__)


def insert(
    model: Model,
    *,
    after: str | Sequence[str] = (),
    checkpoint: Checkpoint | None = None,
    activation: str = "relu",
    bias: bool = False,
    parts: Sequence[str] = ("down", "up"),
    source: str = "",
    axis: int | None = None,
    norm: str = "",
    norm_after: str = "",
    bottleneck: int | None = None,
    baked: bool = False,
    batched: bool = False,
    seed: int = 0,
    inline_functions: bool = False,
) -> Model:
    """Insert an adapter slot after each named place.

    A swappable slot computes nothing until weights are fed: the model gives the base's
    outputs. A slot with a fixed bottleneck starts as the identity as well, with random
    `down` and zero `up`. The formula is in `onnx_adapt.slot.formula`.

    Args:
        model: The model; it is left as it was.
        after: Addresses, node names, tensors, module paths or globs.
        checkpoint: Insert the slots of a trained checkpoint instead, from
            `load_checkpoint`; of the other arguments only `batched` applies, and `baked`,
            which puts the trained weights in.
        activation: One of `onnx_adapt.slot.activations.ACTIVATIONS`.
        bias: Add `down_bias` and `up_bias` to the parts.
        parts: The weights each slot has; see `onnx_adapt.slot.parts.PARTS`.
        source: A tensor for the adapter to read in place of the target.
        axis: The feature axis of every place, and of the source: -1 for the last one, or
            1 for channels. By default the one that the operators around a place tell.
        norm: A normalisation of the base, by name, re-applied to the source.
        norm_after: Let the slot's own normalisation wrap the `term` or the `sum`.
        bottleneck: Inner size; by default each adapter brings its own, and a baked slot
            has 64.
        baked: Make the weights constants.
        batched: Let one run give each row of a batch another adapter.
        seed: Seed of the random `down`.
        inline_functions: Inline the model's functions first, to reach inside them.

    Raises:
        SiteError: If a name means nothing, several places, or a place that cannot take
            an adapter.
        SlotError: If the slot itself makes no sense.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> adapted = oa.insert(base, after="mos_estimator_small_1/dense_3/MatMul_add")
        >>> [slot.width for slot in oa.list_slots(adapted)]
        [64]
    """
    if checkpoint is not None:
        if after:
            raise SiteError("a checkpoint brings its own places", hint="leave out `after`")
        return _insert_checkpoint(model, checkpoint, baked=baked, batched=batched)
    if bottleneck is not None and bottleneck < 1:
        raise SlotError(
            f"a bottleneck of {bottleneck} is not possible", hint="give 1 or more, e.g. 64"
        )
    if seed < 0:
        raise SlotError(f"a seed of {seed} is not possible", hint="give 0 or more")
    if isinstance(parts, str):
        parts = (parts,)
    extra = ("down_bias", "up_bias") if bias else ()
    recipe = Recipe(
        activation=activation,
        parts=in_order({*parts, *extra}),
        source=source,
        axis=axis,
        norm=norm,
        norm_after=norm_after,
        swappable=not baked,
        bottleneck=bottleneck or (BAKED_BOTTLENECK if baked else 0),
        seed=seed,
        batched=batched,
    )
    names = [after] if isinstance(after, str) else list(after)
    if not names:
        raise SiteError("no place was named", hint="see `onnx-adapt sites`")
    return _insert(model, names, recipe, inline_functions=inline_functions)


def _insert(
    model: Model, names: list[str], recipe: Recipe, *, inline_functions: bool
) -> Model:
    known = manifest_of(model, inlined=inline_functions and bool(model.proto.functions))
    result = inline_model(model) if inline_functions else model.copy()
    survey = survey_model(result)
    if known.inlined:
        names = [_inlined_name(survey, name) for name in names]
    resolution = resolve(survey, names, axis=recipe.axis)
    for site in resolution.skipped:
        _log.warning("left out %s: %s", site.address, site.reason)
    taken = reserved_names(survey.index)
    slots: list[Slot] = []
    for choice in resolution.choices:
        _tell_axis(survey, choice.site)
        name = free_name(choice.name, taken)
        taken.add(name)
        slots.append(plan_slot(survey, choice, name, recipe))
    rng = np.random.default_rng(recipe.seed)
    weights = {
        slot.name: fresh_weights(slot, slot.bottleneck, rng)
        if slot.bottleneck
        else neutral_weights(slot)
        for slot in slots
    }
    return put_in(result, survey.index, known, slots, weights)


def _tell_axis(survey: Survey, site: Site) -> None:
    """Warn of an axis that the user named and the operators around it do not."""
    told = survey.by_address.get(site.address, site)
    if told.axis not in (None, site.axis):
        _log.warning(
            "%s: the slot is on axis %s as you say; the operators around it say %s",
            *(site.address, site.axis, told.axis),
        )


def _inlined_name(survey: Survey, name: str) -> str:
    """What a name inside a function is after inlining: ONNX's inliner adds `__1`, `__2`."""
    nodes = [node.name for view in survey.index.views.values() for node in view.nodes]
    tensors = [tensor for view in survey.index.views.values() for tensor in view.producers]
    for names in (nodes, tensors):
        if name in names:
            return name
        found = [n for n in names if re.fullmatch(re.escape(name) + r"(__\d+)+", n)]
        if len(found) > 1:
            raise AmbiguousSiteError(
                f"after inlining {name!r} is in the model {len(found)} times: "
                f"{', '.join(found[:8])}",
                hint="name each of them, or use a glob",
            )
        if found:
            return found[0]
    return name


def _insert_checkpoint(
    model: Model, checkpoint: Checkpoint, *, baked: bool, batched: bool
) -> Model:
    """Insert the slots that a trained checkpoint needs."""
    known = manifest_of(model)
    if checkpoint.base != known.fingerprint:
        raise SlotError(
            "the checkpoint was loaded for another model", hint="load it for this one"
        )
    result = model.copy()
    adapter = checkpoint.adapter
    openings = [_baked_opening(o, adapter) if baked else o for o in checkpoint.openings]
    index = index_model(result)
    slots = [
        replace(s, swappable=False, bottleneck=bottleneck_of(s, adapter.weights[s.name]))
        if baked
        else s
        for s in checkpoint.slots
    ]
    if batched:
        slots = [replace(s, batched=True, rank=_rank(index, s)) for s in slots]
    weights = {s.name: adapter.weights[s.name] if baked else neutral_weights(s) for s in slots}
    open_base_weights(result.proto, openings)
    opened = (*known.weights, *(opening.weight for opening in openings))
    return put_in(result, index, replace(known, weights=opened), slots, weights)


def _rank(index: ModelIndex, slot: Slot) -> int:
    """How many axes a slot's tensor has, or 0 if that is unknown."""
    return len(index.views[slot.graph].type_of(slot.tensor).shape or ())


def _baked_opening(opening: Opening, adapter: Adapter) -> Opening:
    """The trained value as a constant; the base's stays beside it, for `remove`."""
    weight = replace(opening.weight, copied=True, swappable=False, trained=True)
    value = tensor_of(weight.name, adapter.replaced[weight.name])
    return replace(opening, weight=weight, default=value)


def inline_model(model: Model) -> Model:
    """The model with its model-local functions inlined.

    Raises:
        RunError: If ONNX cannot inline them.
        ModelFileError: If there would be no end of nodes.
    """
    require_finite(model)
    try:
        proto = onnx.inliner.inline_local_functions(model.proto)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the functions of {model.label} cannot be inlined: {error}",
            hint="export it without functions: torch.onnx.export(..., dynamo=False)",
        ) from error
    return replace(model, proto=proto)


def list_slots(model: Model) -> tuple[Slot, ...]:
    """The slots of a model, in order of insertion, as its manifest has them.

    Raises:
        ManifestError: If the manifest is damaged or too new.

    Example:
        >>> import onnx_adapt as oa
        >>> oa.list_slots(oa.open_model("models/dnsmos-p808.onnx"))
        ()
    """
    manifest = read_manifest(model.proto)
    return manifest.slots if manifest else ()


def remove(model: Model, *, slots: str | Sequence[str] | None = None) -> Model:
    """Take slots out of a model; with the last one the base comes back.

    Args:
        model: The model; it is left as it was.
        slots: Names of slots; by default all.

    Raises:
        SlotError: If the model has no such slots, or another tool damaged them.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> adapted = oa.insert(base, after="conv2d_5")
        >>> oa.remove(adapted).proto == base.proto
        True
    """
    manifest = read_manifest(model.proto)
    if manifest is None:
        raise SlotError(f"{model.label} has no slots", hint="there is nothing to remove")
    slots = [slots] if isinstance(slots, str) else slots
    by_name = {slot.name: slot for slot in manifest.slots}
    for name in slots or ():
        if name not in by_name:
            raise SlotError(f"no slot is called {name!r}", hint=f"slots: {', '.join(by_name)}")
    check_model_weights(model.proto, manifest)
    doomed = set(by_name if slots is None else slots)
    result = model.copy()
    kept = take_out(result.proto, manifest.slots, doomed)
    drop_weights(result.proto, [by_name[name] for name in doomed])
    if kept:
        write_manifest(result.proto, replace(manifest, slots=kept))
        return result
    close_base_weights(result.proto, manifest.weights)
    restore_ranges(result.proto, manifest.widened)
    restore_inputs(result.proto, manifest.inputs)
    write_manifest(result.proto, None)
    result.proto.ir_version = manifest.ir_version
    if not manifest.ir_version:
        result.proto.ClearField("ir_version")  # the base had none
    payloads = moved.move_in(model.path, result.proto, model.payloads)
    return replace(result, payloads=payloads, canonical=manifest.canonical)


def base_notes(adapted: Model, result: Model) -> list[str]:
    """Why the model that `remove` gave is not the base byte for byte; empty if it is.

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
