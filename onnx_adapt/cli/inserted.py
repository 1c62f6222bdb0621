"""What `onnx-adapt insert` prints about its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_adapt.cli.outputs import print_json, print_table, say, tell_saved
from onnx_adapt.cli.slots import SLOT_COLUMNS, slot_dict, slot_row
from onnx_adapt.slot.places import owners
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt import Model, Report, Slot
    from onnx_adapt.model.file import Saved

_MOST_WARNINGS = 3
"""How many warnings about ranges are printed; they are the same for each slot."""


def _new_places(base: Model, adapted: Model) -> list[Slot]:
    """The slots that the base does not have, each once for each of its places."""
    from onnx_adapt.edit.insert import all_places

    before = {slot.name for slot in all_places(base)}
    return [slot for slot in all_places(adapted) if slot.name not in before]


def show_inserted(
    base: Model,
    adapted: Model,
    saved: Saved,
    proof: Report | None,
    weights: Sequence[Path],
    *,
    calibrated: bool,
    as_json: bool,
) -> None:
    """Print what was inserted, proven and written."""
    from onnx_adapt.edit.ranges import widened_ranges
    from onnx_adapt.proof.saturation import range_warnings

    new = _new_places(base, adapted)
    warnings = [] if calibrated else range_warnings(adapted, new)
    widened = widened_ranges(adapted)
    if as_json:
        print_json(
            {
                "output": str(saved.path),
                "adapter": str(weights[0]) if weights else None,
                "size": saved.size,
                "data": [str(file) for file in saved.data],
                "weights_in": [str(file) for file in saved.weights_in],
                "verified": proof is not None,
                "warnings": warnings,
                "widened": widened,
                "slots": [slot_dict(slot, new) for slot in owners(new)],
            }
        )
    else:
        print_table(SLOT_COLUMNS, [slot_row(slot, new) for slot in owners(new)])
    if proof is not None:
        detail = next(check.detail for check in proof.checks if check.name == "off")
        say(f"verified against {base.label}: {detail}")
    tell_saved(saved)
    if not base.canonical:
        say(
            f"note: {base.label} is not encoded as protobuf encodes it; removing the slots "
            "gives the same model, but not the same bytes"
        )
    _tell_ranges(warnings, widened, calibrated=calibrated)
    for file in weights:
        say(f"wrote {file}; feed its tensors by name, or `onnx-adapt fill` them in")


def _tell_ranges(warnings: Sequence[str], widened: Sequence[str], *, calibrated: bool) -> None:
    """Print which ranges of a quantised model were widened, or may be too narrow."""
    from onnx_adapt.proof.result import CALIBRATE

    for text in warnings[:_MOST_WARNINGS]:
        say(f"warning: {text}")
    if len(warnings) > _MOST_WARNINGS:
        say(
            f"warning: the same of {len(warnings) - _MOST_WARNINGS} more slots; --json has all"
        )
    if warnings:
        say(f"hint: `onnx-adapt verify --adapter` measures it; {CALIBRATE}")
    if calibrated and not widened:
        say("note: no range was widened; all hold the adapter's values already")
    if widened:
        say(f"widened the ranges of {count(len(widened), 'QuantizeLinear node')}")
