"""Put fused nodes of a base back that were written out for slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from google.protobuf.message import DecodeError

from onnx_adapt.edit.weights import drop_named
from onnx_adapt.errors import ManifestError, SlotError
from onnx_adapt.graph.written_out import unfused_label
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.slot.base_changes import Unfused
from onnx_adapt.slot.manifest import read_manifest


def undo_unfusing(proto: onnx.ModelProto, unfused: Iterable[Unfused]) -> None:
    """Put fused nodes back in place of those that stand for them, in place.

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
        for i in reversed(range(len(scope.graph.node))):
            label = unfused_label(scope.graph.node[i])
            if label not in records:
                continue
            before = unfused_label(scope.graph.node[i - 1]) if i else ""
            if before != label:
                scope.graph.node[i].CopyFrom(_original(records.pop(label)))
            else:
                del scope.graph.node[i]
    for item in records.values():
        raise SlotError(
            f"the nodes that stand for the base's {item.op} at {item.label!r} are gone",
            hint="another tool rewrote the graph; start from the base model",
        )


def unfused_nodes(model: Model) -> tuple[Unfused, ...]:
    """List the fused nodes of a model's base that are written out for its slots."""
    manifest = read_manifest(model.proto)
    return manifest.unfused if manifest else ()


def lost_parts(proto: onnx.ModelProto, unfused: Iterable[Unfused]) -> Iterator[str]:
    """Find fused nodes whose parts are gone, or have lost the mark that names them."""
    present = {
        unfused_label(node) for scope in walk.scopes(proto.graph) for node in scope.graph.node
    }
    for item in unfused:
        if item.label not in present:
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
