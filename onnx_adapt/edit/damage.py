"""Find the damage that other tools did to the slots of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import FLOATS
from onnx_adapt.edit.heads import lost_heads
from onnx_adapt.edit.unfuse import lost_parts
from onnx_adapt.edit.weights import check_base_weights, check_weights, check_widened
from onnx_adapt.errors import AdaptError
from onnx_adapt.graph.index import default_opset, elem_name, text
from onnx_adapt.graph.norms import own_norm
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.formula import slot_nodes
from onnx_adapt.slot.manifest import Slot, read_manifest, slot_of
from onnx_adapt.slot.names import slot_prefix, split_node
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.weights import bottleneck_axis


def damages(model: Model) -> list[str]:
    """Describe the damage that other tools did to the slots of a model, if any.

    Raises:
        SlotError: If the model has no slots.
    """
    lost = _lost_record(model)
    if lost:
        return lost
    manifest = required_manifest(model)
    found: list[str] = []
    try:
        check_weights(model.proto, manifest.slots)
        check_base_weights(model.proto, manifest.weights)
        check_widened(model.proto, manifest.widened)
    except AdaptError as error:
        found.append(f"{error.message} ({error.hint})")
    found += _lost_marks(model.proto, manifest.slots)
    found += lost_parts(model.proto, manifest.unfused)
    found += lost_heads(model.proto, manifest.heads)
    found += foreign_readers(model.proto, manifest.slots)
    found += _changed_nodes(model.proto, manifest.slots)
    found += _unread_weights(model.proto, manifest.slots)
    found += _shared_symbols(model.proto, manifest.slots)
    found += _changed_inputs(model.proto, manifest.slots)
    found += _stale_types(model.proto, manifest.slots)
    return found


def _lost_marks(proto: onnx.ModelProto, slots: Sequence[Slot]) -> Iterator[str]:
    """Find slots whose nodes are gone, or have lost the mark that names their slot."""
    nodes = [node for scope in walk.scopes(proto.graph) for node in scope.graph.node]
    present = {slot_of(node) for node in nodes}
    read = {name for node in nodes for name in node.input}
    for slot in slots:
        if slot.name in present:
            continue
        if slot.swappable and all(slot.weight(part) in read for part in slot.parts):
            yield (
                f"slot {slot.name!r} can still be fed, but its nodes have lost their mark: it "
                "cannot be proven, filled or removed any more (an optimiser or converter "
                "rewrote them; keep the model from before for that)"
            )
        else:
            yield f"slot {slot.name!r}: its nodes have lost their mark or are gone"


def foreign_readers(proto: onnx.ModelProto, slots: Sequence[Slot]) -> list[str]:
    """Find nodes outside of slots that read weights or inner tensors of a slot."""
    scopes = list(walk.scopes(proto.graph))
    marks = {slot_of(node) for scope in scopes for node in scope.graph.node}
    marked = [slot for slot in slots if slot.name in marks]
    inside = {slot.weight(part): slot.owner for slot in marked for part in slot.parts}
    inside |= {slot.inner: slot.name for slot in marked if not slot.on_edge}
    last, named = {slot.output for slot in marked}, {slot.name for slot in marked}
    for scope in scopes:
        for node in scope.graph.node:
            if slot_of(node) in named:
                made = (name for name in node.output if name not in last)
                inside.update(dict.fromkeys(made, slot_of(node)))
    return [
        f"node {text(node.name)!r} ({node.op_type}) reads {name!r} of slot {inside[name]!r}, "
        "and is no part of it"
        for scope in scopes
        for node in scope.graph.node
        if not slot_of(node)
        for name in node.input
        if name in inside
    ]


def _lost_record(model: Model) -> list[str]:
    """Find the traces of slots in a model that has lost its manifest."""
    if read_manifest(model.proto) is not None:
        return []
    names = {
        found[0]
        for scope in walk.scopes(model.proto.graph)
        for node in scope.graph.node
        if (found := split_node(str(node.name)))
    }
    if not names:
        return []
    return [
        f"the record of its slots is gone from the model's metadata, and with it "
        f"{', '.join(map(repr, sorted(names)))} (another tool rewrote it; insert again)"
    ]


def _changed_inputs(proto: onnx.ModelProto, slots: Sequence[Slot]) -> Iterator[str]:
    """Find inputs of slots that are not declared as they were inserted."""
    declared = {value.name: value.type.tensor_type for value in proto.graph.input}
    for slot in owners(slots):
        for part in slot.parts:
            found = declared.get(slot.weight(part))
            if found is None:
                continue
            if FLOATS.get(found.elem_type) != slot.dtype:
                kind = elem_name(found.elem_type)
                yield f"input {slot.weight(part)!r} is declared as {kind}"
            axis = bottleneck_axis(slot, part)
            dims = found.shape.dim
            fixed = axis is not None and axis < len(dims) and dims[axis].HasField("dim_value")
            if fixed and not slot.bottleneck:
                yield (
                    f"slot {slot.name!r} is swappable only for one bottleneck: input "
                    f"{slot.weight(part)!r} was given a fixed size"
                )
        for name in map(slot.weight, slot.row_parts):
            rows = declared[name].shape.dim[:1] if name in declared else ()
            if any(dim.HasField("dim_value") for dim in rows):
                yield f"input {name!r}, which has a value for each row, was given a fixed size"


def _changed_nodes(proto: onnx.ModelProto, slots: Sequence[Slot]) -> Iterator[str]:
    """Find slots whose operators are not those that were inserted."""
    present: dict[str, list[onnx.NodeProto]] = {}
    for scope in walk.scopes(proto.graph):
        for node in scope.graph.node:
            present.setdefault(slot_of(node), []).append(node)
    for slot in slots:
        nodes = present.get(slot.name, [])
        constants = [node for node in nodes if "/norm_constant_" in text(node.name)]
        try:
            check_slot(slot, default_opset(proto))
        except AdaptError:
            continue  # no slot at all, which the check of its weights has said
        wanted = slot_nodes(slot, default_opset(proto), own_norm(nodes))
        made = {name for node in nodes for name in node.output}
        if nodes and slot.output not in made:
            yield f"slot {slot.name!r} does not make its output {slot.output!r}"
        there = [node.op_type for node in nodes if node not in constants]
        if nodes and there != [node.op_type for node in wanted]:
            yield f"slot {slot.name!r} has other operators than were inserted: {there}"


def _unread_weights(proto: onnx.ModelProto, slots: Sequence[Slot]) -> Iterator[str]:
    """Find slots on weights, or on the input of one layer, whose output no node reads."""
    nodes = [node for scope in walk.scopes(proto.graph) for node in scope.graph.node]
    read = {name for node in nodes for name in node.input}
    for slot in slots:
        if slot.on_edge and slot.output not in read:
            what = "the weight " if slot.on_weight else ""
            yield (
                f"slot {slot.name!r} has no effect: nothing reads {slot.output!r}, what it "
                f"makes of {what}{slot.tensor!r}"
            )


def _shared_symbols(proto: onnx.ModelProto, slots: Sequence[Slot]) -> Iterator[str]:
    """Find slots that share a symbolic dimension, by which ONNX Runtime plans its memory."""
    owner: dict[str, str] = {}
    declared = {value.name: value for value in proto.graph.input}
    for slot in owners(slots):
        for name in slot.inputs:
            value = declared.get(name)
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
    free = {slot_prefix(slot.name): slot for slot in slots if not slot.bottleneck}
    for scope in walk.scopes(proto.graph):
        for value in scope.graph.value_info:
            prefix, _, label = value.name.rpartition("/")
            slot = free.get(prefix)
            dims = value.type.tensor_type.shape.dim
            if slot is None or len(dims) < 2:
                continue
            dim = dims[1 if slot.axis == 1 else len(dims) - 1]
            # Halves are of a coupling; means and variances are 1 wide.
            known = {slot.width, slot.source_width, slot.width // 2, 1, *slot.weight_shape}
            if label.endswith("down"):
                known = set()  # its size is the bottleneck, whatever it is
            if dim.HasField("dim_value") and dim.dim_value not in known:
                yield (
                    f"the recorded shape of {value.name!r} has the bottleneck {dim.dim_value} "
                    "in it; drop the model's value_info"
                )
