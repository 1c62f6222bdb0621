"""Slots that sit at several places with one set of weights.

A module that a model calls several times has one set of weights, and so has a slot on it. Each
place is a `Slot` of its own, with nodes, tensors and perhaps a graph of its own. The first has
the slot's name and owns the weights. The others are called `name@2`, `name@3`, ...; their
nodes read the weights of the first, which their field `shares` names.

For example a layer that ALBERT runs in two turns, with a slot `ffn` on it:

    turn 1: nodes `adapter.ffn/down`, ...     both read the weights `adapter.ffn.down`
    turn 2: nodes `adapter.ffn@2/down`, ...   and `adapter.ffn.up`

What is about weights goes over `owners(slots)`: adapters, files, inputs, costs in bytes. What
is about nodes goes over all slots: inserting, removing, proving.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from onnx_adapt.errors import SiteRefusedError
from onnx_adapt.slot.names import inner_name

if TYPE_CHECKING:
    from onnx_adapt.slot.manifest import Slot


def owners(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    """The slots that own weights: all but the further places of a slot."""
    return tuple(slot for slot in slots if not slot.shares)


def places(slots: Iterable[Slot], name: str) -> tuple[Slot, ...]:
    """The places of the slot with a name, its own first."""
    return tuple(slot for slot in slots if slot.owner == name)


def further_place(slot: Slot, owner: Slot, taken: Collection[str]) -> Slot:
    """Make a slot a further place of another, whose weights it uses.

    Args:
        slot: The slot, as it would be with weights of its own.
        owner: The slot that owns the weights.
        taken: Names that slots have.
    """
    number = 2
    while (name := f"{owner.name}@{number}") in taken:
        number += 1
    inner = inner_name(name)
    source = inner if slot.source == slot.inner else slot.source
    return replace(slot, name=name, shares=owner.name, inner=inner, source=source)


def refuse_stacking(before: Iterable[Slot], new: Sequence[Slot]) -> None:
    """Refuse to insert at a place where a slot is: it would rarely be meant.

    Raises:
        SiteRefusedError: If a new slot is on the tensor of one from before, or of another new
            one.
    """
    there = {(slot.graph, slot.tensor): slot.name for slot in before if not slot.on_edge}
    for slot in new:
        if slot.on_edge:
            continue
        place = slot.graph, slot.tensor
        if place in there:
            raise SiteRefusedError(
                f"slot {there[place]!r} is at {':'.join(place)} already",
                hint="adapters are made for the slot that is there; --stack puts another one "
                "behind it",
            )
        there[place] = slot.name


def can_share(one: Slot, other: Slot) -> bool:
    """Whether weights of one slot have the shapes and the meaning that another needs."""
    return one.needs == other.needs
