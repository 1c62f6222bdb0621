"""Running the slots of a model with random weights and reading the tensors around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import DTYPES, ELEM_TYPES, Array
from onnx_adapt.edit.base_weights import undo_replaceable
from onnx_adapt.edit.weights import fill_weights, make_swappable, read_weights
from onnx_adapt.errors import SlotError
from onnx_adapt.graph.index import index_model
from onnx_adapt.graph.norms import own_norm
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.ort import Providers
from onnx_adapt.proof.compare import movement
from onnx_adapt.proof.deviation import Deviation, slot_deviation
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.runner import Runner, Values, as_arrays
from onnx_adapt.proof.taps import Tap, Tapper
from onnx_adapt.slot.formula import EPSILON
from onnx_adapt.slot.manifest import Slot, slot_of, write_manifest
from onnx_adapt.slot.oracle import Norm
from onnx_adapt.slot.parts import PARTS, Draw
from onnx_adapt.slot.places import owners, places
from onnx_adapt.slot.weights import (
    bottleneck_axis,
    fan_in,
    is_off,
    neutral_weights,
    part_shape,
    row_shape,
)

_LARGE = 1 << 22
"""A weight of more numbers is read in a run of its own: a mixture of experts has gigabytes."""
_SIZES = (1, 8, 64)
_STRENGTHS = (1.0, 10.0, 100.0)
"""How strong the random weights are; a quantised model may round a small change away."""


def neutral_model(model: Model) -> Model:
    """The model with every slot off; the model itself if its slots are off already."""
    manifest = required_manifest(model)
    slots = manifest.slots
    stored = read_weights(model, slots)
    changed: dict[str, Mapping[str, Array]] = {}
    for slot in owners(slots):
        weights = stored[slot.name]
        if not is_off(weights):
            size = slot.bottleneck or 0
            changed[slot.name] = neutral_weights(slot, size)
    result = fill_weights(model, changed) if changed else model
    trained = [weight for weight in manifest.weights if weight.trained]
    if trained:
        result = result.copy() if result is model else result
        undo_replaceable(result.proto, trained)
        rest = tuple(weight for weight in manifest.weights if not weight.trained)
        write_manifest(result.proto, replace(manifest, weights=rest))
    return result


@dataclass(slots=True)
class Measurement:
    """What was measured at one slot so far."""

    deviation: Deviation = field(default_factory=Deviation)
    bottlenecks: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _SlotTaps:
    target: Tap
    source: Tap
    output: Tap
    plus: Tap

    @property
    def names(self) -> list[str]:
        """The outputs to ask for."""
        taps = (self.target, self.source, self.output, self.plus)
        return list({name: None for tap in taps for name in (tap.values, tap.shapes)})


class Probe:
    """The adapted model with its slots swappable and its sites readable.

    Args:
        model: The adapted model.
        slots: Its slots.
        outputs: The model's own outputs.
        seed: The seed of the random weights.
        providers: Where the model runs.
    """

    def __init__(
        self,
        model: Model,
        slots: Sequence[Slot],
        outputs: Sequence[str],
        seed: int,
        providers: Providers,
    ) -> None:
        self._slots = slots
        large = [slot for slot in slots if math.prod(slot.weight_shape) > _LARGE]
        self._portions = [[s for s in slots if s not in large], *([slot] for slot in large)]
        self._outputs = list(outputs)
        self._rng = np.random.default_rng(seed)
        self._own = read_weights(model, slots)
        self._norms = {slot.name: read_norm(model, slot) for slot in slots if slot.norm}
        swappable = make_swappable(model)
        index = index_model(swappable)
        neutral = {slot.name: neutral_weights(slot) for slot in owners(slots)}
        swappable = fill_weights(swappable, neutral)
        tapper = Tapper(swappable.proto)
        self._taps: dict[str, _SlotTaps] = {}
        for slot in slots:
            view = index.views[slot.graph]
            names = (slot.inner, slot.source, slot.output, slot.plus or slot.inner)
            elem_types = [
                view.type_of(name).elem_type or ELEM_TYPES[slot.dtype] for name in names
            ]
            taps = [
                tapper.tap(slot.graph, name, elem_type)
                for name, elem_type in zip(names, elem_types, strict=True)
            ]
            if not all(taps):
                raise SlotError(
                    f"slot {slot.name!r} is inside an operator that hides its tensors",
                    hint="only If, Loop and Scan can be looked into; in Python "
                    "onnx_adapt.verify(base, adapted, weights=False) proves the rest",
                )
            self._taps[slot.name] = _SlotTaps(*(tap for tap in taps if tap))
        self._runner = Runner(
            replace(swappable, path=model.path),
            providers,
            optimised=True,
            fuse_quantised=False,
        )
        self._still: list[Values] = []
        self._typical: dict[str, list[tuple[float, float]]] = {}
        self._rows: dict[str, list[int]] = {}

    def measure(self, feeds: Sequence[Feeds]) -> dict[str, Measurement]:
        """Run with random weights of several bottlenecks and compare with the oracle."""
        found = {slot.name: Measurement() for slot in self._slots}
        for item in feeds:
            for portion, quiet in self._runs(item):
                still = {name: quiet[name] for name in self._outputs if name in quiet}
                self._still += [still] if portion is self._portions[0] else []
                for slot in owners(portion):
                    self._note(slot, quiet)
        for shift in range(len(_SIZES)):
            for number, item in enumerate(feeds):
                weights = {
                    slot.name: self._random(slot, self._size(slot, i + shift), number)
                    for i, slot in enumerate(owners(self._slots))
                }
                self._compare(item, weights, found)
        if any(not is_off(weights) for weights in self._own.values()):
            for item in feeds:
                self._compare(item, self._own, found)
        return found

    def _note(self, slot: Slot, quiet: Values) -> None:
        """Note the typical sizes of what a slot reads everywhere, and how many rows it has."""
        everywhere = [self._taps[place.name] for place in places(self._slots, slot.name)]
        source = _typical(quiet[taps.source.values] for taps in everywhere)
        target = _typical(quiet[taps.target.values] for taps in everywhere)
        self._typical.setdefault(slot.name, []).append((source, target))
        read = [value for taps in everywhere for value in taps.target.read(quiet)]
        sizes = {len(value) for value in read if value.ndim}
        rows = sizes.pop() if len(sizes) == 1 else 1
        self._rows.setdefault(slot.name, []).append(rows)

    def _runs(self, fed: Feeds) -> Iterator[tuple[list[Slot], Values]]:
        """Run once for each portion of the slots, to hold few large weights at a time.

        The model's own outputs come with the first portion.
        """
        outputs = self._outputs
        for portion in self._portions:
            taps = (name for slot in portion for name in self._taps[slot.name].names)
            yield portion, self._runner.run(fed, list(dict.fromkeys([*outputs, *taps])))
            outputs = []

    def _size(self, slot: Slot, turn: int) -> int:
        return slot.bottleneck or _SIZES[turn % len(_SIZES)]

    def effect(
        self, slot: Slot, feeds: Sequence[Feeds], seen: Mapping[str, Measurement]
    ) -> float:
        """How far the outputs move when one slot alone is on, at all its places.

        It is 0 if nothing moves. The smallest inputs are tried first, and the first that move
        an output are enough. A slot that read values that are not finite is measured here
        once more. Random weights of the slots before it may cause such values, by the root of
        a negative number or by overflow. Alone, a slot reads what the base computes.

        Args:
            slot: The slot, which owns its weights.
            feeds: The inputs, in the order of `measure`.
            seen: What was measured at each place so far.
        """
        again = [
            place
            for place in places(self._slots, slot.name)
            if seen[place.name].deviation.unjudged
        ]
        taps = {name for place in again for name in self._taps[place.name].names}
        by_size = sorted(range(len(feeds)), key=lambda number: _size_of(feeds[number]))
        for strength in _STRENGTHS:
            moved = 0.0
            for number in by_size:
                weights = self._random(slot, self._size(slot, 1), number, strength)
                fed = {**feeds[number], **_as_feeds(slot, weights)}
                got = self._runner.run(fed, [*self._outputs, *taps])
                moved = max(moved, movement(self._still[number], got))
                for place in again:
                    self._judge(place, got, weights, seen[place.name])
                if moved and not again:
                    return moved
            if moved:
                return moved
        return 0.0

    def _compare(
        self,
        item: Feeds,
        weights: Mapping[str, Mapping[str, Array]],
        found: Mapping[str, Measurement],
    ) -> None:
        fed = dict(item)
        for slot in owners(self._slots):
            fed.update(_as_feeds(slot, weights[slot.name]))
        for portion, got in self._runs(fed):
            for slot in portion:
                self._judge(slot, got, weights[slot.owner], found[slot.name])

    def _judge(
        self, slot: Slot, got: Values, weights: Mapping[str, Array], seen: Measurement
    ) -> None:
        """Add to what was measured how near the slot is to the formula, if it was computed."""
        taps = self._taps[slot.name]
        read = [taps.target, taps.source, taps.output, *([taps.plus] if slot.plus else [])]
        runs = zip(*(tap.read(got) for tap in read), strict=True)
        for tensors in (run for run in runs if run[0].size):
            seen.deviation |= slot_deviation(
                slot, tensors, weights, self._norms.get(slot.name)
            )
            axes = {part: bottleneck_axis(slot, part) for part in slot.parts}
            seen.bottlenecks |= {
                weights[part].shape[axis] for part, axis in axes.items() if axis is not None
            }

    def _random(
        self, slot: Slot, size: int, number: int, strength: float = 1.0
    ) -> dict[str, Array]:
        """Random weights whose effect has the size of the target itself."""
        source, target = self._typical[slot.name][number]
        if slot.on_weight:  # it multiplies `down` by `up`, and no source by `down`
            source = fan_in(slot, "down") ** -0.5
        rows = self._rows[slot.name][number]
        drawn: dict[str, tuple[tuple[int, ...], Draw]] = {
            part: (part_shape(slot, part, size), PARTS[part].draw) for part in slot.parts
        }
        for name, row in slot.row_forms.items():
            drawn[name] = (row_shape(slot, name, rows, size), row.draw)
        weights = {}
        for part, (shape, how) in drawn.items():
            value = self._rng.standard_normal(shape)
            if how is Draw.FAN_IN:
                value *= 1 / (source * np.sqrt(fan_in(slot, part)))
            elif how is Draw.TARGET:
                value *= 0.5 * strength * target / np.sqrt(max(size, 1))
            elif how is Draw.NEAR_ONE:
                value = 1 + 0.3 * value
            weights[part] = value.astype(DTYPES[slot.dtype])
        return weights


def read_norm(model: Model, slot: Slot) -> Norm:
    """The normalisation that a slot re-applies, with its weights."""
    view = index_model(model).views[slot.graph]
    node = own_norm([node for node in view.nodes if slot_of(node) == slot.name])
    if node is None:
        raise SlotError(f"slot {slot.name!r} is damaged: its normalisation is gone")
    tensors = [view.constant(name) for name in node.input[1:] if name]
    values = [read_tensor(model, t).astype(np.float64) for t in tensors if t is not None]
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), EPSILON)
    centred = node.op_type == "LayerNormalization"
    return Norm(values[0], values[1] if len(values) > 1 else None, epsilon, centred)


def _size_of(feeds: Feeds) -> int:
    """How many numbers inputs have in all."""
    return sum(array.size for value in feeds.values() for array in as_arrays(value))


def _as_feeds(slot: Slot, weights: Mapping[str, Array]) -> dict[str, Array]:
    return {slot.weight(part): value for part, value in weights.items()}


def _typical(values: Iterable[Array]) -> float:
    """The root mean square of some tensors; 1 if they are empty or all zero."""
    total, count = 0.0, 0
    for value in values:
        wide = value.astype(np.float64)
        wide = wide[np.isfinite(wide)]
        total, count = total + float(np.sum(wide * wide)), count + wide.size
    return float(np.sqrt(total / count)) or 1.0 if count else 1.0
