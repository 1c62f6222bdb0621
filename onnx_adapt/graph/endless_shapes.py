"""Models whose shapes grow without end: a small file can double the axes node by node.

Shape inference would fill the memory with them, so they are bounded before it runs. For
example `x1 = Gather(x, x)`, `x2 = Gather(x1, x1)`, ... of a matrix `x` has 3, 5, 9, ... axes.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import onnx

from onnx_adapt.model import walk

MOST_AXES = 256
"""Four times what ONNX Runtime and numpy take."""

_MOST_NUMBERS, _COUNTED = 1 << 20, 1 << 12
_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)

_FOLLOWED = {"Add", "Sub", "Mul", "Cast", "Identity", "Slice", "Size"}
"""Operators whose numbers shape inference follows, beside those that change how many."""

Bound = tuple[int, int]
"""A tensor's axes, and how many of its numbers shape inference follows."""

Bounds = MutableMapping[str, Bound]


def has_endless_shapes(proto: onnx.ModelProto) -> bool:
    """Whether ONNX's shape inference might make shapes that would fill the memory.

    `Gather(x, x)` has twice the axes of `x`, and `Concat(s, s)` of a shape twice its
    numbers. Where an operator is not known to add some, it is taken to add none.
    """
    work = _Work({(f.domain, f.name, f.overload): f for f in proto.functions})
    try:
        return not work.fits(work.graph(proto.graph, ChainMap()))
    except RecursionError:  # functions in functions, deeper than ONNX itself goes
        return True


@dataclass(slots=True)
class _Work:
    functions: Mapping[tuple[str, str, str], onnx.FunctionProto]
    called: dict[tuple[object, ...], Bound] = field(default_factory=dict)

    @staticmethod
    def fits(bound: Bound) -> bool:
        return bound[0] <= MOST_AXES and bound[1] <= _MOST_NUMBERS

    def graph(self, graph: onnx.GraphProto, bounds: ChainMap[str, Bound]) -> Bound:
        """Bound the tensors of a graph; returns the largest that its outputs have."""
        declared = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*graph.value_info, *graph.input)
            if value.type.tensor_type.HasField("shape")
        }
        bounds.update((name, (axes, 0)) for name, axes in declared.items())
        bounds.update((tensor.name, _stored(tensor)) for tensor in graph.initializer)
        worst = _largest(bounds.maps[0].values())
        if self.fits(worst):
            worst = self.nodes(graph.node, bounds, declared)
        if not self.fits(worst):
            return worst
        return _largest(bounds.get(value.name, (0, 0)) for value in graph.output)

    def nodes(
        self,
        nodes: Iterable[onnx.NodeProto],
        bounds: ChainMap[str, Bound],
        declared: Mapping[str, int],
    ) -> Bound:
        """Bound what nodes make, in order; returns the first that is too large."""
        # Most graphs are in no other, and a dict is much faster than a chain of them.
        known = bounds if len(bounds.maps) > 1 else bounds.maps[0]
        for node in nodes:
            given = [known.get(name, (0, 0)) for name in node.input]
            made = self.node(node, given, bounds)
            if not self.fits(made):
                return made
            for name in node.output:
                known[name] = (declared.get(name, made[0]), made[1])
        return 0, 0

    def node(
        self, node: onnx.NodeProto, given: Sequence[Bound], bounds: ChainMap[str, Bound]
    ) -> Bound:
        """The largest that a node makes."""
        largest = _largest(given)
        if self.functions:
            function = self.functions.get((node.domain, node.op_type, node.overload))
            if function is not None:
                return self.call(function, tuple(given))
        inside = []
        for _, body in walk.bodies(node) if walk.has_bodies(node) else ():
            inner = bounds.new_child({value.name: largest for value in body.input})
            inside.append(self.graph(body, inner))
            if not self.fits(inside[-1]):
                return inside[-1]
        if inside:
            axes, numbers = _largest(inside)
            return axes + (node.op_type != "If"), numbers
        return _made(node, given, largest)

    def call(self, function: onnx.FunctionProto, given: tuple[Bound, ...]) -> Bound:
        """The largest that a function makes of what it is given."""
        key = (function.domain, function.name, function.overload, given)
        if key not in self.called:
            bounds: ChainMap[str, Bound] = ChainMap(
                dict(zip(function.input, given, strict=False))
            )
            worst = self.nodes(function.node, bounds, {})
            made = _largest(bounds.get(name, (0, 0)) for name in function.output)
            self.called[key] = made if self.fits(worst) else worst
        return self.called[key]


def _made(node: onnx.NodeProto, given: Sequence[Bound], largest: Bound) -> Bound:
    """What an operator makes, by how it changes the axes."""
    axes, numbers = largest
    listed = {item.name: len(item.ints) for item in node.attribute if item.ints}
    named = listed.get("axes", 0) or (given[1][1] if len(given) > 1 else 0)
    match node.op_type:
        case "Constant":
            tensors = [item.t for item in node.attribute if item.HasField("t")]
            return (
                _largest(map(_stored, tensors))
                if tensors
                else (1, max(listed.values(), default=1))
            )
        case "Shape":
            return 1, axes
        case "Gather" | "GatherND":
            found = given[1][1] or 1 if len(given) > 1 else 0
            return max(sum(a for a, _ in given) - 1, 0), found if given and given[0][1] else 0
        case "Concat":
            return axes, sum(n for _, n in given)
        case "Unsqueeze":
            return axes + named, numbers
        case "Squeeze":
            return max(axes - max(named, 1), 0), numbers
        case "Reshape" | "Expand" | "ConstantOfShape":
            return (given[-1][1] or axes, 0) if given else (0, 0)
        case str(op) if op.startswith(("Reduce", "Arg")):  # bytes where it is not UTF-8
            keeps = any(item.name == "keepdims" and item.i == 0 for item in node.attribute)
            return max(axes - keeps, 0), 0
    numbers = numbers if node.op_type in _FOLLOWED else 0
    return max(axes, *listed.values()) if listed else axes, numbers


def _stored(tensor: onnx.TensorProto) -> Bound:
    axes = len(tensor.dims)
    followed = axes == 1 and tensor.data_type in _INTEGERS
    return axes, min(max(tensor.dims[0], 0), _COUNTED) if followed else 0


def _largest(bounds: Iterable[Bound]) -> Bound:
    axes = numbers = 0
    for a, n in bounds:
        axes, numbers = max(axes, a), max(numbers, n)
    return axes, numbers
