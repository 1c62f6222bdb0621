"""Insert the nodes of planned slots into a graph, and remove them again.

A slot goes in by a rename: the producer's output gets a new name and the slot's output
the old one. No consumer is touched, so graph outputs, bodies that capture the tensor,
recorded types and the order of nodes all stay right. A slot on a weight, or on what one layer
of several reads, makes a new tensor instead, which its readers read (`edge_readers.py`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx

from onnx_adapt.dtypes import ELEM_TYPES, Array
from onnx_adapt.edit.damage import foreign_readers
from onnx_adapt.edit.edge_readers import redirect_readers, restore_readers
from onnx_adapt.edit.plan import norm_nodes
from onnx_adapt.edit.weight_inputs import drop_weight_inputs
from onnx_adapt.edit.weights import add_weights, check_model_weights
from onnx_adapt.errors import SlotError
from onnx_adapt.graph.index import UNKNOWN, GraphView, ModelIndex, default_opset
from onnx_adapt.graph.inference import typed_tensors
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.formula import slot_nodes
from onnx_adapt.slot.manifest import (
    SLOT_KEY,
    Manifest,
    Slot,
    read_manifest,
    slot_of,
    write_manifest,
)
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.required import must_be_fed

_log = logging.getLogger(__name__)

_FRONT = -1  # the position of what stands before all nodes of a graph
_OLDEST_IR = 4  # the first in which an initializer need not be an input, and may be one


def manifest_of(model: Model, *, inlined: bool = False) -> Manifest:
    """Read the manifest of a model, or make a new one that describes the model as a base.

    Raises:
        SlotError: If what the manifest names is not all there.
    """
    known = read_manifest(model.proto)
    if known is not None:
        check_model_weights(model.proto, known)
        if must_be_fed(known):
            raise SlotError(
                f"{model.label} is exported: the weights of its slots must be fed",
                hint="insert into the model that it was exported from",
            )
        return known
    ir_version = model.proto.ir_version
    # A version of 0 that is written out comes back as none at all.
    canonical = model.canonical and (ir_version or not model.proto.HasField("ir_version"))
    return Manifest(fingerprint(model), ir_version, bool(canonical), inlined, ())


def insert_slots(
    model: Model,
    index: ModelIndex,
    known: Manifest,
    slots: Sequence[Slot],
    weights: Mapping[str, Mapping[str, Array]],
) -> Model:
    """Insert planned slots, their weights and their record into a model, in place.

    Raises:
        SlotError: If a slot makes no sense.
    """
    opset = default_opset(model.proto)
    for slot in slots:
        check_slot(slot, opset)
    for twice in _given_twice(index):
        _log.warning("initializer %r is there more than once; the last one counts", twice)
    slots = redirect_readers(index, slots, known.slots)
    placed = _insert_nodes(index, slots, known.slots, opset)
    _record_targets(index, slots)
    if model.proto.ir_version < _OLDEST_IR:
        known = replace(known, inputs=drop_weight_inputs(model.proto, known.weights))
        model.proto.ir_version = _OLDEST_IR
    for slot in owners(slots):
        add_weights(model.proto, slot, weights[slot.name])
    write_manifest(model.proto, replace(known, slots=placed))
    return model


def _given_twice(index: ModelIndex) -> list[str]:
    """Find initializers with the same name, which ONNX forbids and ONNX Runtime accepts."""
    found: list[str] = []
    for view in index.views.values():
        names = Counter(tensor.name for tensor in view.scope.graph.initializer)
        found += [name for name, count in names.items() if count > 1]
    return found


def _declare_shapes(index: ModelIndex, slot: Slot, nodes: Sequence[onnx.NodeProto]) -> None:
    """Record that the output of a slot with a value for each row has the shape of its target.

    Its terms have it too. Inputs with a value for each row or token have symbolic dimensions
    of their own. Without the record ONNX Runtime cannot infer the shape, and does not fuse
    the sum with what follows.
    Where no symbol of the inputs can be inferred for an axis, the symbol that the base
    records for its tensor is repeated.
    """
    view = index.views[slot.graph]
    graph = view.scope.graph
    made = {node.output[0] for node in nodes[:-1]}
    terms = made & set(nodes[-1].input) if nodes[-1].op_type == "Add" else set()
    there = {value.name for value in (*graph.value_info, *graph.output)}
    known = view.inferred.get(slot.tensor, UNKNOWN).shape or ()
    recorded = view.records.get(slot.tensor, UNKNOWN).shape or ()
    inputs = index.main.scope.graph.input
    symbols = {dim.dim_param for v in inputs for dim in v.type.tensor_type.shape.dim}
    pairs = zip(known, recorded if len(recorded) == len(known) else known, strict=True)
    shape = [
        size
        if isinstance(size, int) or size in symbols
        else other
        if other in symbols
        else None
        for size, other in pairs
    ]
    for name in sorted({slot.output, *terms} - there) if shape else ():
        _record(view, graph, slot, name, shape)


def _record_targets(index: ModelIndex, slots: Sequence[Slot]) -> None:
    """Record the types of slots' targets where ONNX's shape inference finds none.

    Otherwise ONNX's checker rejects the slots' nodes.
    """
    if index.plain and not index.stale_records():
        return
    proto = index.model.proto
    typed = typed_tensors(proto)
    graphs = {scope.path: scope.graph for scope in walk.scopes(proto.graph)}
    for slot in slots:
        if not slot.on_edge and slot.inner not in typed.get(slot.graph, ()):
            view = index.views[slot.graph]
            _record(view, graphs[slot.graph], slot, slot.inner, None)


def _record(
    view: GraphView,
    graph: onnx.GraphProto,
    slot: Slot,
    name: str,
    shape: Sequence[int | str | None] | None,
) -> None:
    """Record the type of a tensor of a slot, which is that of its target."""
    elem_type = view.type_of(slot.tensor).elem_type or ELEM_TYPES[slot.dtype]
    declared = onnx.helper.make_tensor_value_info(name, elem_type, shape)
    declared.metadata_props.add(key=SLOT_KEY, value=slot.name)
    graph.value_info.append(declared)


def _insert_nodes(
    index: ModelIndex, slots: Sequence[Slot], known: Sequence[Slot], opset: int
) -> tuple[Slot, ...]:
    """Insert the nodes of new slots into the graphs, in place.

    Returns:
        All slots of the model; one that another was stacked on has a new output name.
    """
    outputs = {(slot.graph, slot.output): slot for slot in known}
    # Bodies before the graphs around them: rewriting a graph copies the bodies in it.
    for path, view in reversed(index.views.items()):
        here = [slot for slot in slots if slot.graph == path]
        if not here:
            continue
        maker: dict[str, onnx.NodeProto] = {}
        added: dict[int, list[onnx.NodeProto]] = {}
        behind: dict[int, list[onnx.NodeProto]] = {}  # after the slots on what they read
        placed: dict[str, int] = {}  # what new slots on edges make
        for slot in here:
            if slot.on_edge:
                position = placed.get(slot.inner, view.producers.get(slot.inner, _FRONT))
                placed[slot.output] = position
                outputs[path, slot.output] = slot
                behind.setdefault(position, []).extend(slot_nodes(slot, opset))
                continue
            # A slot that goes in front of another makes what that one reads.
            position = view.producers[slot.output]
            producer = maker.get(slot.output, view.nodes[position])
            rename_output(producer, slot.output, slot.inner)
            below = outputs.pop((path, slot.output), None)
            _tell_stacked(slot, below)
            if below is not None:
                outputs[path, slot.inner] = replace(below, output=slot.inner)
            copied = norm_nodes(index, slot)
            norm = copied[-1] if copied else None
            nodes = [*copied[:-1], *slot_nodes(slot, opset, norm)]
            if slot.row_parts:
                _declare_shapes(index, slot, nodes)
            maker[slot.output] = nodes[-1]
            outputs[path, slot.output] = slot
            added.setdefault(position, []).extend(nodes)
        for position, nodes in behind.items():
            added.setdefault(position, []).extend(nodes)
        _put_behind(view.scope.graph, added)
    order = {slot.name: i for i, slot in enumerate((*known, *slots))}
    return _from_inside(sorted(outputs.values(), key=lambda slot: order[slot.name]))


def _tell_stacked(slot: Slot, below: Slot | None) -> None:
    """Tell that a slot is on a tensor that has slots already, behind or in front of them."""
    if below is not None:
        _log.warning("slot %r is stacked on slot %r", slot.name, below.name)
    elif slot.output != slot.tensor:
        _log.warning("slot %r is put in front of others on its tensor", slot.name)


def _from_inside(slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """Put slots that others stand behind before these; the order is kept otherwise.

    For example slots `a` and `b` are in a model, and `c` goes in front of `a`: `c`, `a`, `b`.
    """
    makers = {(slot.graph, slot.output): slot for slot in slots if not slot.on_edge}
    ordered: dict[str, Slot] = {}
    for slot in slots:
        chain = [slot]
        while not slot.on_edge and len(chain) < len(slots):
            below = makers.get((slot.graph, chain[-1].inner))
            if below is None:
                break
            chain.append(below)
        ordered.update(
            (item.name, item) for item in reversed(chain) if item.name not in ordered
        )
    return tuple(ordered.values())


def _put_behind(graph: onnx.GraphProto, added: Mapping[int, Sequence[onnx.NodeProto]]) -> None:
    """Put nodes behind those at the given positions, in place.

    They are appended and then sorted: that moves no more than references, and a stable sort
    keeps the order of all others. New nodes `x`, `y` behind the first of `a`, `b` give
    `a`, `b`, `x`, `y` with the keys 0, 1, 0, 0.
    """
    keys = [*range(len(graph.node))]
    for position, nodes in added.items():
        keys += [position] * len(nodes)
        graph.node.extend(nodes)
    given = iter(keys)
    graph.node.sort(key=lambda _: next(given))


def _set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def rename_output(node: onnx.NodeProto, old: str, new: str) -> None:
    """Give one output of a node another name."""
    for i, name in enumerate(node.output):
        if name == old:
            node.output[i] = new


def remove_nodes(
    proto: onnx.ModelProto, slots: Sequence[Slot], doomed: set[str]
) -> tuple[Slot, ...]:
    """Remove the nodes of slots and reconnect the nodes around them, in place.

    Returns:
        The slots that stay.

    Raises:
        SlotError: If another tool moved the nodes, or put others among them.
    """
    if foreign := foreign_readers(proto, [slot for slot in slots if slot.name in doomed]):
        raise SlotError(
            foreign[0], hint="another tool put it there; start from the base model"
        )
    current = {slot.name: slot for slot in restore_readers(proto, slots, doomed)}
    for scope in reversed(list(walk.scopes(proto.graph))):
        recorded = scope.graph.value_info
        for i in reversed(range(len(recorded))):
            if slot_of(recorded[i]) in doomed:
                del recorded[i]
        present = {slot_of(node) for node in scope.graph.node} & doomed
        if not present:
            continue
        # In order of insertion, so that of stacked slots the innermost goes first.
        here = [slot.name for slot in slots if slot.name in present]
        made = {(slot_of(node), name) for node in scope.graph.node for name in node.output}
        for name in here:
            if (name, current[name].output) not in made:
                raise _damaged(current[name])
        nodes = [node for node in scope.graph.node if slot_of(node) not in here]
        makers = {name: node for node in nodes for name in node.output}
        for name in here:
            gone = current.pop(name)
            if gone.on_edge:
                continue
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
