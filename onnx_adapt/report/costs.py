"""What slots add to a model: parameters, floating-point operations, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.weights import read_weights
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.probe import neutral_model
from onnx_adapt.proof.runner import Runner
from onnx_adapt.report.trace import trace
from onnx_adapt.slot.weights import bottleneck_of, fresh_weights, is_empty

_ROUNDS, _BLOCK = 10, 5
"""How often the models take turns at most, and how many runs in a row each is timed for."""

_SECONDS = 2.0
"""When to stop before that."""

_NO_PARAMETERS = {"INT32", "INT64", "BOOL", "STRING"}
"""Element types of shapes, indices and texts: tensors of these are no parameters."""


@dataclass(frozen=True, slots=True)
class SlotCost:
    """What one slot adds.

    Attributes:
        name: The slot.
        bottleneck: Inner size of the weights that were counted; 0 if it has none.
        parameters: Numbers in these weights.
        flops: Floating-point operations of its nodes in one run.
    """

    name: str
    bottleneck: int
    parameters: int
    flops: int


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a run takes, in milliseconds.

    Attributes:
        best: The fastest run: what else the machine does only adds to it.
        median: Of all runs.
        worst: The slowest run.
    """

    best: float
    median: float
    worst: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What the slots of a model add to its base.

    Attributes:
        slots: One entry per slot.
        replaced: Parameters of the base that adapters replace.
        base_parameters: Parameters of the base.
        base_flops: Floating-point operations of the base in one run.
        uncounted: Operators of the base whose operations are not in `base_flops`.
        runs: How many runs of each were timed.
        base: Time of the base.
        off: Time of the adapted model with the slots off.
        on: Time of the adapted model with the slots on.
    """

    slots: tuple[SlotCost, ...]
    replaced: int
    base_parameters: int
    base_flops: int
    uncounted: tuple[str, ...]
    runs: int
    base: Latency
    off: Latency
    on: Latency

    @property
    def noise(self) -> float:
        """How far the median of runs is from their best, in parts of it, at worst."""
        return max(time.median / time.best - 1 for time in (self.base, self.off, self.on))


Weights = Mapping[str, Mapping[str, Array]]


def weights_on(model: Model, adapter: Adapter | None, bottleneck: int, seed: int) -> Weights:
    """Weights to turn the slots on with, by slot and part.

    They are the adapter's; without one what the model has; where that is empty, fresh ones
    of the given bottleneck.
    """
    slots = required_manifest(model).slots
    stored = read_weights(model, slots)
    rng = np.random.default_rng(seed)
    return {
        slot.name: adapter.weights[slot.name]
        if adapter and slot.name in adapter.weights
        else fresh_weights(slot, bottleneck, rng)
        if is_empty(slot, stored[slot.name])
        else stored[slot.name]
        for slot in slots
    }


def fed(model: Model, weights: Weights, adapter: Adapter | None) -> Feeds:
    """Those of the weights that a model takes as inputs, by name."""
    slots = required_manifest(model).slots
    named = {s.weight(part): v for s in slots for part, v in weights[s.name].items()}
    named.update(adapter.replaced if adapter else {})
    inputs = {value.name for value in model.proto.graph.input}
    return {name: value for name, value in named.items() if name in inputs}


def measure_costs(
    base: Model, adapted: Model, feeds: Feeds, weights: Weights, extra: Feeds
) -> Costs:
    """Count and time what the slots add.

    Args:
        base: The base model.
        adapted: The model with slots.
        feeds: Inputs of the base.
        weights: Weights of the slots; see `weights_on`.
        extra: Those of them, and of the base's own, that are fed; see `fed`.

    Raises:
        RunError: If a model does not run.
    """
    manifest = required_manifest(adapted)
    ran = trace(adapted, {**feeds, **extra})
    rest = [item for item in ran if not item.slot]
    opened = {weight.name for weight in manifest.weights}
    runs, times = _time(base, adapted, feeds, extra)
    return Costs(
        slots=tuple(
            SlotCost(
                slot.name,
                bottleneck_of(slot, weights[slot.name]),
                sum(weights[slot.name][part].size for part in slot.parts),
                sum(item.flops for item in ran if item.slot == slot.name),
            )
            for slot in manifest.slots
        ),
        replaced=sum(_size(t) for t in adapted.proto.graph.initializer if t.name in opened),
        base_parameters=_parameters(base.proto),
        base_flops=sum(item.flops for item in rest),
        uncounted=tuple(sorted({item.op for item in rest if not item.counted})),
        runs=runs,
        base=times[0],
        off=times[1],
        on=times[2],
    )


def _parameters(proto: onnx.ModelProto) -> int:
    kinds = onnx.TensorProto.DataType
    return sum(
        _size(tensor)
        for tensor in walk.graph_tensors(proto.graph, sparse=False)
        if kinds.Name(tensor.data_type) not in _NO_PARAMETERS
    )


def _size(tensor: onnx.TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count


def _time(
    base: Model, adapted: Model, feeds: Feeds, extra: Feeds
) -> tuple[int, tuple[Latency, Latency, Latency]]:
    """Time base, off and on by turns: what slows the machine down slows down all three."""
    on = Runner(adapted, optimised=True)
    neutral = neutral_model(adapted)
    off = on if neutral is adapted else Runner(neutral, optimised=True)
    plain = Runner(base, optimised=True)
    names = plain.outputs
    calls: list[Callable[[], object]] = [
        lambda: plain.run(feeds, names),
        lambda: off.run(feeds, names),
        lambda: on.run({**feeds, **extra}, names),
    ]
    taken: list[list[float]] = [[], [], []]
    begun = time.perf_counter()
    for _ in range(_ROUNDS):
        for call, times in zip(calls, taken, strict=True):
            call()  # threads of the session before may still be waiting for work
            for _ in range(_BLOCK):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() - begun > _SECONDS:
            break
    first, second, third = (_latency(times) for times in taken)
    return len(taken[0]), (first, second, third)


def _latency(times: list[float]) -> Latency:
    return Latency(min(times), statistics.median(times), max(times))
