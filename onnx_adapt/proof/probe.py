"""Running the slots of a model with random weights and reading the tensors around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import ELEM_TYPES, Array
from onnx_adapt.edit.base_weights import undo_replaceable
from onnx_adapt.edit.weights import fill_weights, make_swappable, read_weights
from onnx_adapt.errors import RunError, SlotError
from onnx_adapt.graph.index import ModelIndex, index_model
from onnx_adapt.graph.norms import own_norm
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.ort import Providers
from onnx_adapt.proof.compare import movement
from onnx_adapt.proof.deviation import Deviation, slot_deviation
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.random_weights import SIZES, RandomWeights
from onnx_adapt.proof.runner import Runner, Values, size_of
from onnx_adapt.proof.stretches import (
    add_reads,
    computed_reads,
    find_stretches,
    movements,
)
from onnx_adapt.proof.taps import Tap, Tapper
from onnx_adapt.slot.formula import EPSILON
from onnx_adapt.slot.manifest import Slot, slot_of, write_manifest
from onnx_adapt.slot.oracle import Norm
from onnx_adapt.slot.places import owners, places
from onnx_adapt.slot.weights import bottleneck_axis, is_off, neutral_weights

_LARGE = 1 << 22
"""A weight of more numbers is read in a run of its own: a mixture of experts has gigabytes."""
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
        self._providers = providers
        self._random = RandomWeights(np.random.default_rng(seed))
        self._own = read_weights(model, slots)
        self._norms = {slot.name: read_norm(model, slot) for slot in slots if slot.norm}
        swappable = make_swappable(model)
        index = index_model(swappable)
        neutral = {slot.name: neutral_weights(slot) for slot in owners(slots)}
        swappable = fill_weights(swappable, neutral)
        self._stretches = find_stretches(swappable.proto, slots, outputs)
        self._taps = _tapped(swappable.proto, index, slots)
        add_reads(swappable.proto, self._stretches)
        self._model = replace(swappable, path=model.path)
        self._runner = Runner(self._model, providers, optimised=True, fuse_quantised=False)
        self._still: list[Values] = []

    def measure(self, feeds: Sequence[Feeds]) -> dict[str, Measurement]:
        """Run with random weights of several bottlenecks and compare with the oracle."""
        found = {slot.name: Measurement() for slot in self._slots}
        for item in feeds:
            for portion, quiet in self._runs(item):
                still = {name: quiet[name] for name in self._outputs if name in quiet}
                self._still += [still] if portion is self._portions[0] else []
                for slot in owners(portion):
                    self._note(slot, quiet)
        for shift in range(len(SIZES)):
            for number, item in enumerate(feeds):
                weights = {
                    slot.name: self._random.draw(slot, number, i + shift)
                    for i, slot in enumerate(owners(self._slots))
                }
                self._compare(item, weights, found)
        if any(not is_off(weights) for weights in self._own.values()):
            for item in feeds:
                self._compare(item, self._own, found)
        return found

    def _note(self, slot: Slot, quiet: Values) -> None:
        """Note what a slot reads everywhere."""
        everywhere = [self._taps[place.name] for place in places(self._slots, slot.name)]
        sources = [value for taps in everywhere for value in taps.source.read(quiet)]
        targets = [value for taps in everywhere for value in taps.target.read(quiet)]
        self._random.note(slot, sources, targets)

    def _runs(self, fed: Feeds) -> Iterator[tuple[list[Slot], Values]]:
        """Run once for each portion of the slots, to hold few large weights at a time.

        The model's own outputs come with the first portion.
        """
        outputs = self._outputs
        for portion in self._portions:
            taps = (name for slot in portion for name in self._taps[slot.name].names)
            yield portion, self._runner.run(fed, list(dict.fromkeys([*outputs, *taps])))
            outputs = []

    def effects(
        self,
        feeds: Sequence[Feeds],
        seen: Mapping[str, Measurement],
        tell: Callable[[str], None],
    ) -> dict[str, float]:
        """How far the outputs move when one slot alone is on, at all its places, by slot.

        It is 0 if nothing moves. The smallest inputs are tried first, and the first that move
        an output are enough. Where that is quicker, the slot runs with the part of the model
        up to the nearest output alone (`stretches.py`), and with the whole model only if
        that output does not move.

        Args:
            feeds: The inputs, in the order of `measure`.
            seen: What was measured at each place so far.
            tell: Called with what is being done.
        """
        own = owners(self._slots)
        found: dict[str, float] = {}
        by_size = sorted(range(len(feeds)), key=lambda number: size_of(feeds[number]))
        for slot, moved in self._nearby(feeds, by_size):
            if moved and not self._unread(slot, seen):
                found[slot.name] = moved
                tell(f"turning on slot {len(found)} of {len(own)}")
        for slot in own:
            if slot.name not in found:
                tell(f"turning on slot {len(found) + 1} of {len(own)}")
                found[slot.name] = self._effect(slot, feeds, by_size, seen)
        return {slot.name: found[slot.name] for slot in own}

    def _nearby(
        self, feeds: Sequence[Feeds], by_size: Sequence[int]
    ) -> Iterator[tuple[Slot, float]]:
        """How far each slot moves the nearest outputs, for the smallest inputs.

        A slot is left out where the part up to there does not pay, or does not run alone.
        """
        if not (self._stretches and by_size):
            return
        number = by_size[0]

        def weights(slot: Slot) -> dict[str, Array]:
            return _as_feeds(slot, self._random.draw(slot, number, 1))

        with suppress(RunError):
            read = computed_reads(self._model.proto, self._stretches)
            values = {**feeds[number], **self._runner.run(feeds[number], read)}
            for item in self._stretches:
                with suppress(RunError):
                    yield from movements(self._model, item, values, weights, self._providers)

    def _unread(self, slot: Slot, seen: Mapping[str, Measurement]) -> list[Slot]:
        """The places of a slot that read values that are not finite."""
        everywhere = places(self._slots, slot.name)
        return [place for place in everywhere if seen[place.name].deviation.unjudged]

    def _effect(
        self,
        slot: Slot,
        feeds: Sequence[Feeds],
        by_size: Sequence[int],
        seen: Mapping[str, Measurement],
    ) -> float:
        """The effect of one slot in the whole model.

        A slot that read values that are not finite is measured here once more. Random weights
        of the slots before it may cause such values, by the root of a negative number or by
        overflow. Alone, a slot reads what the base computes.
        """
        again = self._unread(slot, seen)
        taps = {name for place in again for name in self._taps[place.name].names}
        for strength in _STRENGTHS:
            moved = 0.0
            for number in by_size:
                weights = self._random.draw(slot, number, 1, strength)
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


def _tapped(
    proto: onnx.ModelProto, index: ModelIndex, slots: Sequence[Slot]
) -> dict[str, _SlotTaps]:
    """Make the tensors around each slot readable, in place.

    Raises:
        SlotError: If an operator hides those of a slot.
    """
    tapper = Tapper(proto)
    found = {}
    for slot in slots:
        view = index.views[slot.graph]
        names = (slot.inner, slot.source, slot.output, slot.plus or slot.inner)
        elem_types = [view.type_of(name).elem_type or ELEM_TYPES[slot.dtype] for name in names]
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
        found[slot.name] = _SlotTaps(*(tap for tap in taps if tap))
    return found


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


def _as_feeds(slot: Slot, weights: Mapping[str, Array]) -> dict[str, Array]:
    return {slot.weight(part): value for part, value in weights.items()}
