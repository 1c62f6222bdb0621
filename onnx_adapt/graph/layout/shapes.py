"""Shapes behind operators that shape inference does not know."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from onnx_adapt.graph.index import ModelIndex, Shape
from onnx_adapt.graph.layers import layer_weight, weight_width
from onnx_adapt.graph.layout import links
from onnx_adapt.graph.layout.facts import fact_of
from onnx_adapt.graph.layout.look import Look, Place, Step, step_of

_RESIZING = {
    *("Pad", "Slice", "Split", "Tile", "TopK", "Compress", "GatherElements", "Resize"),
    *("Upsample", "MaxPool", "AveragePool", "LpPool", "MaxUnpool", "GlobalAveragePool"),
    *("GlobalMaxPool", "GlobalLpPool", "QLinearAveragePool", "QLinearGlobalAveragePool"),
}
"""Operators that keep the number of axes but not all sizes."""


def missing(index: ModelIndex) -> dict[Place, Shape]:
    """The shapes of tensors that have none in an index, as far as their nodes tell."""
    found: dict[Place, Shape] = {}
    look = Look(index, found)
    for view in index.views.values():
        for node in view.nodes:
            for name in node.output[:1]:
                if name and view.type_of(name).shape is None:
                    shape = _made(look, step_of(view, node))
                    if shape is not None:
                        found[view.scope.path, name] = shape
    return found


def _made(look: Look, step: Step) -> Shape | None:
    view, node = step.view, step.node
    fact = fact_of(node.op_type)
    given = [look.shape(view, name) for name in step.inputs if name]
    first = given[0] if given else None
    weight = layer_weight(view, node)
    if weight is not None and "Conv" in node.op_type:
        rest = (None,) * (len(weight.dims) - 2)
        return (first[0] if first else None, weight_width(view, node), *rest)
    if first is None or fact is None:
        return None
    if fact.links is links.same:
        return (None,) * len(first) if node.op_type in _RESIZING else first
    if fact.links is links.product_of_matrices and weight is not None and len(weight.dims) > 1:
        return (*first[:-1], weight_width(view, node))
    if fact.links is links.transpose:
        order = step.integers("perm") or list(range(len(first)))[::-1]
        return tuple(first[k] for k in order) if len(order) == len(first) else None
    if fact.links is links.broadcast:
        known = [shape for shape in given if shape is not None]
        return _stretched(known) if len(known) == len(given) else None
    return None


def _stretched(shapes: Sequence[Shape]) -> Shape:
    """The shape of tensors that are stretched to each other's."""
    ends = [reversed(shape) for shape in shapes]
    sizes = itertools.zip_longest(*ends, fillvalue=1)
    return tuple(_larger(size) for size in sizes)[::-1]


def _larger(sizes: Sequence[int | str | None]) -> int | str | None:
    wide = [size for size in sizes if size != 1]
    numbers = [size for size in wide if isinstance(size, int)]
    return next(iter(numbers or wide), 1)
