"""The operations that each node of a model does in one run.

They are counted from the shapes of the model's own tensors. Shape nodes, added beside each
tensor, measure these. ONNX Runtime's profile would not do: it leaves out weights that were
packed, and nodes that the runtime replaced by several others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
from onnx import helper

from onnx_adapt.edit.insert import inline_model
from onnx_adapt.graph.index import text
from onnx_adapt.graph.operations import NodeRun, Shape
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.ort import CPU, Providers
from onnx_adapt.proof.runner import Runner
from onnx_adapt.proof.taps import Tapper
from onnx_adapt.report.flops import flops, is_free, is_in_table
from onnx_adapt.slot.manifest import slot_of


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of one node.

    Attributes:
        node: Name of the node.
        op: Its operator.
        slot: Name of the slot that the node belongs to, or ''.
        flops: Its floating-point operations if `counted`, else one for each element of its
            first output.
        counted: Whether the shapes tell how many operations there are.
    """

    node: str
    op: str
    slot: str
    flops: int
    counted: bool


def trace(
    model: Model, feeds: Mapping[str, Any], providers: Providers = CPU
) -> tuple[Ran, ...]:
    """Run a model once and count the operations of its nodes.

    Nodes that only move data are left out. A node in the body of a Loop appears once for each
    iteration.

    Args:
        model: The model, run without optimisations.
        feeds: Arrays by input name.
        providers: Where to run it.

    Raises:
        RunError: If ONNX Runtime rejects the model or the inputs.
    """
    whole = inline_model(model) if model.proto.functions else model
    tapped = replace(whole, proto=onnx.ModelProto())
    tapped.proto.CopyFrom(whole.proto)
    tapper = Tapper(tapped.proto)
    found: list[Ran] = []
    taps: list[tuple[list[onnx.NodeProto], list[str], str]] = []
    for scope in walk.scopes(whole.proto.graph):
        nodes = [node for node in scope.graph.node if not is_free(node.op_type, node.domain)]
        names = list(dict.fromkeys(name for node in nodes for name in _measured(node)))
        output = tapper.tap_sizes(scope.path, names) if names else None
        if output:
            taps.append((nodes, names, output))
        elif names:
            found.append(_unseen(scope))
    if not taps:
        return tuple(found)
    runner = Runner(tapped, providers, optimised=False, shapes_first=True)
    sizes = runner.run(feeds, [output for _, _, output in taps])
    for nodes, names, output in taps:
        for shapes in _read(names, sizes[output].tolist()):
            found += [_ran(node, shapes) for node in nodes]
    return tuple(found)


def _measured(node: onnx.NodeProto) -> list[str]:
    """The tensors whose shapes are needed to count a node's operations."""
    if is_in_table(node.op_type, node.domain):
        return [name for name in (*node.input, *node.output) if name]
    return [name for name in node.output if name][:1]


def _read(names: Sequence[str], sizes: Sequence[int]) -> Iterator[dict[str, Shape]]:
    """The shapes of all named tensors, once for each time that their graph ran.

    `sizes` holds for each tensor its rank and then its dimensions: `2, 3, 4, 1, 5` is a tensor
    of shape `(3, 4)` and one of shape `(5,)`.
    """
    at = 0
    while at < len(sizes):
        shapes = {}
        for name in names:
            rank = sizes[at]
            shapes[name] = tuple(sizes[at + 1 : at + 1 + rank])
            at += 1 + rank
        yield shapes


def _ran(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> Ran:
    run = NodeRun(
        text(node.op_type),
        text(node.domain),
        _attributes(node),
        tuple(shapes.get(name) for name in node.input),
        tuple(shapes.get(name) for name in node.output),
    )
    work = flops(run)
    counted = work is not None
    return Ran(
        text(node.name), run.op, slot_of(node), run.made if work is None else work, counted
    )


_READ = {onnx.AttributeProto.INT, onnx.AttributeProto.INTS, onnx.AttributeProto.STRING}
"""The types of attributes that a count depends on."""


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.type in _READ}
    return {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value
        for name, value in values.items()
    }


def _unseen(scope: walk.Scope) -> Ran:
    """The node whose body cannot be measured, as a node that is not counted."""
    assert scope.parent is not None
    node = scope.parent.graph.node[scope.owner]
    return Ran(text(node.name), text(node.op_type), slot_of(node), 0, counted=False)
