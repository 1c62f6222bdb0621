"""Insert slots into a model and take them out again.

A slot goes in by a rename: the producer's output gets a new name and the slot's output
the old one. No consumer is touched, so graph outputs, bodies that capture the tensor,
recorded types and the order of nodes all stay right.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner

from onnx_adapt import external_data, walk
from onnx_adapt.errors import RunError, SiteError, SlotError
from onnx_adapt.fingerprint import fingerprint
from onnx_adapt.graph import ModelIndex, default_opset, slot_of
from onnx_adapt.initializers import add_weights, check_weights, drop_weights
from onnx_adapt.manifest import Manifest, Slot, read_manifest, write_manifest
from onnx_adapt.model_file import Model
from onnx_adapt.plan import Recipe, free_name, norm_node, plan_slot, reserved_names
from onnx_adapt.resolve import resolve
from onnx_adapt.sites import survey_model
from onnx_adapt.slot import PARTS, check_slot, fresh_weights, neutral_weights, slot_nodes

BAKED_BOTTLENECK = 64
"""Bottleneck of a baked slot when none is given (Houlsby et al., 2019)."""

_OLDEST_IR = 4  # the first in which an initializer need not be an input, and may be one

_log = logging.getLogger(__name__)


def insert(
    model: Model,
    *,
    after: str | Sequence[str],
    activation: str = "relu",
    bias: bool = False,
    parts: Sequence[str] = ("down", "up"),
    source: str = "",
    norm: str = "",
    norm_after: str = "",
    bottleneck: int | None = None,
    baked: bool = False,
    seed: int = 0,
    inline_functions: bool = False,
) -> Model:
    """Insert an adapter slot after each named place.

    A swappable slot computes nothing until weights are fed: the model gives the base's
    outputs. A slot with a fixed bottleneck starts as the identity as well, with random
    `down` and zero `up`. The formula is in `onnx_adapt.slot`.

    Args:
        model: The model; it is left as it was.
        after: Addresses, node names, tensors, module paths or globs.
        activation: One of `onnx_adapt.activations.ACTIVATIONS`.
        bias: Add `down_bias` and `up_bias` to the parts.
        parts: The weights each slot has; see `onnx_adapt.slot.PARTS`.
        source: A tensor for the adapter to read in place of the target.
        norm: A normalisation of the base, by name, re-applied to the source.
        norm_after: Let the slot's own normalisation wrap the `term` or the `sum`.
        bottleneck: Inner size; by default each adapter brings its own, and a baked slot
            has 64.
        baked: Make the weights constants.
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
    if bottleneck is not None and bottleneck < 1:
        raise SlotError(
            f"a bottleneck of {bottleneck} is not possible", hint="give 1 or more, e.g. 64"
        )
    if isinstance(parts, str):
        parts = (parts,)
    extra = ("down_bias", "up_bias") if bias else ()
    recipe = Recipe(
        activation=activation,
        parts=tuple(sorted({*parts, *extra}, key=_part_order)),
        source=source,
        norm=norm,
        norm_after=norm_after,
        swappable=not baked,
        bottleneck=bottleneck or (BAKED_BOTTLENECK if baked else 0),
        seed=seed,
    )
    names = [after] if isinstance(after, str) else list(after)
    if not names:
        raise SiteError("no place was named", hint="see `onnx-adapt sites`")
    return _insert(model, names, recipe, inline_functions=inline_functions)


def _part_order(part: str) -> tuple[int, str]:
    return (PARTS.index(part) if part in PARTS else len(PARTS), part)


def _insert(
    model: Model, names: list[str], recipe: Recipe, *, inline_functions: bool
) -> Model:
    known = read_manifest(model.proto)
    if known is None:
        ir_version = model.proto.ir_version
        inlined = inline_functions and bool(model.proto.functions)
        known = Manifest(fingerprint(model), ir_version, model.canonical, inlined, ())
    check_weights(model.proto, known.slots)
    result = inline_model(model) if inline_functions else model.copy()
    survey = survey_model(result)
    resolution = resolve(survey, names)
    for site in resolution.skipped:
        _log.warning("left out %s: %s", site.address, site.refused)
    taken = reserved_names(survey.index.names()) | {slot.name for slot in known.slots}
    slots: list[Slot] = []
    for choice in resolution.choices:
        name = free_name(choice.name, taken)
        taken.add(name)
        slots.append(plan_slot(survey, choice, name, recipe))
    opset = default_opset(result.proto)
    for slot in slots:
        check_slot(slot, opset)
    before = _place(survey.index, slots, known.slots, opset)
    rng = np.random.default_rng(recipe.seed)
    for slot in slots:
        size = slot.bottleneck
        weights = fresh_weights(slot, size, rng) if size else neutral_weights(slot)
        add_weights(result.proto, slot, weights)
    result.proto.ir_version = max(result.proto.ir_version, _OLDEST_IR)
    write_manifest(result.proto, replace(known, slots=before))
    return result


