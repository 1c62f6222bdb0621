"""The order of a graph's nodes: ONNX wants it to be one to run in, ONNX Runtime finds one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx

from onnx_adapt.model import walk


def running_order(nodes: Sequence[onnx.NodeProto]) -> list[int] | None:
    """The places of nodes in an order in which they can run; None if they are in one."""
    if _in_order(nodes):
        return None
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    before = {
        i: {makers[name] for name in (*node.input, *walk.captured(node)) if name in makers}
        for i, node in enumerate(nodes)
    }
    if all(j < i for i, needed in before.items() for j in needed):
        return None
    try:
        return list(TopologicalSorter(before).static_order())
    except CycleError:
        return None  # no runtime takes that


def _in_order(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether each tensor is made before it is read, and by one node."""
    made: set[str] = set()
    read: set[str] = set()
    for node in nodes:
        read.update(node.input)
        if walk.has_bodies(node):
            read.update(walk.captured(node))
        names = [name for name in node.output if name]
        if not (made.isdisjoint(names) and read.isdisjoint(names)):
            return False
        made.update(names)
    return True
