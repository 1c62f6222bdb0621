"""Whether the rows of a batch get the adapters that they are given."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import RunError
from onnx_adapt.graph.index import read_type
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.ort import Providers
from onnx_adapt.proof.compare import movement
from onnx_adapt.proof.feeds import Feeds, required_inputs
from onnx_adapt.proof.result import Check
from onnx_adapt.proof.roundings import Distance, beyond
from onnx_adapt.proof.runner import Runner, Values
from onnx_adapt.session.batches import BatchAxes, Shape, find_batch, take_rows
from onnx_adapt.session.mixing import pack, row_feeds
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import PARTS, Blend, Draw
from onnx_adapt.slot.places import owners, places
from onnx_adapt.slot.weights import fan_in, neutral_weights, part_shape

_ADAPTERS = 3
_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
_CLEAR = 10
"""How many times the tolerance the outputs must move, so that a mix-up is noticed."""


def check_rows(
    model: Model,
    slots: Sequence[Slot],
    feeds: Sequence[Feeds],
    spread: float,
    seed: int,
    providers: Providers,
) -> Check:
    """Check that each row of a mixed batch is computed with the adapter meant for it.

    One run gives each row another adapter, and is compared with runs that give all rows the
    same one. If the first axis of a tensor is not the batch, or has the rows in another
    order, a row gets the adapter of another row and this check fails.

    The tolerance comes from two runs for each adapter: one with it alone, and one with it
    packed among the others. A row of the mixed run must lie between its rows of these two,
    or outside by no more than these, or the base's own outputs, differ.

    Args:
        model: A model with batched slots, all off.
        slots: The batched slots.
        feeds: Inputs that the model runs with.
        spread: How much the base's own outputs differ, relative to their largest value.
        seed: The seed of the random adapters.
        providers: Where the model runs.
    """
    proof = _RowProof(model, slots, spread, seed, providers)
    try:
        found = [proof.measure(item, _ADAPTERS + i) for i, item in enumerate(feeds)]
    except RunError as error:
        return Check("rows", False, proof.blamed(error.message))
    if None in found:
        return Check("rows", False, "no batch of several rows can be made of these inputs")
    measured = [item for item in found if item]
    wrong = next((apart for _, apart in measured if not apart.within), None)
    if wrong is not None and _shares_ranges(model):
        return Check(
            "rows",
            False,
            f"rows are {wrong.far:.1e} away: the model quantises with one range for all rows "
            "of a batch, so the adapter of one row changes how others are rounded",
        )
    if wrong is not None:
        return Check("rows", False, proof.blamed(f"rows are {wrong.far:.1e} away"))
    warning = "random adapters move the outputs too little to tell rows apart"
    clear = all(moved > _CLEAR * apart.allowed for moved, apart in measured)
    worst = max(apart.far for _, apart in measured)
    how = f"at worst {worst:.1e} away from" if worst else "as in"
    detail = f"{_ADAPTERS} adapters in one run, {how} one at a time"
    return Check("rows", True, detail, () if clear else (warning,))


def _shares_ranges(model: Model) -> bool:
    """Whether the range of a quantised tensor depends on all rows of a batch."""
    nodes = (node for scope in walk.scopes(model.proto.graph) for node in scope.graph.node)
    return any(node.op_type.startswith("DynamicQuantize") for node in nodes)


class _RowProof:
    """The runs behind the check."""

    def __init__(
        self,
        model: Model,
        slots: Sequence[Slot],
        spread: float,
        seed: int,
        providers: Providers,
    ) -> None:
        self._runner = Runner(model, providers, optimised=True)
        self._slots = slots
        self._spread = spread
        self._rng = np.random.default_rng(seed)
        self._recorded = _shapes(model.proto.graph.output)
        self._axes = find_batch(_shapes(required_inputs(model.proto)), self._recorded, None)
        self._last: tuple[Feeds, int, float] | None = None

    def measure(self, feeds: Feeds, rows: int) -> tuple[float, Distance] | None:
        """How far random adapters move the outputs, and how far rows are from what they are.

        Returns:
            Both relative to the outputs' largest values; None if there is but one row.
        """
        batch, count = _widened(self._axes, feeds, rows, self._doubtful())
        if count < 2:
            return None
        still = self._runner.run(batch, list(self._axes.outputs))
        self._axes = _seen(self._axes, self._recorded, still, count)
        names = [name for name, axis in self._axes.outputs.items() if axis is not None]
        if not names:
            return None
        still = {name: still[name] for name in names}
        for strength in _STRENGTHS:
            self._last = (batch, count, strength)
            wanted, got = self._runs(batch, count, strength, self._slots, names)
            moved, apart = movement(still, wanted[0]), self._apart(wanted, got)
            if moved > _CLEAR * apart.allowed:
                break
        return moved, apart

    def _apart(self, wanted: Sequence[Values], got: Values) -> Distance:
        return beyond([[run] for run in wanted], [got], self._spread)

    def _doubtful(self) -> set[object]:
        """The numbers of rows that outputs are recorded with and may not have."""
        ends = self._axes.outputs
        return {
            shape[0] for name, shape in self._recorded.items() if shape and ends[name] is None
        }

    def blamed(self, message: str) -> str:
        """A message with the first slot that fails by itself."""
        names = [name for name, axis in self._axes.outputs.items() if axis is not None]
        for slot in owners(self._slots) if self._last else ():
            assert self._last is not None
            try:
                wanted, got = self._runs(*self._last, [slot], names)
            except RunError as error:
                return f"slot {slot.name!r}: {error.message}"
            if not self._apart(wanted, got).within:
                tensors = [repr(place.tensor) for place in places(self._slots, slot.name)]
                return (
                    f"slot {slot.name!r} gives rows the wrong adapter; is the first axis of "
                    f"{' and of '.join(tensors)} the batch?"
                )
        return message

    def _runs(
        self,
        batch: Feeds,
        count: int,
        strength: float,
        slots: Sequence[Slot],
        names: list[str],
    ) -> tuple[list[Values], Values]:
        """The outputs of rows that ran with all of their adapter, twice, and a mixed run's."""
        own = owners(slots)
        adapters = [
            Adapter(str(i), {s.name: _random(s, i + 1, strength, self._rng) for s in own})
            for i in range(_ADAPTERS)
        ]
        number = np.arange(count) % _ADAPTERS
        packed = pack(slots, adapters)

        def mixed(rows: Array) -> Values:
            shares = row_feeds(packed, np.eye(_ADAPTERS)[rows])
            return self._runner.run({**batch, **packed.adapter.feeds(), **shares}, names)

        alone = [self._runner.run({**batch, **a.feeds()}, names) for a in adapters]
        among = [mixed(np.full(count, which)) for which in range(_ADAPTERS)]
        wanted = [self._gathered(runs, number, names) for runs in (alone, among)]
        return wanted, mixed(number)

    def _gathered(self, runs: Sequence[Values], number: Array, names: list[str]) -> Values:
        """The outputs with each row from the run of its number."""
        gathered = {}
        for name in names:
            axis = self._axes.outputs[name] or 0
            rows = [np.take(runs[which][name], row, axis) for row, which in enumerate(number)]
            gathered[name] = np.stack(rows, axis)
        return gathered


