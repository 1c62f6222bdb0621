"""What `onnx-adapt insert` prints about its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_adapt.cli.grouped import COLUMNS, group_row, group_slots, natural, summary
from onnx_adapt.cli.outputs import print_json, print_table, say, size_text, tell_saved
from onnx_adapt.cli.slots import slot_dict
from onnx_adapt.slot.places import owners
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt import Adapter, Model, Report, Slot
    from onnx_adapt.model.file import Saved
    from onnx_adapt.report.costs import UpdateCost
    from onnx_adapt.slot.base_changes import Unfused
    from onnx_adapt.slot.manifest import Manifest

_MOST_NODES = 4
"""How many fused nodes that were written out are named; --json has all."""

_MOST_WARNINGS = 3
"""How many warnings about ranges are printed; they are the same for each slot."""


def _new_places(base: Model, manifest: Manifest) -> list[Slot]:
    """The slots that the base does not have, each once for each of its places."""
    from onnx_adapt.edit.insert import all_places

    before = {slot.name for slot in all_places(base)}
    return [slot for slot in manifest.slots if slot.name not in before]


@dataclass(frozen=True, slots=True)
class Shown:
    """How a result is shown.

    Attributes:
        calibrated: Whether ranges were widened as asked, so that they need no warning.
        long: Whether each slot has a line.
        as_json: Whether it is one JSON document.
    """

    calibrated: bool
    long: bool
    as_json: bool


_MOST_LINES = 12
"""How many slots have a line each; more are grouped by module."""


def _print_slots(slots: Sequence[Slot], *, long: bool) -> None:
    from onnx_adapt.slot.listing import SLOT_COLUMNS, slot_row

    own = sorted(owners(slots), key=lambda slot: natural(slot.name))
    groups = group_slots(own)
    if long or len(own) <= _MOST_LINES or len(groups) == len(own):
        print_table(SLOT_COLUMNS, [slot_row(slot, slots) for slot in own])
    else:
        print_table(COLUMNS, map(group_row, groups))
        say(f"{summary(groups)} (--long has a line for each)")


def show_planned(base: Model, adapted: Model, *, long: bool, as_json: bool) -> None:
    """Print what would be inserted."""
    from onnx_adapt.adapter.fitting import required_manifest

    new = _new_places(base, required_manifest(adapted))
    if as_json:
        slots = [slot_dict(slot, new) for slot in owners(new)]
        print_json({"output": None, "verified": False, "slots": slots})
    else:
        _print_slots(new, long=long)
    say(f"{count(len(owners(new)), 'slot')} would be inserted; nothing was proven or written")


def show_inserted(
    base: Model,
    adapted: Model,
    saved: Saved,
    proof: Report | None,
    weights: Sequence[Path],
    how: Shown,
) -> None:
    """Print what was inserted, proven and written."""
    from onnx_adapt.adapter.fitting import required_manifest
    from onnx_adapt.edit.ranges import widened_ranges

    manifest = required_manifest(adapted)
    new = _new_places(base, manifest)
    warnings = [] if how.calibrated else _range_warnings(adapted, new)
    widened, unfused = widened_ranges(manifest), manifest.unfused
    if how.as_json:
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
                "unfused": [asdict(item) for item in unfused],
                "slots": [slot_dict(slot, new) for slot in owners(new)],
            }
        )
    else:
        _print_slots(new, long=how.long)
    if proof is not None:
        detail = next(check.detail for check in proof.checks if check.name == "off")
        say(f"verified against {base.label}: {detail}")
    tell_saved(saved)
    if not base.canonical:
        say(
            f"note: {base.label} is not encoded as protobuf encodes it; removing the slots "
            "gives the same model, but not the same bytes"
        )
    _tell_ranges(warnings, widened, calibrated=how.calibrated)
    _tell_unfused(base, unfused)
    _tell_weights(weights, new)


def _range_warnings(adapted: Model, new: Sequence[Slot]) -> list[str]:
    """What to say of the ranges behind new slots; few models have any."""
    from onnx_adapt.graph.quantizers import has_quantizers

    if not has_quantizers(adapted.proto):
        return []
    from onnx_adapt.proof.saturation import range_warnings

    return range_warnings(adapted, new)


def _tell_weights(weights: Sequence[Path], slots: Sequence[Slot]) -> None:
    """Print where the weights are, and how they come into a run."""
    how = "feed its tensors by name, or `onnx-adapt fill` them in"
    if any(slot.by_token for slot in slots):
        how = "AdapterSession feeds it, and the tokens that it is on for"
    for file in weights:
        say(f"wrote {file}; {how}")


def _tell_unfused(base: Model, unfused: Sequence[Unfused]) -> None:
    """Print which fused nodes of the base were written out."""
    from onnx_adapt.edit.unfuse import unfused_nodes

    before = {item.label for item in unfused_nodes(base)}
    new = [f"{item.op} at {item.label!r}" for item in unfused if item.label not in before]
    listed = ", ".join(new[:_MOST_NODES]) + (", ..." if len(new) > _MOST_NODES else "")
    if new:
        say(
            f"wrote out {count(len(new), 'fused node')} of {base.label} ({listed}), which "
            "held what the slots need; `onnx-adapt remove` puts them back"
        )


_GROWN = 3
"""How many times its checkpoint's size an adapter may have before that is said."""


def tell_growth(adapter: Adapter, read: int) -> None:
    """Print how large an adapter is, where that is much more than what was read.

    Args:
        adapter: The adapter.
        read: How many bytes the tensors of its checkpoint have.
    """
    if adapter.size <= _GROWN * read:
        return
    replaced = count(len(adapter.replaced), "whole weight")
    why = f": it has {replaced} of the base" if adapter.replaced else ""
    say(
        f"note: the adapter needs {size_text(adapter.size)}, not the {size_text(read)} of its "
        f"checkpoint{why}"
    )


_MUCH = 0.05
"""What slots on weights may cost, as a part of the base's arithmetic, before it is said."""


def tell_update_cost(cost: UpdateCost | None) -> None:
    """Print what slots on weights compute in each run, where it is much."""
    if cost is None or cost.share <= _MUCH:
        return
    from onnx_adapt.report.numbers import by_unit

    shapes = ", ".join(
        f"{name} {list(getattr(value, 'shape', ()))}" for name, value in cost.feeds.items()
    )
    say(
        f"note: {count(cost.slots, 'slot')} on weights: {by_unit(cost.flops)} operations in "
        f"each run, whatever its inputs, {cost.share:.0%} of the base's with {shapes}"
    )
    say("hint: with --baked ONNX Runtime computes them once, when it loads the model")


def _tell_ranges(warnings: Sequence[str], widened: Sequence[str], *, calibrated: bool) -> None:
    """Print which ranges of a quantised model were widened, or may be too narrow."""
    for text in warnings[:_MOST_WARNINGS]:
        say(f"warning: {text}")
    if len(warnings) > _MOST_WARNINGS:
        say(f"warning: the same of {len(warnings) - _MOST_WARNINGS} more; --json has all")
    if warnings:
        from onnx_adapt.proof.result import CALIBRATE

        say(f"hint: `onnx-adapt verify --adapter` measures it; {CALIBRATE}")
    if calibrated and not widened:
        say("note: no range was widened; all hold the adapter's values already")
    if widened:
        say(f"widened the ranges of {count(len(widened), 'QuantizeLinear node')}")
