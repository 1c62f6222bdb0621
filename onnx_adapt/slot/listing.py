"""The slots of a model as a table, for a terminal and for a notebook."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.places import places
from onnx_adapt.tables import html_table, text_table
from onnx_adapt.words import count

SLOT_COLUMNS = (
    "slot",
    "tensor",
    "places",
    "width",
    "axis",
    "dtype",
    "bottleneck",
    "activation",
    "parts",
)


def slot_row(slot: Slot, slots: Iterable[Slot]) -> tuple[object, ...]:
    """One slot as a row of a table, with the number of its places among all slots."""
    size = str(slot.bottleneck or "any") if slot.swappable else f"{slot.bottleneck} (baked)"
    size += " (batched)" if slot.batched else ""
    size += " (by token)" if slot.by_token else ""
    parts = " ".join(slot.parts)
    width: object = slot.width
    axis: object = slot.axis
    if slot.on_weight:
        width, axis = "x".join(map(str, slot.weight_shape)), "weight"
    what = width, axis, slot.dtype, size, slot.activation, parts
    return (slot.name, slot.tensor, len(places(slots, slot.name)), *what)


class Slots(tuple[Slot, ...]):
    """The slots of a model, a tuple; `print` shows them as a table.

    Attributes:
        everywhere: Each slot once for each of its places.
    """

    everywhere: tuple[Slot, ...]

    def __new__(cls, slots: Iterable[Slot], everywhere: Iterable[Slot] = ()) -> Slots:
        """Make the tuple, and keep what the table tells of places."""
        made = super().__new__(cls, slots)
        made.everywhere = tuple(everywhere) or tuple(made)
        return made

    def _rows(self) -> list[tuple[object, ...]]:
        return [slot_row(slot, self.everywhere) for slot in self]

    def __str__(self) -> str:
        """The table."""
        return text_table(SLOT_COLUMNS, self._rows()) if self else "no slots"

    def _repr_html_(self) -> str:
        return html_table(count(len(self), "slot"), SLOT_COLUMNS, self._rows())
