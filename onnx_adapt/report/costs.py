"""The cost of the slots: parameters, floating-point operations and time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.edit.weights import read_weights
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.ort import CPU, Providers
from onnx_adapt.proof.compared import Weights, weights_fed
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.inputs import Inputs, inputs_for
from onnx_adapt.proof.probe import neutral_model
from onnx_adapt.proof.runner import ProviderArgument, Runner, proof_providers
from onnx_adapt.report.trace import trace
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.weights import bottleneck_of, fresh_weights, is_empty

_ROUNDS, _BLOCK = 10, 5
"""The most rounds in which the models are timed by turns, and the runs of each in a round."""

_ENOUGH = 4
"""The rounds that it takes to tell how far they disagree."""

_SECONDS = 1.0
"""No new round begins after this time."""

_NO_PARAMETERS = {"INT32", "INT64", "BOOL", "STRING"}
"""Element types of shapes, indices and text, whose tensors are not counted as parameters."""


@dataclass(frozen=True, slots=True)
class SlotCost:
    """The cost of one slot, at one of its places.

    Attributes:
        name: Name of the slot; for a further place `name@2`, `name@3`, ...
        bottleneck: Inner size of the weights that were counted; 0 if the slot has none.
        parameters: How many numbers these weights hold; 0 for a further place.
        flops: Floating-point operations of the slot's nodes in one run.
    """

    name: str
    bottleneck: int
    parameters: int
    flops: int


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a run takes, in milliseconds.

    Attributes:
        best: Time of the fastest run. It is the fairest to compare, because other work on the
            machine only makes runs slower.
        median: Median of all runs.
        worst: Time of the slowest run.
    """

    best: float
    median: float
    worst: float


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of all slots of a model, beside that of its base.

    Attributes:
        slots: One entry per place of each slot.
        replaced: How many parameters of the base adapters replace.
        base_parameters: How many parameters the base has.
        base_flops: Floating-point operations of the base in one run.
        uncounted: Operators of the base whose operations could not be counted; `base_flops`
            has one for each element of their outputs.
        runs: How many runs of each model were timed.
        base: Time of the base.
        off: Time of the adapted model with the slots off.
        on: Time of the adapted model with the slots on.
        noise: How far the rounds disagree about how much longer a run takes than the base's,
            relative: the distance of the quartiles. A smaller difference says nothing.
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
    noise: float

    def against_base(self, time: Latency) -> float | None:
        """How much longer a run takes than the base's, relative; None within the noise."""
        slower = time.best / self.base.best - 1
        return slower if abs(slower) > self.noise else None


@dataclass(frozen=True, slots=True)
class UpdateCost:
    """What the slots on weights of a model compute in one run, whatever its inputs.

    Attributes:
        slots: How many they are.
        flops: Their floating-point operations.
        base_flops: Those of the base, for the inputs that were counted.
        feeds: These inputs.
    """

    slots: int
    flops: int
    base_flops: int
    feeds: Feeds

    @property
    def share(self) -> float:
        """The operations of the slots as a part of those of the base."""
        return self.flops / max(self.base_flops, 1)


def update_cost(
    base: Model,
    adapted: Model,
    adapter: Adapter | None,
    inputs: Inputs | Sequence[Inputs] | None = None,
    provider: ProviderArgument = None,
) -> UpdateCost | None:
    """Count what the slots on weights compute in one run; None if there are none.

    They change whole weights before the first token is seen, so for short inputs they may
    cost more than the base. The weights of baked slots are constants, of which ONNX Runtime
    computes the changed weight when it loads the model.

    Args:
        base: The base.
        adapted: The model with slots.
        adapter: The adapter whose bottlenecks count.
        inputs: Inputs of the base, as for `verify`; made up if not given.
        provider: Where the model runs.

    Raises:
        AdaptError: If the model does not run with these inputs.
    """
    slots = [s for s in required_manifest(adapted).slots if s.on_weight and s.swappable]
    if not slots:
        return None
    providers = proof_providers(provider)
    feeds = inputs_for(base, inputs, 0, providers)[0]
    weights = weights_on(adapted, adapter, 1, 0)
    ran = trace(adapted, {**feeds, **weights_fed(adapted, weights, adapter)}, providers)
    names = {slot.name for slot in slots}
    return UpdateCost(
        len(owners(slots)),
        sum(item.flops for item in ran if item.slot in names),
        sum(item.flops for item in ran if not item.slot),
        feeds,
    )


