"""Where the forward part of a step model can be cut: places that one tensor alone passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx

from onnx_adapt.dtypes import Array
from onnx_adapt.graph.gradients.tape import PREFIX
from onnx_adapt.model import walk
from onnx_adapt.ort import Providers
from onnx_adapt.training.data import Batch
from onnx_adapt.training.session import TrainingSession
from onnx_adapt.training.step_model import StepModel

SIZES = {"Shape", "Size"}
"""Operators that read no numbers of a tensor."""

_SAME_MEMORY = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
"""Operators whose output is what they read, in the same memory."""


@dataclass(slots=True)
class StepGraph:
    """What is known of the graph of a step model.

    Attributes:
        forward: The forward nodes that depend on weights and on the data, in order.
        backward: The nodes that compute gradients, in order.
        made: The place in `forward` of the node that makes a tensor.
        read: The last place in `forward` that reads a tensor.
        wanted: The tensors of `forward` that the way back reads.
        moving: The tensors that depend on the data alone or that are fed, not weights.
    """

    forward: list[onnx.NodeProto] = field(default_factory=list)
    backward: list[onnx.NodeProto] = field(default_factory=list)
    made: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)
    moving: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, step: StepModel) -> StepGraph:
        """Look at all nodes."""
        found = cls()
        changing = set(step.grads)
        found.moving = {*step.inputs}
        for node in step.model.proto.graph.node:
            names = [*filter(None, node.input), *walk.captured(node)]
            if node.name.startswith(PREFIX):
                found.backward.append(node)
                if node.op_type not in SIZES:
                    found.wanted.update(name for name in names if name in found.made)
                continue
            depends = not changing.isdisjoint(names)
            moves = not found.moving.isdisjoint(names) or any(n in found.made for n in names)
            if depends:
                changing.update(node.output)
            if depends and moves:
                place = len(found.forward)
                found.forward.append(node)
                found.made.update(dict.fromkeys(filter(None, node.output), place))
                found.read.update(dict.fromkeys(names, place))
            elif moves:
                found.moving.update(node.output)
        return found

    def roots(self) -> set[str]:
        """The tensors that the way back reads, those of one memory once."""
        return {self._root(name) for name in self.wanted}

    def _root(self, name: str) -> str:
        node = self.forward[self.made[name]]
        while node.op_type in _SAME_MEMORY and node.input[0] in self.made:
            name = node.input[0]
            node = self.forward[self.made[name]]
        return name

    def necks(self) -> dict[int, str]:
        """The places behind which one tensor alone is passed on, and that tensor."""
        found: dict[int, str] = {}
        live: set[str] = set()
        for place, node in enumerate(self.forward):
            live.update(name for name in node.output if self.read.get(name, -1) > place)
            live = {name for name in live if self.read[name] > place}
            if len(live) == 1:
                found[place] = next(iter(live))
        return found


def sizes_of(
    step: StepModel,
    graph: StepGraph,
    weights: Mapping[str, Array],
    batch: Batch,
    providers: Providers,
) -> dict[str, int]:
    """The bytes of the tensors that are kept for the way back, or may be, for a batch."""
    names = list(dict.fromkeys((*graph.roots(), *graph.necks().values())))
    tapped = step.model.copy()
    there = {value.name for value in tapped.proto.graph.output}
    for name in names:
        if name not in there:
            tapped.proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = TrainingSession(tapped, providers)
    values = session.run({**batch.feeds(step.labels), **weights}, names, batch.name)
    return {name: value.nbytes for name, value in values.items()}


def choose_necks(graph: StepGraph, sizes: Mapping[str, int]) -> tuple[dict[int, str], int]:
    """The necks to cut at, so that least is kept at once, and how many bytes that are.

    While a stretch is on its way back, its gradients take about as much as its activations.
    With few cuts the stretches are long, with many the kept tensors are; several lengths are
    tried. An example with 8 stretches of 8 bytes and necks of 1: one cut keeps 1 + 64 bytes,
    three keep 3 + 32, and seven keep 7 + 16.
    """
    necks = graph.necks()
    roots = graph.roots()
    held = [
        sum(sizes[name] for name in node.output if name in roots) for node in graph.forward
    ]
    whole = sum(held)
    best: tuple[dict[int, str], int] = ({}, whole)
    for parts in range(2, _MOST_PARTS):
        limit = whole / parts
        found: dict[int, str] = {}
        lengths, begun = [], 0
        places = sorted(necks)
        for place, after in zip(places, (*places[1:], len(held) - 1), strict=True):
            length = sum(held[begun : place + 1])
            if length and sum(held[begun : after + 1]) > limit:
                found[place] = necks[place]
                lengths.append(length)
                begun = place + 1
        lengths.append(sum(held[begun:]))
        most = sum(sizes[name] for name in found.values()) + 2 * max(lengths)
        best = min(best, (found, most), key=lambda item: item[1])
    return best


_MOST_PARTS = 64
"""The most stretches that are tried."""