def _shapes(values: Iterable[onnx.ValueInfoProto]) -> dict[str, Shape]:
    """The declared shape of each tensor, empty if there is none."""
    return {value.name: read_type(value).shape or () for value in values}


def _seen(
    axes: BatchAxes, recorded: Mapping[str, Shape], outputs: Values, rows: int
) -> BatchAxes:
    """The batch also in outputs that lead with the rows where their record has a number.

    Models are exported for one row and made dynamic at their inputs alone. A record that
    is right has the number that comes out; that output does not follow the rows.
    """
    ends = dict(axes.outputs)
    for name, shape in recorded.items():
        if ends[name] is None and shape and isinstance(shape[0], int):
            follows = np.shape(outputs[name])[:1] == (rows,) != shape[:1]
            ends[name] = 0 if follows else None
    return replace(axes, outputs=ends)


def _widened(
    axes: BatchAxes, feeds: Feeds, rows: int, doubtful: set[object]
) -> tuple[Feeds, int]:
    """The feeds with at least so many rows and no doubtful number, and how many they have."""
    sizes = {
        np.shape(feeds[name])[axis]
        for name, axis in axes.inputs.items()
        if axis is not None and name in feeds
    }
    if len(sizes) != 1:
        return feeds, 0
    (count,) = sizes
    wanted = next(n for n in itertools.count(max(count, rows)) if n not in doubtful)
    if axes.fixed or not count or wanted == count:
        return feeds, count
    return take_rows(axes, feeds, [i % count for i in range(wanted)]), wanted


def _random(
    slot: Slot, size: int, strength: float, rng: np.random.Generator
) -> Mapping[str, Array]:
    weights = neutral_weights(slot, size)  # a norm of its own all adapters have in common
    for part in (part for part in slot.parts if PARTS[part].blend is not Blend.SHARED):
        value, how = rng.standard_normal(part_shape(slot, part, size)), PARTS[part].draw
        if how is Draw.FAN_IN:
            value /= np.sqrt(fan_in(slot, part))
        elif how is Draw.TARGET:
            value *= strength / np.sqrt(size)
        elif how is Draw.NEAR_ONE:
            value = 1 + 0.3 * value
        weights[part] = value.astype(DTYPES[slot.dtype])
    return weights
