"""Widen calibrated ranges of a quantised base for the values of an adapter, and undo it.

No constant of the base is changed. A wider range is a new constant, which the nodes that share
the range read in place of the base's. To undo it, they read the base's constant again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx

from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.edit.weights import drop_named
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.slot.base_changes import Widened
from onnx_adapt.slot.manifest import Manifest, write_manifest


@dataclass(frozen=True, slots=True)
class Change:
    """A constant that replaces one of a range.

    Attributes:
        quantizer: Output of the QuantizeLinear with the range.
        value: The new constant, without a name.
        uses: The inputs that are to read it: graph, index of the node, position.
    """

    quantizer: str
    value: onnx.TensorProto
    uses: tuple[tuple[str, int, int], ...]


def widen_ranges(model: Model, changes: Sequence[Change]) -> Model:
    """Make nodes of a model with slots read other constants, and record that in its manifest.

    A range that was widened before gets its new constant in place of the earlier one.
    """
    result = model.copy()
    manifest = required_manifest(result)
    known = {item.name: item for item in manifest.widened}
    scopes = list(walk.scopes(result.proto.graph))
    graphs = {scope.path: scope.graph for scope in scopes}
    taken = {n for s in scopes for node in s.graph.node for n in (*node.input, *node.output)}
    taken |= {tensor.name for scope in scopes for tensor in scope.graph.initializer}
    for change in changes:
        path, place, position = change.uses[0]
        current = graphs[path].node[place].input[position]
        before = known.get(current)
        name = before.name if before else _free(f"widened/{current}", taken)
        change.value.name = name
        if before:
            drop_named(result.proto.graph.initializer, {name})
        known[name] = before or Widened(change.quantizer, name, current)
        result.proto.graph.initializer.append(change.value)
        for path, place, position in change.uses:
            graphs[path].node[place].input[position] = name
    write_manifest(result.proto, replace(manifest, widened=tuple(known.values())))
    return result


def _free(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}.{number}"
    taken.add(name)
    return name


def undo_widening(proto: onnx.ModelProto, widened: Iterable[Widened]) -> None:
    """Undo `widen_ranges`, in place."""
    originals = {item.name: item.original for item in widened}
    drop_named(proto.graph.initializer, set(originals))
    for scope in walk.scopes(proto.graph) if originals else ():
        for node in scope.graph.node:
            for position, name in enumerate(node.input):
                if name in originals:
                    node.input[position] = originals[name]


def with_base_ranges(model: Model) -> Model:
    """Give a model with slots the base's ranges; the model itself if none was widened."""
    manifest = required_manifest(model)
    if not manifest.widened:
        return model
    result = model.copy()
    undo_widening(result.proto, manifest.widened)
    write_manifest(result.proto, replace(manifest, widened=()))
    return result


def widened_ranges(manifest: Manifest) -> list[str]:
    """List the outputs of the QuantizeLinear nodes whose ranges were widened."""
    return list(dict.fromkeys(item.quantizer for item in manifest.widened))
