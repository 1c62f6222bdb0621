"""What commands that change adapters print about each slot: its rank, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from onnx_adapt.cli.outputs import print_table

if TYPE_CHECKING:
    from onnx_adapt import Adapter


def percent(loss: float | None) -> str:
    """A loss in percent; what cannot be told, or is relative to nothing, is `-`."""
    if loss is None or not math.isfinite(loss):
        return "-"
    return f"{loss:.2%}" if loss >= 1e-4 or not loss else f"{loss:.1e}"


def rank_of(adapter: Adapter, slot: str) -> int:
    """The bottleneck of a slot; 0 if it has none."""
    up = adapter.weights[slot].get("up")
    return 0 if up is None or up.ndim < 2 else int(up.shape[1 if up.ndim > 2 else 0])


def losses_for_json(losses: Mapping[str, float | None]) -> dict[str, float | None]:
    """Losses as JSON has numbers: what is not finite is null."""
    return {
        slot: None if loss is None or not math.isfinite(loss) else loss
        for slot, loss in losses.items()
    }


def show_losses(
    before: Adapter,
    after: Adapter,
    losses: Mapping[str, float | None],
    columns: tuple[str, str, str],
) -> None:
    """Print a table of slots: the rank before and after, and the loss; `columns` name them."""
    rows = [
        (slot, rank_of(before, slot), rank_of(after, slot), percent(loss))
        for slot, loss in losses.items()
    ]
    print_table(("slot", *columns), rows)
