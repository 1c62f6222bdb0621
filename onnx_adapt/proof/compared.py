"""How far adapters move the outputs of a model: slot by slot, and one beside another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import require_fit, required_manifest
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.model.file import Model
from onnx_adapt.ort import Providers
from onnx_adapt.proof.compare import distance, movement
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.probe import neutral_model
from onnx_adapt.proof.runner import Runner, size_of
from onnx_adapt.slot.places import owners

Weights = Mapping[str, Mapping[str, Array]]
"""Weights by slot and part."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A second adapter beside the first, on the same inputs.

    Attributes:
        name: The second adapter.
        first: How far the first adapter moves the outputs, relative to their largest value.
        second: How far the second one does.
        apart: How far the outputs with one are from those with the other.
        moved: How far the second adapter's weights for one slot alone move the outputs, by
            slot.
    """

    name: str
    first: float
    second: float
    apart: float
    moved: dict[str, float]


def weights_fed(model: Model, weights: Weights, adapter: Adapter | None) -> Feeds:
    """The weights that a model takes as inputs, by input name."""
    slots = owners(required_manifest(model).slots)
    named = {s.weight(part): v for s in slots for part, v in weights[s.name].items()}
    named.update(adapter.replaced if adapter else {})
    inputs = {value.name for value in model.proto.graph.input}
    return {name: value for name, value in named.items() if name in inputs}


def one_by_one(feeds: Sequence[Feeds], *, made_up: bool) -> Sequence[Feeds]:
    """The inputs to turn on slots with one by one: of those that are made up the smallest.

    The whole model runs once for each slot and input, which is most of the time of a report on
    many slots.
    """
    return [min(feeds, key=size_of)] if made_up else feeds


def movements(
    adapted: Model, weights: Weights, feeds: Sequence[Feeds], providers: Providers
) -> dict[str, float]:
    """How far each slot alone moves the outputs, by slot; see `SlotView.moved`."""
    runner = Runner(neutral_model(adapted), providers, optimised=True)
    unmoved = [runner.run(item) for item in feeds]
    moved = {}
    for slot in owners(required_manifest(adapted).slots):
        extra = {slot.weight(p): value for p, value in weights[slot.name].items()}
        if slot.swappable:
            moved[slot.name] = max(
                movement(before, runner.run({**item, **extra}))
                for before, item in zip(unmoved, feeds, strict=True)
            )
    return moved


def compare(
    adapted: Model,
    first: Adapter,
    second: Adapter,
    feeds: Sequence[Feeds],
    providers: Providers,
    *,
    made_up: bool,
) -> Compared:
    """Run a model with one adapter, then with another, and with each slot of the second.

    Args:
        adapted: The model with slots.
        first: One adapter.
        second: Another one.
        feeds: The inputs.
        providers: Where the model runs.
        made_up: Whether nobody gave the inputs.

    Raises:
        RunError: If the model does not run with one of them.
    """
    neutral = neutral_model(adapted)
    runner = Runner(neutral, providers, optimised=True)
    off = [runner.run(item) for item in feeds]
    on = []
    for adapter in (first, second):
        fed = weights_fed(neutral, adapter.weights, adapter)
        on.append([runner.run({**item, **fed}) for item in feeds])
    alone, other = (
        max(movement(a, b) for a, b in zip(off, found, strict=True)) for found in on
    )
    moved = movements(neutral, second.weights, one_by_one(feeds, made_up=made_up), providers)
    return Compared(second.name, alone, other, distance(on[0], on[1]), moved)


def require_comparable(adapted: Model, second: Adapter) -> None:
    """Refuse a second adapter that does not fit, or a model that cannot swap adapters.

    Raises:
        AdapterError: If it cannot be compared.
    """
    require_fit(adapted, second)
    if not all(slot.swappable for slot in required_manifest(adapted).slots):
        raise AdapterError(
            f"two adapters cannot be compared in {adapted.label}: its slots are baked",
            hint="give the model before it was baked",
        )