def weights_on(model: Model, adapter: Adapter | None, bottleneck: int, seed: int) -> Weights:
    """The weights that the slots are turned on with.

    A slot gets the adapter's weights if there are any, else the weights stored in the model.
    If those are empty, it gets random weights of the given bottleneck.
    """
    slots = owners(required_manifest(model).slots)
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


def measure_costs(
    base: Model,
    adapted: Model,
    feeds: Feeds,
    weights: Weights,
    extra: Feeds,
    providers: Providers = CPU,
) -> Costs:
    """Count the parameters and operations of the slots and time the model with and without.

    Args:
        base: The base model.
        adapted: The model with slots.
        feeds: Inputs of the base.
        weights: Weights of the slots, from `weights_on`.
        extra: The weights that are fed, from `weights_fed`.
        providers: Where the models run.

    Raises:
        RunError: If a model does not run.
    """
    manifest = required_manifest(adapted)
    ran = trace(adapted, {**feeds, **extra}, providers)
    rest = [item for item in ran if not item.slot]
    replaceable = {weight.name for weight in manifest.weights}
    replaced = [t for t in adapted.proto.graph.initializer if t.name in replaceable]
    times, noise = _time(base, adapted, feeds, extra, providers)
    return Costs(
        slots=tuple(
            SlotCost(
                slot.name,
                bottleneck_of(slot, weights[slot.owner]),
                0 if slot.shares else sum(w.size for w in weights[slot.owner].values()),
                sum(item.flops for item in ran if item.slot == slot.name),
            )
            for slot in manifest.slots
        ),
        replaced=sum(math.prod(tensor.dims) for tensor in replaced),
        base_parameters=_parameters(base.proto),
        base_flops=sum(item.flops for item in rest),
        uncounted=tuple(sorted({item.op for item in rest if not item.counted})),
        runs=len(times[0]),
        base=_latency(times[0]),
        off=_latency(times[1]),
        on=_latency(times[2]),
        noise=noise,
    )


def _parameters(proto: onnx.ModelProto) -> int:
    """How many numbers the weights of a model hold."""
    kinds = onnx.TensorProto.DataType
    return sum(
        math.prod(tensor.dims)
        for tensor in walk.graph_tensors(proto.graph, sparse=False)
        if kinds.Name(tensor.data_type) not in _NO_PARAMETERS
    )


def _time(
    base: Model, adapted: Model, feeds: Feeds, extra: Feeds, providers: Providers
) -> tuple[list[list[float]], float]:
    """Time the base and the adapted model with slots off and on, and tell the noise.

    They run by turns, so that a phase in which the machine is slow counts against all three.
    """
    on = Runner(adapted, providers, optimised=True)
    neutral = neutral_model(adapted)
    off = on if neutral is adapted else Runner(neutral, providers, optimised=True)
    plain = Runner(base, providers, optimised=True)
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
            call()  # not timed: threads of the previous session may still be spinning
            for _ in range(_BLOCK):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() - begun > _SECONDS:
            break
    return taken, max(_noise(taken[0], times) for times in taken[1:])


def _noise(base: Sequence[float], times: Sequence[float]) -> float:
    """How far the rounds disagree about the ratio of two times; see `Costs.noise`.

    In few rounds the quartiles say little, and the runs themselves must do.
    """
    rounds = range(0, len(times), _BLOCK)
    ratios = [min(times[i : i + _BLOCK]) / min(base[i : i + _BLOCK]) for i in rounds]
    if len(ratios) < _ENOUGH:
        return max(statistics.median(item) / min(item) - 1 for item in (base, times))
    low, _, high = statistics.quantiles(ratios, n=4)
    return high - low


def _latency(times: list[float]) -> Latency:
    return Latency(min(times), statistics.median(times), max(times))
