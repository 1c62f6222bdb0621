"""Names for slots: what a model has no room for, and the first that is free."""

from __future__ import annotations

from onnx_adapt.graph.index import ModelIndex, text


def reserved_names(index: ModelIndex) -> set[str]:
    """The slot names that a model's tensors and symbols leave no room for."""
    # Nothing that a slot names has a dot or slash behind the name of the slot and its own.
    tensors = {
        tensor[len(_PREFIX) :].rpartition(mark)[0]
        for tensor in map(text, index.names())
        if tensor.startswith(_PREFIX)
        for mark in "./"
    }
    nodes = {
        name[len(_PREFIX) :].rpartition("/")[0]
        for view in index.views.values()
        for name in (text(node.name) for node in view.nodes)
        if name.startswith(_PREFIX)
    }
    symbols = {
        str(dim).removeprefix("r_")
        for view in index.views.values()
        for known in view.types.values()
        for dim in known.shape or ()
        if isinstance(dim, str)
    }
    return tensors | nodes | symbols


_PREFIX = "adapter."


def free_name(wanted: str, taken: set[str]) -> str:
    """`wanted`, or the first of `wanted.2`, `wanted.3`, ... that is not taken."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}.{number}"
    return name
