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

from onnx_adapt.errors import ManifestError
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


def can_share(one: Slot, other: Slot) -> bool:
    """Whether weights of one slot have the shapes and the meaning that another needs."""
    return _form(one) == _form(other)


def _form(slot: Slot) -> tuple[object, ...]:
    """What slots with the same weights have in common."""
    sizes = (slot.width, slot.source_width, slot.bottleneck, slot.window)
    behind = slot.rank if slot.axis == 1 else 0
    kind = (slot.dtype, slot.axis, behind, slot.activation, slot.norm_after)
    columns = (slot.modules, slot.columns)
    return (*sizes, *kind, *columns, slot.parts, slot.swappable, slot.batched)


def check_names(slots: Sequence[Slot]) -> None:
    """Refuse slots of one record that have one name, or share weights that do not fit.

    Raises:
        ManifestError: If there are any.
    """
    by_name = {slot.name: slot for slot in slots}
    if len(by_name) != len(slots):
        raise ManifestError("two slots of the model have one name")
    for slot in slots:
        owner = by_name.get(slot.owner)
        if owner is None or owner.shares or not can_share(owner, slot):
            raise ManifestError(
                f"the record of slots in the model is damaged: slot {slot.name!r} cannot use "
                f"the weights of {slot.owner!r}",
                hint="another tool rewrote it; insert into the base model again",
            )
