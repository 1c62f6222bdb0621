"""A model with some of its fused nodes written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx

from onnx_adapt.graph.fused_draft import Draft, FusedPlace
from onnx_adapt.graph.index import GraphView, index_model
from onnx_adapt.graph.inference import typed_tensors
from onnx_adapt.graph.unfusing import write_out
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.slot.base_changes import Unfused
from onnx_adapt.slot.manifest import UNFUSED_KEY, Slot


def unfuse(
    model: Model,
    places: Sequence[FusedPlace],
    slots: Sequence[Slot] = (),
    known: Sequence[Unfused] = (),
) -> tuple[Model, tuple[Unfused, ...]]:
    """Write out fused nodes of a model.

    A node that stands for another one already, such as the SkipLayerNormalization whose bias
    was taken out, is written out as a part of that.

    Args:
        model: The model; it is left as it was.
        places: The nodes. Of two places at one node the one that needs more counts.
        slots: The slots that the model has already.
        known: The records that it has already.

    Returns:
        The model, and all records, which undo it.

    Raises:
        SiteRefusedError: If a node cannot be written out.
    """
    if not places:
        return model, tuple(known)
    result = model.copy()
    index = index_model(result)
    graphs = {scope.path: scope.graph for scope in walk.scopes(result.proto.graph)}
    wanted: dict[tuple[str, str], FusedPlace] = {}
    for place in places:
        key = place.graph, place.output
        if key not in wanted or place.residual:
            wanted[key] = place
    outer = {(slot.graph, slot.inner): slot.output for slot in slots}
    records = {record.label: record for record in known}
    for (path, output), place in wanted.items():
        nodes = graphs[path].node
        at = next(i for i, node in enumerate(nodes) if output in node.output)
        original = onnx.NodeProto.FromString(nodes[at].SerializeToString())
        for i, name in enumerate(original.output):
            while (path, name) in outer:  # its name once the slots on it are removed
                name = original.output[i] = outer[path, name]
        draft = write_out(index, index.views[path], place, original.output[0])
        label = unfused_label(nodes[at]) or f"{path}:{original.output[0]}"
        for node in draft.nodes:
            _mark(node, label)
        del nodes[at]
        for i, node in enumerate(draft.nodes):
            nodes.insert(at + i, node)
        result.proto.graph.initializer.extend(draft.constants)
        _record_types(result, index.views[path], graphs[path], draft, label)
        records[label] = _record(records.get(label), label, original, draft)
    return result, tuple(records.values())


def _mark(node: onnx.NodeProto, label: str) -> None:
    if not unfused_label(node):
        node.metadata_props.add(key=UNFUSED_KEY, value=label)


def _record(
    before: Unfused | None, label: str, original: onnx.NodeProto, draft: Draft
) -> Unfused:
    names = tuple(tensor.name for tensor in draft.constants)
    place = draft.place
    if before is not None:
        constants = (*before.constants, *names)
        return replace(before, constants=constants, residual=place.residual)
    node = original.SerializeToString().hex()
    return Unfused(label, draft.fused.op_type, node, names, place.tensor, place.residual)


def _record_types(
    model: Model, view: GraphView, graph: onnx.GraphProto, draft: Draft, label: str
) -> None:
    """Record the types of what new nodes read where ONNX's inference finds none, in place.

    It finds none behind operators that it does not know, and in graphs out of order. ONNX's
    checker then rejects the new nodes, as it does not reject the fused one.
    """
    typed = typed_tensors(model.proto).get(view.scope.path, ())
    read = (name for node in draft.nodes if not node.domain for name in node.input)
    for name in dict.fromkeys(read):
        elem_type = view.type_of(name).elem_type
        late = view.producers.get(name, -1) > view.producers[draft.place.output]
        if name in view.producers and elem_type and (late or name not in typed):
            declared = onnx.helper.make_tensor_value_info(name, elem_type, None)
            declared.metadata_props.add(key=UNFUSED_KEY, value=label)
            graph.value_info.append(declared)


def unfused_label(node: onnx.NodeProto | onnx.ValueInfoProto) -> str:
    """The record that a node or type belongs to, if it was added for a fused node; else ''."""
    return next((str(e.value) for e in node.metadata_props if e.key == UNFUSED_KEY), "")
