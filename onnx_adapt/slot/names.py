"""The names of a slot in a model: its weights, its nodes and the tensors that they make.

Everything that a slot adds to a model is called `adapter.<slot>` and something more: a
weight `adapter.<slot>.<part>`, a node and its output `adapter.<slot>/<label>`. Labels and
parts have neither dot nor slash, so a name comes apart again at the last of them.
"""

from __future__ import annotations

_PREFIX = "adapter."


def slot_prefix(slot: str) -> str:
    """What all names of a slot begin with, before the dot or slash."""
    return f"{_PREFIX}{slot}"


def weight_name(slot: str, part: str) -> str:
    """The name of one weight of a slot in a model, in a file, and as an input.

    Example:
        >>> weight_name("encoder.0", "down")
        'adapter.encoder.0.down'
    """
    return f"{slot_prefix(slot)}.{part}"


def node_name(slot: str, label: str) -> str:
    """The name of one node of a slot, and of the tensor that it makes.

    Example:
        >>> node_name("encoder.0", "act")
        'adapter.encoder.0/act'
    """
    return f"{slot_prefix(slot)}/{label}"


def inner_name(slot: str) -> str:
    """The name that the site's tensor has before the slot, where nothing else reads it."""
    return node_name(slot, "target")


def changed_weight(slot: str) -> str:
    """The name of what a slot on a weight makes of it.

    Example:
        >>> changed_weight("encoder.0")
        'adapter.encoder.0/weight'
    """
    return node_name(slot, "weight")


def changed_input(slot: str) -> str:
    """The name of what a slot on the input of one layer makes of it.

    Example:
        >>> changed_input("encoder.0.input")
        'adapter.encoder.0.input/input'
    """
    return node_name(slot, "input")


def split_weight(name: str) -> tuple[str, str] | None:
    """The slot and part of a weight's name; None if it is no name of a slot's weight.

    Example:
        >>> split_weight("adapter.encoder.0.down")
        ('encoder.0', 'down')
        >>> split_weight("classifier.weight") is None
        True
    """
    return _split(name, ".")


def split_node(name: str) -> tuple[str, str] | None:
    """The slot and label of a node's name; None if it is no name of a slot's node.

    Example:
        >>> split_node("adapter.encoder.0/act")
        ('encoder.0', 'act')
    """
    return _split(name, "/")


def _split(name: str, mark: str) -> tuple[str, str] | None:
    if not name.startswith(_PREFIX):
        return None
    slot, found, last = name.removeprefix(_PREFIX).rpartition(mark)
    return (slot, last) if found and slot else None
