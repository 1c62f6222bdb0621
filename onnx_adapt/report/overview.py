"""All that the report page shows of an adapted model, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import require_fit, required_manifest
from onnx_adapt.edit.fill import fill
from onnx_adapt.edit.insert import inline_model, list_slots
from onnx_adapt.edit.remove import remove
from onnx_adapt.errors import RunError
from onnx_adapt.graph.index import GraphView, ModelIndex, index_model, text
from onnx_adapt.graph.layers import is_layer, weight_width
from onnx_adapt.model.file import Model
from onnx_adapt.proof.compare import movement
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.inputs import Inputs, inputs_for
from onnx_adapt.proof.probe import neutral_model
from onnx_adapt.proof.result import Report, SlotResult
from onnx_adapt.proof.runner import Runner
from onnx_adapt.proof.verify import Stage, verify
from onnx_adapt.report.costs import Costs, SlotCost, Weights, fed, measure_costs, weights_on
from onnx_adapt.report.surroundings import (
    Surroundings,
    surroundings_after,
    surroundings_before,
)
from onnx_adapt.slot.manifest import Slot, slot_of

BOTTLENECK = 8
"""Counted and timed where slots are empty and there is no adapter."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the base.

    Attributes:
        depth: How many nodes of the model come before it.
        name: The node.
        op: Its operator.
        width: Size of the feature axis of its output.
    """

    depth: int
    name: str
    op: str
    width: int


@dataclass(frozen=True, slots=True)
class SlotView:
    """One slot with all that is known of it.

    Attributes:
        slot: What the model's manifest says.
        depth: How many nodes of the base come before it.
        result: What `verify` measured, or None.
        moved: Largest change of a model output when the adapter's weights for this slot
            alone are on, relative to the output's largest value; None without an adapter.
        cost: What it adds, or None.
        before: The base around its site, or None.
        after: The adapted model around it.
    """

    slot: Slot
    depth: int
    result: SlotResult | None
    moved: float | None
    cost: SlotCost | None
    before: Surroundings | None
    after: Surroundings


@dataclass(frozen=True, slots=True)
class Overview:
    """An adapted model beside its base.

    Attributes:
        report: What `verify` found.
        adapter: Name of the adapter the slots were turned on with, or ''.
        nodes: How many nodes the base has, bodies included.
        layers: Its layers whose width is known, in order.
        slots: The slots, in order of depth.
        costs: What the slots add, or None if it could not be measured.
    """

    report: Report
    adapter: str
    nodes: int
    layers: tuple[Layer, ...]
    slots: tuple[SlotView, ...]
    costs: Costs | None

    def as_dict(self) -> dict[str, object]:
        """The overview for `--json`."""
        data = asdict(self)
        return {**{k: _plain(v) for k, v in data.items()}, "report": self.report.as_dict()}


def _plain(value: object) -> object:
    """A number that JSON has no form for, as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    odd = isinstance(value, float) and not math.isfinite(value)
    return str(value) if odd else value


def overview(
    base: Model,
    adapted: Model,
    *,
    adapter: Adapter | None = None,
    inputs: Inputs | Sequence[Inputs] | None = None,
    bottleneck: int = BOTTLENECK,
    strict: bool = False,
    seed: int = 0,
    stage: Stage | None = None,
) -> Overview:
    """Verify an adapted model and measure what its slots cost.

    Args:
        base: The base; slots that it has itself are taken out.
        adapted: The model with slots.
        adapter: Turn the slots on with this one.
        inputs: As for `verify`.
        bottleneck: Counted and timed where slots are empty and there is no adapter.
        strict: As for `verify`.
        seed: As for `verify`.
        stage: Told what is being done.

    Raises:
        AdaptError: If a model, an input or the adapter cannot be used at all.
    """
    tell = stage or (lambda _: None)
    slots = required_manifest(adapted).slots
    if adapter is not None:
        require_fit(adapted, adapter)
        if not any(slot.batched for slot in slots):  # of these the weights are only fed
            adapted = fill(adapted, adapter)
    report = verify(
        base, adapted, inputs=inputs, strict=strict, seed=seed, adapter=adapter, stage=stage
    )
    if list_slots(base):
        base = remove(base)
    weights = weights_on(adapted, adapter, bottleneck, seed)
    costs, moved = None, {}
    if report.slots:
        tell("counting and timing")
        feeds = inputs_for(base, inputs, seed)
        extra = fed(adapted, weights, adapter)
        costs = _costs(base, adapted, feeds[0], weights, extra)
        if adapter is not None and costs is not None:
            tell("turning on the adapter slot by slot")
            moved = _movements(adapted, slots, weights, feeds)
    return _assembled(base, adapted, report, adapter, costs, moved)


