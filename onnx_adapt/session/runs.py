"""Runs of a model with one adapter for the whole batch, or with one for each row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.session.adapter_feeds import adapter_feeds
from onnx_adapt.session.batches import BatchAxes, count_rows, join_rows, take_rows
from onnx_adapt.session.cache import AdapterCache, Shares
from onnx_adapt.session.choosing import is_one_run_faster, positions_in_a_row
from onnx_adapt.session.loaded_model import LoadedModel
from onnx_adapt.session.ort_adapter import OrtAdapter


def run_one(
    model: LoadedModel,
    names: list[str],
    feeds: Mapping[str, Any],
    adapter: OrtAdapter | None,
) -> list[Any]:
    """Run a model once, every row with the same adapter or, with None, as the base.

    Raises:
        AdapterError: If a weight of the adapter is fed as well.
        RunError: If the model does not take the feeds.
    """
    if adapter is None:
        return model.run(names, feeds)
    refuse_overlap(feeds, adapter)
    feeds = {**feeds, **adapter_feeds(adapter, feeds, model.all_slots, model.inputs)}
    if adapter.options is None or model.neutral:  # ONNX Runtime's own checks see feeds only
        return model.run(names, {**feeds, **adapter.values})
    fed = {**feeds, **adapter.rest} if adapter.rest else feeds
    return model.run(names, fed, adapter.options)


@dataclass(frozen=True, slots=True)
class RowRuns:
    """The runs that a batch takes.

    Attributes:
        feeds: Arrays by input name.
        groups: The rows that have the same adapter, blend, or the base.
        shared: The feeds and weights for one run of all rows; None if each group has its own.
    """

    feeds: Mapping[str, Array]
    groups: Mapping[Shares, list[int]]
    shared: tuple[dict[str, Any], OrtAdapter] | None

    @property
    def rows(self) -> list[list[int]]:
        """The rows of each run."""
        each = list(self.groups.values())
        return [sorted(itertools.chain(*each))] if self.shared else each


def plan_rows(
    model: LoadedModel,
    cache: AdapterCache,
    axes: BatchAxes,
    feeds: Mapping[str, Any],
    rows: list[Shares],
) -> RowRuns:
    """Choose the runs for an adapter, a blend or the base for each row of the batch.

    An example: rows `[fr, base, fr, de]`. If all slots are batched, this can be one run of
    four rows with `fr` and `de` side by side. If not, it is three runs, of the rows [0, 2]
    with `fr`, [1] with nothing and [3] with `de`.

    Raises:
        AdapterError: If adapters cannot be used like this.
        RunError: If the number of rows is not that of the batch.
    """
    arrays = {name: np.asarray(value) for name, value in feeds.items()}
    count_rows(axes, arrays, len(rows))
    groups: dict[Shares, list[int]] = {} if rows else {(): []}
    for i, shares in enumerate(rows):
        groups.setdefault(shares, []).append(i)
    shared = None
    if len(groups) > 1 and model.is_batched:
        positions = positions_in_a_row(axes, model.inputs, arrays)
        measured = model.runs_on_cpu and not axes.fixed
        if not measured or is_one_run_faster(model.base_size, positions, groups):
            shared = _mixed(model, cache, arrays, rows)
    return RowRuns(arrays, groups, shared)


def run_rows(
    model: LoadedModel,
    cache: AdapterCache,
    axes: BatchAxes,
    names: list[str],
    planned: RowRuns,
) -> dict[str, Any]:
    """Run a batch as planned, and put the outputs of its runs together in order.

    Raises:
        AdapterError: If adapters cannot be used like this.
        RunError: If the model does not take the feeds.
    """
    if planned.shared is not None:
        return dict(zip(names, run_one(model, names, *planned.shared), strict=True))
    results = []
    whole = axes.fixed or len(planned.groups) == 1
    for shares, members in planned.groups.items():
        part = planned.feeds if whole else take_rows(axes, planned.feeds, members)
        results.append((members, run_one(model, names, part, cache.blend(shares))))
    if len(planned.groups) == 1:
        return dict(zip(names, results[0][1], strict=True))
    return join_rows(axes, names, results)


def _mixed(
    model: LoadedModel, cache: AdapterCache, feeds: Mapping[str, Any], rows: list[Shares]
) -> tuple[dict[str, Any], OrtAdapter] | None:
    """The feeds and weights for one run of all rows; None if they cannot share a run."""
    mixed = cache.mix(model.all_slots, rows)
    if mixed is None:
        return None
    own, weights = mixed
    if twice := own.keys() & feeds.keys():
        raise AdapterError(
            f"{min(twice)!r} is fed, and the list of adapters says it as well",
            hint="feed what each row has of its own, or give a list",
        )
    return {**feeds, **own}, weights


def weights_to_feed(feeds: Mapping[str, Any], adapter: OrtAdapter | None) -> Mapping[str, Any]:
    """The weights of an adapter as OrtValues, to be fed beside the feeds.

    Raises:
        AdapterError: If a weight of the adapter is fed as well.
    """
    if adapter is None:
        return {}
    refuse_overlap(feeds, adapter)
    return adapter.values


def refuse_overlap(feeds: Mapping[str, Any], adapter: OrtAdapter) -> None:
    """Refuse feeds of an adapter's weights: ONNX Runtime would silently ignore the feed.

    Raises:
        AdapterError: If there are any.
    """
    if twice := adapter.names & feeds.keys():
        raise AdapterError(
            f"{min(twice)!r} is fed, and it is in the adapter as well",
            hint="feed weights, or give an adapter",
        )
