"""Put fused nodes of a base back that were written out for slots."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from google.protobuf.message import DecodeError

from onnx_adapt.edit.weights import drop_named
from onnx_adapt.errors import ManifestError, SlotError
from onnx_adapt.graph.fused_draft import FusedPlace
from onnx_adapt.graph.written_out import unfuse, unfused_label
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.slot.base_changes import Unfused
from onnx_adapt.slot.manifest import Manifest, Slot, read_manifest


def undo_unfusing(
    proto: onnx.ModelProto, unfused: Iterable[Unfused], now: NamesNow | None = None
) -> None:
    """Put fused nodes back in place of those that stand for them, in place.

    Args:
        proto: The model, without the slots that need the nodes written out.
        unfused: The nodes.
        now: What tensors of the base are called now, if the model has other slots.

    Raises:
        SlotError: If another tool moved the nodes that stand for one.
        ManifestError: If the record of one is damaged.
    """
    records = {item.label: item for item in unfused}
    drop_named(
        proto.graph.initializer, {name for item in records.values() for name in item.constants}
    )
    labels = set(records)
    for scope in walk.scopes(proto.graph) if records else ():
        recorded = scope.graph.value_info
        for i in reversed(range(len(recorded))):
            if unfused_label(recorded[i]) in labels:
                del recorded[i]
        nodes = scope.graph.node
        for label, places in _places(nodes, labels).items():
            item, first = records.pop(label), places[0]
            if places != list(range(first, first + len(places))):
                raise _gone(item)
            original = _original(item)
            if now is not None:
                now.rename(original, [nodes[i] for i in places])
            for i in reversed(places[1:]):
                del nodes[i]
            nodes[first].CopyFrom(original)
    for item in records.values():
        raise _gone(item)


def _places(nodes: Iterable[onnx.NodeProto], labels: Collection[str]) -> dict[str, list[int]]:
    """Where the parts of each fused node are; the last fused node first."""
    found: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        if (label := unfused_label(node)) in labels:
            found.setdefault(label, []).append(i)
    return dict(sorted(found.items(), key=lambda entry: entry[1], reverse=True))


def _gone(item: Unfused) -> SlotError:
    return SlotError(
        f"the nodes that stand for the base's {item.op} at {item.label!r} are gone",
        hint="another tool rewrote the graph; start from the base model",
    )


@dataclass(frozen=True, slots=True)
class NamesNow:
    """What tensors of the base are called in a model with slots.

    Attributes:
        read: For what a node of the base reads, a name that may stand in its place: that of
            a replaceable weight, a wider range or an adapted weight.
        made: For what a node of the base makes, its name below the slots on it.
    """

    read: Mapping[str, str]
    made: Mapping[str, str]

    def rename(self, original: onnx.NodeProto, parts: Sequence[onnx.NodeProto]) -> None:
        """Give the tensors of a fused node the names that its parts have, in place."""
        reads = {name for node in parts for name in node.input}
        makes = {name for node in parts for name in node.output}
        for i, name in enumerate(original.input):
            if name not in reads and self.read.get(name) in reads:
                original.input[i] = self.read[name]
        for i, name in enumerate(original.output):
            while name and name not in makes and name in self.made:
                name = original.output[i] = self.made[name]


def names_now(manifest: Manifest) -> NamesNow:
    """What tensors of the base are called in a model with this manifest."""
    read = {item.original: item.name for item in manifest.weights}
    read |= {item.original: item.name for item in manifest.widened}
    weights = {slot.tensor: slot.output for slot in manifest.slots if slot.on_edge}
    made = {slot.output: slot.inner for slot in manifest.slots if not slot.on_edge}
    return NamesNow(read | weights, made)


def still_needed(
    proto: onnx.ModelProto, unfused: Sequence[Unfused], slots: Iterable[Slot]
) -> tuple[Unfused, ...]:
    """The fused nodes that slots need written out: they sit on, or read, what is inside."""
    wanted = {n for s in slots for n in (s.tensor, s.source, s.plus, s.norm) if n}
    needed = set()
    for scope in walk.scopes(proto.graph) if unfused else ():
        nodes = scope.graph.node
        for label, places in _places(nodes, {item.label for item in unfused}).items():
            parts = [nodes[i] for i in places]
            read = {name for node in parts for name in node.input}
            inside = read - set(_fused_inputs(unfused, label))
            if inside & wanted:
                needed.add(label)
    return tuple(item for item in unfused if item.label in needed)


def _fused_inputs(unfused: Iterable[Unfused], label: str) -> Iterator[str]:
    for item in unfused:
        if item.label == label:
            yield from _original(item).input


def unfused_nodes(model: Model) -> tuple[Unfused, ...]:
    """List the fused nodes of a model's base that are written out for its slots."""
    manifest = read_manifest(model.proto)
    return manifest.unfused if manifest else ()


def changed_parts(
    written_out: Model, base: Model, unfused: Sequence[Unfused]
) -> Iterator[str]:
    """Find fused nodes for which other nodes or constants stand than were written out.

    Args:
        written_out: A model without its slots, but with its fused nodes written out.
        base: Its base, in which the same nodes are written out anew.
        unfused: The nodes.

    Raises:
        SiteRefusedError: If the base has no such nodes.
    """
    places = [
        FusedPlace(path, output, item.tensor, item.residual)
        for item in unfused
        for path, _, output in [item.label.partition(":")]
    ]
    anew, records = unfuse(base, places)
    for item, record in zip(unfused, records, strict=True):
        if _parts(written_out, item) != _parts(anew, record):
            yield (
                f"the nodes that stand for the base's {item.op} at {item.label!r} are not "
                "those that were written out"
            )


def _parts(model: Model, item: Unfused) -> list[bytes]:
    """The nodes and constants that stand for a fused node, encoded."""
    scopes = walk.scopes(model.proto.graph)
    nodes = [n for s in scopes for n in s.graph.node if unfused_label(n) == item.label]
    stored = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    constants = [stored[name] for name in item.constants if name in stored]
    return [part.SerializeToString() for part in (*nodes, *constants)]


def lost_parts(proto: onnx.ModelProto, unfused: Iterable[Unfused]) -> Iterator[str]:
    """Find fused nodes whose parts are gone, or have lost the mark that names them."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    present = {
        unfused_label(node) for scope in walk.scopes(proto.graph) for node in scope.graph.node
    }
    for item in unfused:
        if item.label not in present or not stored.issuperset(item.constants):
            yield (
                f"the nodes that stand for the base's {item.op} at {item.label!r} have lost "
                "their mark or are gone"
            )


def _original(item: Unfused) -> onnx.NodeProto:
    try:
        node = onnx.NodeProto()
        node.ParseFromString(bytes.fromhex(item.node))
    except (DecodeError, ValueError) as error:
        raise ManifestError(
            f"the record of the base's {item.op} at {item.label!r} is damaged: {error}",
            hint="another tool rewrote it; start from the base model",
        ) from error
    return node