def _costs(
    base: Model, adapted: Model, feeds: Feeds, weights: Weights, extra: Feeds
) -> Costs | None:
    """The costs; None where the model runs with slots off but not so (verify says why)."""
    try:
        return measure_costs(base, adapted, feeds, weights, extra)
    except RunError:
        return None


def _movements(
    adapted: Model, slots: Sequence[Slot], weights: Weights, feeds: Sequence[Feeds]
) -> dict[str, float]:
    """How far each slot alone moves the outputs, with the weights it has."""
    neutral = neutral_model(adapted)
    runner = Runner(neutral, optimised=True)
    still = [runner.run(item) for item in feeds]
    moved = {}
    for slot in slots:
        extra = {slot.weight(p): value for p, value in weights[slot.name].items()}
        if slot.swappable:
            moved[slot.name] = max(
                movement(before, runner.run({**item, **extra}))
                for before, item in zip(still, feeds, strict=True)
            )
    return moved


def _assembled(
    base: Model,
    adapted: Model,
    report: Report,
    adapter: Adapter | None,
    costs: Costs | None,
    moved: Mapping[str, float],
) -> Overview:
    manifest = required_manifest(adapted)
    if manifest.inlined and base.proto.functions:
        base = inline_model(base)
    before, after = index_model(base), index_model(adapted)
    results = {result.name: result for result in report.slots}
    priced = {cost.name: cost for cost in costs.slots} if costs else {}
    depths = _slot_depths(after)
    views = [
        SlotView(
            slot,
            depths.get(slot.name, 0),
            results.get(slot.name),
            moved.get(slot.name),
            priced.get(slot.name),
            surroundings_before(before.views.get(slot.graph), slot),
            surroundings_after(after.views[slot.graph], slot),
        )
        for slot in manifest.slots
    ]
    return Overview(
        report,
        adapter.name if adapter else "",
        sum(len(view.nodes) for view in before.views.values()),
        tuple(_layers(before)),
        tuple(sorted(views, key=lambda view: view.depth)),
        costs,
    )


def _in_order(index: ModelIndex, view: GraphView | None = None) -> list[tuple[GraphView, int]]:
    """Every node of a model in the order it runs, those of bodies after their owner."""
    view = view or index.main
    inner: dict[int, list[GraphView]] = {}
    for body in index.views.values():
        if body.parent is view:
            inner.setdefault(body.scope.owner, []).append(body)
    found = []
    for number in range(len(view.nodes)):
        found.append((view, number))
        for body in inner.get(number, ()):
            found += _in_order(index, body)
    return found


def _slot_depths(index: ModelIndex) -> dict[str, int]:
    depth, found = 0, dict[str, int]()
    for view, number in _in_order(index):
        owner = slot_of(view.nodes[number])
        if owner:
            found.setdefault(owner, depth)
        else:
            depth += 1
    return found


def _layers(index: ModelIndex) -> list[Layer]:
    found = []
    for depth, (view, number) in enumerate(_in_order(index)):
        node = view.nodes[number]
        width = weight_width(view, node) if is_layer(view, node) else None
        if width:
            found.append(Layer(depth, text(node.name), text(node.op_type), width))
    return found
