"""Where the features of a tensor are: on the last axis, or on axis 1 behind convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from onnx_adapt.graph.index import GraphView, ModelIndex, Shape
from onnx_adapt.graph.layers import CHANNELS, KINDS, is_layer


def channel_tensors(index: ModelIndex) -> dict[str, set[str]]:
    """The tensors whose features are on axis 1, by the path of their graph.

    Convolutions and the normalisations that go with them make such tensors. What is
    computed from one is one too, as long as the operator leaves axis 1 in its place.
    """
    layout = _Layout({path: set() for path in index.views}, {})
    for view in index.views.values():
        if view.parent is not None:
            owner = (view.parent.scope.path, view.scope.owner)
            layout.bodies.setdefault(owner, []).append(view)
    layout.follow(index.main)
    return layout.channels


_MIXING = {"Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention"}
"""Operators whose output may have the rank of an input and yet other axes."""

_RESHAPING = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
"""Operators that keep the order of the elements: axis 1 stays if axes 0 and 1 do."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The walk over a model's graphs.

    Attributes:
        channels: Graph path -> its tensors with features on axis 1.
        bodies: Graph path and node -> the graphs inside that node.
    """

    channels: dict[str, set[str]]
    bodies: dict[tuple[str, int], list[GraphView]]

    def follow(self, view: GraphView) -> None:
        """Mark the tensors of one graph and of the bodies in it, in order."""
        marked = self.channels[view.scope.path]
        for i, node in enumerate(view.nodes):
            outputs = [name for name in node.output if name]
            kind = KINDS.get(node.op_type)
            bodies = self.bodies.get((view.scope.path, i), ())
            if bodies:
                for body in bodies:
                    marked.update(self._through(view, node, body))
            elif kind is not None and kind.axis == CHANNELS:
                shapes = {name: view.type_of(name).shape for name in outputs}
                marked.update(name for name, s in shapes.items() if s is None or len(s) > 2)
            elif kind is None or (node.op_type == "Gather" and not is_layer(view, node)):
                read = [x for x in node.input if self._is_marked(view, x)]
                before = [view.type_of(name).shape for name in read]
                marked.update(
                    name
                    for name in outputs
                    if any(_stays(node, shape, view.type_of(name).shape) for shape in before)
                )

    def _through(self, view: GraphView, node: onnx.NodeProto, body: GraphView) -> set[str]:
        """Mark a body, and find the outputs of its node that hand out what is marked."""
        inputs = [value.name for value in body.scope.graph.input]
        results = [value.name for value in body.scope.graph.output]
        if node.op_type == "Loop":
            results = results[1:]  # the first says whether to go on
        self.channels[body.scope.path].update(
            self._handed(view, node.input, body, inputs, node)
        )
        self.follow(body)
        return self._handed(body, results, view, node.output, node)

    def _handed(
        self,
        giver: GraphView,
        given: Iterable[str],
        taker: GraphView,
        taken: Iterable[str],
        node: onnx.NodeProto,
    ) -> set[str]:
        """The names in another graph of the marked tensors among those handed to it."""
        return {
            there
            for here, there in zip(given, taken, strict=False)
            if self._is_marked(giver, here)
            and _stays(node, giver.type_of(here).shape, taker.type_of(there).shape)
        }

    def _is_marked(self, view: GraphView, tensor: str) -> bool:
        home = view.home(tensor) if tensor else None
        return home is not None and tensor in self.channels[home.scope.path]


def _stays(node: onnx.NodeProto, before: Shape | None, after: Shape | None) -> bool:
    """Whether axis 1 of an input is axis 1 of an output."""
    if node.op_type == "Transpose":
        orders = [list(item.ints) for item in node.attribute if item.name == "perm"]
        return any(order[1:2] == [1] for order in orders)
    if node.op_type in _MIXING:
        return False
    if before is None or after is None:
        return node.op_type not in _RESHAPING
    if node.op_type in _RESHAPING:
        return len(after) > 2 and before[:2] == after[:2] and None not in before[:2]
    return len(after) > 2 and len(before) == len(after)
