"""`onnx-adapt slots`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, print_table, say, say_next
from onnx_adapt.slot.places import places

if TYPE_CHECKING:
    from onnx_adapt import Slot

_PLACE = ("name", "graph", "node", "tensor", "inner", "output", "source", "module")
"""What `--json` tells of each place of a slot."""


def slot_dict(slot: Slot, slots: Iterable[Slot]) -> dict[str, object]:
    """One slot for `--json`, with the input names of its weights and all its places."""
    names = {part: slot.weight(part) for part in slot.parts}
    rows = {part: slot.weight(part) for part in slot.row_parts}
    where = [
        {key: getattr(place, key) for key in _PLACE} for place in places(slots, slot.name)
    ]
    return {**asdict(slot), "weights": names, "rows": rows, "places": where}


@click.command("slots", short_help="List the slots of a model.")
@click.argument("model", type=click.Path())
@options.as_json
def command(model: str, as_json: bool) -> None:
    """List the slots of MODEL, as recorded in its manifest.

    A slot after a module that runs several times has one set of weights and several places;
    --json has each of them.

    \b
      onnx-adapt slots model.adapted.onnx --json
    """
    import onnx_adapt as oa
    from onnx_adapt.edit.insert import all_places
    from onnx_adapt.edit.unfuse import unfused_nodes
    from onnx_adapt.edit.weights import check_weights
    from onnx_adapt.slot.listing import SLOT_COLUMNS, slot_row

    opened = oa.open_model(model)
    slots = oa.list_slots(opened)
    everywhere = all_places(opened)
    check_weights(opened.proto, everywhere)
    if as_json:
        unfused = [asdict(item) for item in unfused_nodes(opened)]
        shown = [slot_dict(slot, everywhere) for slot in slots]
        print_json({"slots": shown, "unfused": unfused})
    elif slots:
        print_table(SLOT_COLUMNS, [slot_row(slot, everywhere) for slot in slots])
    if not slots:
        say(f"{opened.label} has no slots; `onnx-adapt insert` adds some")
        say_next("sites", model)
    elif any(slot.swappable for slot in slots):
        say_next("convert", "trained/", "--for", model, "-o", "NAME.onnx_adapter")
    else:
        say_next("remove", model)