def inline_model(model: Model) -> Model:
    """The model with its model-local functions inlined.

    Raises:
        RunError: If ONNX cannot inline them.
    """
    try:
        proto = onnx.inliner.inline_local_functions(model.proto)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the functions of {model.label} cannot be inlined: {error}") from error
    return replace(model, proto=proto)


def _place(
    index: ModelIndex, slots: Sequence[Slot], known: Sequence[Slot], opset: int
) -> tuple[Slot, ...]:
    """Put the nodes of new slots into the graphs, in place.

    Returns:
        All slots of the model; one that another was stacked on has a new output name.
    """
    outputs = {(slot.graph, slot.output): slot for slot in known}
    for path, view in index.views.items():
        here = [slot for slot in slots if slot.graph == path]
        if not here:
            continue
        maker: dict[str, onnx.NodeProto] = {}
        added: dict[int, list[onnx.NodeProto]] = {}
        for slot in here:
            position = view.producers[slot.tensor]
            producer = maker.get(slot.tensor, view.nodes[position])
            rename_output(producer, slot.tensor, slot.inner)
            below = outputs.pop((path, slot.tensor), None)
            if below is not None:
                outputs[path, slot.inner] = replace(below, output=slot.inner)
            nodes = slot_nodes(slot, opset, norm_node(view, slot))
            maker[slot.tensor] = nodes[-1]
            outputs[path, slot.tensor] = slot
            added.setdefault(position, []).extend(nodes)
        merged = [n for i, node in enumerate(view.nodes) for n in (node, *added.get(i, ()))]
        _set_nodes(view.scope.graph, merged)
    order = {slot.name: i for i, slot in enumerate((*known, *slots))}
    return tuple(sorted(outputs.values(), key=lambda slot: order[slot.name]))


def _set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def rename_output(node: onnx.NodeProto, old: str, new: str) -> None:
    """Give one output of a node another name."""
    for i, name in enumerate(node.output):
        if name == old:
            node.output[i] = new


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


def remove(model: Model, *, slots: Sequence[str] | None = None) -> Model:
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
    by_name = {slot.name: slot for slot in manifest.slots}
    for name in slots or ():
        if name not in by_name:
            raise SlotError(f"no slot is called {name!r}", hint=f"slots: {', '.join(by_name)}")
    check_weights(model.proto, manifest.slots)
    doomed = set(by_name if slots is None else slots)
    result = model.copy()
    kept = _take_out(result.proto, manifest.slots, doomed)
    drop_weights(result.proto, [by_name[name] for name in doomed])
    if kept:
        write_manifest(result.proto, replace(manifest, slots=kept))
        return result
    write_manifest(result.proto, None)
    result.proto.ir_version = manifest.ir_version
    payloads = external_data.move_in(model.path, result.proto, model.payloads)
    return replace(result, payloads=payloads, canonical=manifest.canonical)


def _take_out(
    proto: onnx.ModelProto, slots: Sequence[Slot], doomed: set[str]
) -> tuple[Slot, ...]:
    """Delete the nodes of slots and reconnect what was around them, in place."""
    current = {slot.name: slot for slot in slots}
    for scope in walk.scopes(proto.graph):
        present = {slot_of(node) for node in scope.graph.node} & doomed
        if not present:
            continue
        # In order of insertion, so that of stacked slots the innermost goes first.
        here = [slot.name for slot in slots if slot.name in present]
        nodes = [node for node in scope.graph.node if slot_of(node) not in here]
        makers = {name: node for node in nodes for name in node.output}
        for name in here:
            gone = current.pop(name)
            if gone.inner not in makers:
                raise _damaged(gone)
            rename_output(makers[gone.inner], gone.inner, gone.output)
            makers[gone.output] = makers[gone.inner]
            for other in current.values():
                if other.graph == gone.graph and other.output == gone.inner:
                    current[other.name] = replace(other, output=gone.output)
                    break
        _set_nodes(scope.graph, nodes)
    if left := doomed & set(current):
        raise _damaged(current[min(left)])
    return tuple(current.values())


def _damaged(slot: Slot) -> SlotError:
    return SlotError(
        f"slot {slot.name!r} is damaged: its nodes are not where they were inserted",
        hint="another tool rewrote the graph; start from the base model",
    )


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
