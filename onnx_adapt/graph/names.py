"""Names for slots: those that a model has already taken, and the first that is free."""

from __future__ import annotations

from onnx_adapt.graph.index import ModelIndex, text
from onnx_adapt.slot.names import slot_prefix, split_node, split_weight

_ALL = slot_prefix("")
"""What the names of all slots begin with; hardly any other name does."""


def reserved_names(index: ModelIndex) -> set[str]:
    """The slot names that a model's tensors and symbols leave no room for."""
    tensors = {
        found[0]
        for tensor in map(text, index.names())
        if tensor.startswith(_ALL)
        for found in (split_weight(tensor), split_node(tensor))
        if found
    }
    nodes = {
        found[0]
        for view in index.views.values()
        for node in view.nodes
        if (name := text(node.name)).startswith(_ALL) and (found := split_node(name))
    }
    shapes = {known.shape for view in index.views.values() for known in view.types.values()}
    symbols = {
        dim.removeprefix("r_")
        for shape in shapes
        for dim in shape or ()
        if isinstance(dim, str)
    }
    return tensors | nodes | symbols


def free_name(wanted: str, taken: set[str]) -> str:
    """`wanted`, or the first of `wanted.2`, `wanted.3`, ... that is not taken."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}.{number}"
    return name
