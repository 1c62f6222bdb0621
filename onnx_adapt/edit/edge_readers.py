"""Let some nodes read what a slot makes of a weight or an activation, and the base's again.

The base's tensor keeps its name, and the slot makes a new one: of `Attention(x, w)` becomes
`Attention(x, adapter.q/weight)`, and where `q`, `k` and `v` read one `x`, of `MatMul(x, v)`
becomes `MatMul(adapter.v.input/input, v)`. So the base is restored by the slot's own names
alone. A slot that is stacked on another reads what the other makes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import onnx

from onnx_adapt.errors import SlotError
from onnx_adapt.graph.index import GraphView, ModelIndex
from onnx_adapt.model import walk
from onnx_adapt.slot.manifest import Slot


def redirect_readers(
    index: ModelIndex, slots: Sequence[Slot], known: Sequence[Slot]
) -> tuple[Slot, ...]:
    """Let the readers of tensors read what slots on these edges make of them, in place.

    Args:
        index: The index of the model.
        slots: New slots; those that are not on an edge are passed through.
        known: The slots that the model has.

    Returns:
        The new slots, each with the tensor that its readers read before.

    Raises:
        SlotError: If a tensor is not read where the slot says.
    """
    originals = {slot.output: slot.tensor for slot in (*known, *slots) if slot.on_edge}
    return tuple(
        _redirected(index, slot, originals) if slot.on_edge else slot for slot in slots
    )


def _redirected(index: ModelIndex, slot: Slot, originals: dict[str, str]) -> Slot:
    places = [
        (node, position)
        for view, node in _readers(index, slot)
        for position, name in enumerate(node.input)
        if slot.tensor in (name, originals.get(name))
    ]
    read = {node.input[position] for node, position in places}
    if len(read) != 1:
        raise SlotError(
            f"slot {slot.name!r}: the nodes that read {slot.tensor!r} read "
            + (f"different tensors: {', '.join(sorted(read))}" if read else "it no more"),
            hint="was the model changed after the adapter was loaded for it? load it again",
        )
    for node, position in places:
        node.input[position] = slot.output
    below = read.pop()
    return replace(slot, inner=below, source=below)


def _readers(index: ModelIndex, slot: Slot) -> list[tuple[GraphView, onnx.NodeProto]]:
    found = []
    for address in slot.readers:
        path, _, tensor = address.partition(":")
        view = index.views.get(path)
        if view is not None and tensor in view.producers:
            found.append((view, view.nodes[view.producers[tensor]]))
    return found


def restore_readers(
    proto: onnx.ModelProto, slots: Sequence[Slot], doomed: Collection[str]
) -> tuple[Slot, ...]:
    """Let nodes read again what they read before some slots on edges, in place.

    Args:
        proto: The model.
        slots: All its slots.
        doomed: The names of those that are to be removed; their nodes stay for now.

    Returns:
        All slots; one that was stacked on a removed one reads another tensor.
    """
    read = {slot.output: slot.inner for slot in slots if slot.on_edge and slot.name in doomed}
    if not read:
        return tuple(slots)

    def before(name: str) -> str:
        for _ in read:  # a damaged record may lead in circles
            name = read.get(name, name)
        return name

    for scope in walk.scopes(proto.graph):
        for node in scope.graph.node:
            for position, name in enumerate(node.input):
                if name in read:
                    node.input[position] = before(name)
    return tuple(
        slot
        if slot.name in doomed
        else replace(slot, inner=before(slot.inner), source=before(slot.inner))
        if slot.on_edge
        else replace(slot, source=before(slot.source))
        for slot in slots
    )
