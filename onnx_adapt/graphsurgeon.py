"""The border to onnx-graphsurgeon: the same slots on its `Graph`.

onnx-graphsurgeon has no place for model metadata, nor for an initializer that is also an
input, so a plain export would lose the slots. `insert` keeps both on the graph it
returns, and `export_onnx` here writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnx_adapt.edit import insert as rewrite
from onnx_adapt.edit.weights import drop_named
from onnx_adapt.errors import SlotError
from onnx_adapt.graph.index import Shape, read_type
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.slot.manifest import SLOT_KEY, Manifest, read_manifest, slot_of, write_manifest

_RECORD = "onnx_adapt_record"


class SlotWeight(gs.Constant):  # type: ignore[misc]
    """A weight of a swappable slot: stored like a constant, declared like an input.

    Attributes:
        declared: The shape of the input, in which the bottleneck is a symbol.
    """

    def __init__(self, stored: onnx.TensorProto, declared: Shape) -> None:
        super().__init__(stored.name, LazyValues(stored))
        self.declared = declared

    @property
    def shape(self) -> list[int | str | None]:
        """The declared shape."""
        return list(self.declared)


def insert(graph: gs.Graph, *, after: str | Sequence[str], **options: Any) -> gs.Graph:
    """Insert slots into a graphsurgeon graph.

    Args:
        graph: The graph; it is left as it was.
        after: Places, as for `onnx_adapt.insert`.
        **options: The same options as those of `onnx_adapt.insert`.

    Returns:
        A new graph; write it with `export_onnx` of this module.

    Raises:
        AdaptError: As `onnx_adapt.insert` does.

    Example:
        >>> import onnx, onnx_graphsurgeon as gs
        >>> from onnx_adapt import graphsurgeon
        >>> base = gs.import_onnx(onnx.load("models/dnsmos-p808.onnx"))
        >>> adapted = graphsurgeon.insert(base, after="conv2d_5")
        >>> [node.op for node in adapted.nodes if node.name.startswith("adapter.")]
        ['Conv', 'Relu', 'Conv', 'Add']
    """
    # vars(), because gs.Graph reports every unknown attribute as an error.
    proto = export_onnx(graph) if _RECORD in vars(graph) else gs.export_onnx(graph)
    adapted = rewrite.insert(Model(proto), after=after, **options).proto
    manifest = read_manifest(adapted)
    assert manifest is not None
    owners = {
        node.name: slot_of(node)
        for scope in walk.scopes(adapted.graph)
        for node in scope.graph.node
        if slot_of(node)
    }
    swappable = {name for slot in manifest.slots if slot.swappable for name in slot.inputs}
    return _with_inputs(adapted, swappable, (manifest, owners))


def _with_inputs(
    proto: onnx.ModelProto, names: set[str], record: tuple[Manifest, dict[str, str]]
) -> gs.Graph:
    """Import a model and keep these inputs as stored and declared at once."""
    declared = {v.name: read_type(v).shape or () for v in proto.graph.input if v.name in names}
    drop_named(proto.graph.input, names)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    graph = gs.import_onnx(proto)
    found = graph.tensors()
    for name, shape in declared.items():
        weight = SlotWeight(stored[name], shape)
        for node in list(found[name].outputs) if name in found else _readers(graph, name):
            for position, tensor in enumerate(node.inputs):
                if tensor.name == name:
                    node.inputs[position] = weight
        graph.inputs.append(weight)
    setattr(graph, _RECORD, record)
    return graph


def _readers(graph: gs.Graph, name: str) -> list[gs.Node]:
    """Nodes that read a tensor, in any body."""
    graphs = [graph, *graph.subgraphs(recursive=True)]
    return [n for g in graphs for n in g.nodes if any(t.name == name for t in n.inputs)]


def export_onnx(graph: gs.Graph) -> onnx.ModelProto:
    """Export a graph from `insert` with everything that makes its slots slots.

    Raises:
        SlotError: If the graph did not come from `insert`.

    Example:
        >>> import onnx, onnx_graphsurgeon as gs
        >>> from onnx_adapt import graphsurgeon
        >>> base = gs.import_onnx(onnx.load("models/dnsmos-p808.onnx"))
        >>> model = graphsurgeon.export_onnx(graphsurgeon.insert(base, after="conv2d_5"))
        >>> [value.name for value in model.graph.input]
        ['input_1', 'adapter.conv2d_5.down', 'adapter.conv2d_5.up']
    """
    record: tuple[Manifest, dict[str, str]] | None = vars(graph).get(_RECORD)
    if record is None:
        raise SlotError(
            "this graph has no record of slots",
            hint="export the graph that onnx_adapt.graphsurgeon.insert returned",
        )
    manifest, owners = record
    proto: onnx.ModelProto = gs.export_onnx(graph)
    weights = {name for slot in manifest.slots for name in slot.inputs}
    for scope in walk.scopes(proto.graph):
        if scope.parent is not None:
            # Graphsurgeon repeats in a body what the body reads from outside.
            drop_named(scope.graph.initializer, weights)
        for node in scope.graph.node:
            if node.name in owners:
                node.metadata_props.add(key=SLOT_KEY, value=owners[node.name])
    write_manifest(proto, manifest)
    return proto
