"""Split a model in two: what the weights that train cannot change, and the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx
from onnx import helper

from onnx_adapt.dtypes import Array
from onnx_adapt.graph.gradients.backward import FLAT
from onnx_adapt.graph.gradients.moving import MOVING
from onnx_adapt.graph.gradients.norms import NORMS
from onnx_adapt.graph.gradients.pointwise import POINTWISE
from onnx_adapt.graph.gradients.reductions import REDUCTIONS
from onnx_adapt.graph.gradients.tape import PREFIX
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model

# A node is frozen if no weight that trains, and no label, leads to it: it gives the same in
# every step. What costs time among frozen nodes are products, convolutions and the like; a
# mask or a shape is computed again sooner than it is kept. So of the tensors between frozen
# nodes and the others those are kept that a costly node leads to. An example, with a slot
# behind layer 2 of three:
#
#     h = layer 1(x)        frozen and costly
#     d, n = dense(h), norm(h)    d is kept: the slot reads it. n costs little once h is there
#     m = Mask(ids)         computed again in the rest: no costly node leads to it
#     y = layer 3(slot(d) + n, m)
#
# The cut is at {d, n}, or at {d, h} where h is read by the rest too, and n follows from it.

LIGHT = frozenset(
    {
        *(*POINTWISE, *MOVING, *NORMS, *REDUCTIONS, *FLAT),
        *("Constant", "QuantizeLinear", "DequantizeLinear"),
    }
)
"""Operators whose time does not count beside that of a product or a convolution."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A model in two parts.

    Attributes:
        frozen: From the inputs to what is kept.
        behind: From the inputs, the weights and what is kept to the results; what is kept is
            not among its declared inputs yet.
        kept: The tensors that the first part gives to the second.
    """

    frozen: Model
    behind: Model
    kept: tuple[str, ...]

    def rest(self, values: Mapping[str, Array]) -> Model:
        """The second part.

        Args:
            values: What is kept, from a run of the first part, for its types.
        """
        result = self.behind.copy()
        for name in self.kept:
            kind = helper.np_dtype_to_tensor_dtype(values[name].dtype)
            axes = [None] * values[name].ndim
            result.proto.graph.input.append(helper.make_tensor_value_info(name, kind, axes))
        return result


def cut(
    model: Model,
    results: Sequence[str],
    changing: Iterable[str],
    again: Collection[str] = (),
) -> Cut | None:
    """Cut a model behind what never changes.

    Args:
        model: A model; nodes that compute gradients belong to the rest.
        results: The tensors that the rest computes.
        changing: The inputs that are not the same in each run for one sample.
        again: Frozen tensors that are not to be kept, but computed again.

    Returns:
        The two parts, or None if nothing that costs time is frozen.
    """
    graph = _Graph.read(model.proto.graph, set(changing))
    refused = set(again)
    while True:
        kept, places = graph.needed(results, refused)
        follows = {name for name in kept if graph.follows(name, kept)}
        if not follows:
            break
        refused |= follows
    if not kept:
        return None
    _, before = graph.needed(kept, graph.made.keys())
    frozen = _part(model, before, kept)
    return Cut(frozen, _part(model, places, results), tuple(kept))


@dataclass(slots=True)
class _Graph:
    """The nodes of a graph, and what is known of them.

    Attributes:
        nodes: The nodes.
        made: The place of the node that makes a tensor.
        frozen: The places of frozen nodes.
        costly: The places of frozen nodes that cost time, or have such a node before them.
    """

    nodes: list[onnx.NodeProto]
    made: dict[str, int] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    costly: set[int] = field(default_factory=set)

    @classmethod
    def read(cls, graph: onnx.GraphProto, changing: set[str]) -> _Graph:
        """Look at all nodes of a graph."""
        stored = {tensor.name for tensor in graph.initializer}
        given = {value.name for value in graph.input} - changing - stored
        found = cls(list(graph.node))
        for place, node in enumerate(found.nodes):
            reads = _reads(node)
            found.made.update(dict.fromkeys(filter(None, node.output), place))
            if node.name.startswith(PREFIX) or not changing.isdisjoint(reads):
                changing.update(node.output)
                continue
            found.frozen.add(place)
            before = {found.made[name] for name in reads if name in found.made}
            if not given.isdisjoint(reads):  # others depend on constants alone
                given.update(filter(None, node.output))
                if node.op_type not in LIGHT or not before.isdisjoint(found.costly):
                    found.costly.add(place)
        return found

    def needed(
        self, results: Iterable[str], refused: Collection[str]
    ) -> tuple[dict[str, None], list[int]]:
        """What some tensors need: the tensors that are kept, and the nodes behind those."""
        kept: dict[str, None] = {}
        places: set[int] = set()
        waiting = list(results)
        while waiting:
            name = waiting.pop()
            place = self.made.get(name)
            if place is None or place in places:
                continue
            if place in self.costly and name not in refused:
                kept[name] = None
                continue
            places.add(place)
            waiting += _reads(self.nodes[place])
        return kept, sorted(places)

    def follows(self, name: str, kept: Collection[str]) -> bool:
        """Whether a tensor follows from other kept ones at little cost."""
        waiting = [name]
        while waiting:
            node = self.nodes[self.made[waiting.pop()]]
            if node.op_type not in LIGHT:
                return False
            waiting += [
                read
                for read in _reads(node)
                if read not in kept and self.made.get(read) in self.costly
            ]
        return True


def _reads(node: onnx.NodeProto) -> list[str]:
    return [*filter(None, node.input), *walk.captured(node)]


def _part(model: Model, places: Sequence[int], results: Iterable[str]) -> Model:
    """Some nodes of a model, as a model of their own, with the inputs that they read."""
    whole = model.proto
    proto = onnx.ModelProto(ir_version=whole.ir_version)
    proto.opset_import.extend(whole.opset_import)
    proto.functions.extend(whole.functions)
    graph = proto.graph
    graph.name = whole.graph.name
    graph.node.extend(whole.graph.node[place] for place in places)
    read = {name for node in graph.node for name in _reads(node)}
    graph.initializer.extend(t for t in whole.graph.initializer if t.name in read)
    graph.sparse_initializer.extend(
        t for t in whole.graph.sparse_initializer if t.values.name in read
    )
    graph.input.extend(v for v in whole.graph.input if v.name in read)
    known = {value.name: value for value in whole.graph.output}
    for name in results:
        graph.output.append(known.get(name) or onnx.ValueInfoProto(name=name))
    return replace(model, proto=proto)
