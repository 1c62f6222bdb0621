"""`onnx-adapt slots`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, print_table, say, say_next

if TYPE_CHECKING:
    from onnx_adapt import Slot

SLOT_COLUMNS = (
    "slot",
    "tensor",
    "width",
    "axis",
    "dtype",
    "bottleneck",
    "activation",
    "parts",
)


def slot_row(slot: Slot) -> tuple[object, ...]:
    """One slot as a row of a table."""
    size = str(slot.bottleneck or "any") if slot.swappable else f"{slot.bottleneck} (baked)"
    size += " (batched)" if slot.batched else ""
    parts = " ".join(slot.parts)
    width: object = slot.width
    axis: object = slot.axis
    if slot.on_weight:
        width, axis = "x".join(map(str, slot.weight_shape)), "weight"
    what = width, axis, slot.dtype, size, slot.activation, parts
    return (slot.name, slot.tensor, *what)


def slot_dict(slot: Slot) -> dict[str, object]:
    """One slot for `--json`, with the input names of its weights."""
    names = {part: slot.weight(part) for part in slot.parts}
    rows = {part: slot.weight(part) for part in slot.row_parts}
    return {**asdict(slot), "weights": names, "rows": rows}


@click.command("slots", short_help="List the slots of a model.")
@click.argument("model", type=click.Path())
@options.as_json
def command(model: str, as_json: bool) -> None:
    """List the slots of MODEL, as recorded in its manifest.

    \b
      onnx-adapt slots model.adapted.onnx --json
    """
    import onnx_adapt as oa
    from onnx_adapt.edit.unfuse import unfused_nodes
    from onnx_adapt.edit.weights import check_weights

    opened = oa.open_model(model)
    slots = oa.list_slots(opened)
    check_weights(opened.proto, slots)
    if as_json:
        unfused = [asdict(item) for item in unfused_nodes(opened)]
        print_json({"slots": [slot_dict(slot) for slot in slots], "unfused": unfused})
    elif slots:
        print_table(SLOT_COLUMNS, [slot_row(slot) for slot in slots])
    if not slots:
        say(f"{opened.label} has no slots; `onnx-adapt insert` adds some")
        say_next("sites", model)
    elif any(slot.swappable for slot in slots):
        say_next("convert", "trained/", "--for", model, "-o", "NAME.onnx_adapter")
    else:
        say_next("remove", model)
