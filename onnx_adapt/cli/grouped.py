"""Many slots in a few rows: one for each module, with the layers that it is in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt import Slot

COLUMNS = ("module", "layers", "slots", "width", "dtype", "bottleneck", "activation", "parts")

_NUMBER = re.compile(r"(?<=[._/:])\d+(?=[._/:]|$)")
"""A number that is a part of a name, as the 3 of `layer.3.output` and of `dense_3`."""


@dataclass(frozen=True, slots=True)
class Group:
    """Slots whose names differ in numbers alone.

    Attributes:
        name: Their name, with `*` for the numbers that differ.
        layers: These numbers of each slot, in natural order.
        slots: The slots, in the same order.
    """

    name: str
    layers: tuple[tuple[int, ...], ...]
    slots: tuple[Slot, ...]


def natural(name: str) -> list[object]:
    """A key that sorts `layer.2` before `layer.10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def group_slots(slots: Iterable[Slot]) -> list[Group]:
    """Group slots whose names differ in numbers alone, in natural order.

    For example `h.0.fc`, `h.1.fc` and `head` are two groups: `h.*.fc` with the layers 0 and 1,
    and `head`.
    """
    alike: dict[str, list[Slot]] = {}
    for slot in sorted(slots, key=lambda slot: natural(slot.name)):
        alike.setdefault(_NUMBER.sub("*", slot.name), []).append(slot)
    return [_group(members) for members in alike.values()]


def _group(slots: Sequence[Slot]) -> Group:
    numbers = [[int(text) for text in _NUMBER.findall(slot.name)] for slot in slots]
    differs = [len(set(column)) > 1 for column in zip(*numbers, strict=True)]
    stars = iter(differs)
    name = _NUMBER.sub(lambda found: "*" if next(stars) else found[0], slots[0].name)
    layers = [tuple(n for n, odd in zip(row, differs, strict=True) if odd) for row in numbers]
    return Group(name, tuple(layers), tuple(slots))


def summary(groups: Sequence[Group]) -> str:
    """How many slots there are: `168 slots: 7 modules in 24 layers`."""
    slots = sum(len(group.slots) for group in groups)
    layers = {layer for group in groups for layer in group.layers if layer}
    modules = count(len(groups), "module")
    where = f"{modules} in {count(len(layers), 'layer')}" if layers else modules
    return f"{count(slots, 'slot')}: {where}"


def group_row(group: Group) -> tuple[object, ...]:
    """A group as a row of a table; what is not the same in all its slots is `several`."""

    def same(tell: Callable[[Slot], object]) -> object:
        values = {tell(slot) for slot in group.slots}
        return values.pop() if len(values) == 1 else "several"

    return (
        group.name,
        _ranges(group.layers),
        len(group.slots),
        same(lambda slot: slot.width),
        same(lambda slot: slot.dtype),
        same(lambda slot: str(slot.bottleneck or "any")),
        same(lambda slot: slot.activation),
        same(lambda slot: " ".join(slot.parts)),
    )


def _ranges(layers: Sequence[tuple[int, ...]]) -> str:
    """The numbers of layers: `0-11, 13`; of pairs such as (0, 1) each."""
    if any(len(layer) != 1 for layer in layers):
        return "" if layers == ((),) else f"{len(layers)} of them"
    runs: list[list[int]] = []
    for (number,) in layers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
