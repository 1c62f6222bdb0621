"""The data of the report page: an adapted model beside its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import require_fit, required_manifest
from onnx_adapt.edit.fill import fill
from onnx_adapt.edit.insert import inline_model, list_slots
from onnx_adapt.edit.remove import remove
from onnx_adapt.errors import RunError
from onnx_adapt.graph.index import GraphView, ModelIndex, index_model, text
from onnx_adapt.graph.layers import is_layer, weight_width
from onnx_adapt.model.file import Model
from onnx_adapt.ort import Providers
from onnx_adapt.proof.compared import (
    Compared,
    Weights,
    compare,
    movements,
    one_by_one,
    require_comparable,
    weights_fed,
)
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.inputs import Inputs, inputs_for
from onnx_adapt.proof.result import Report, SlotResult
from onnx_adapt.proof.runner import ProviderArgument, proof_providers
from onnx_adapt.proof.verify import Stage, verify
from onnx_adapt.report.about import About, about
from onnx_adapt.report.costs import (
    Costs,
    SlotCost,
    measure_costs,
    weights_on,
)
from onnx_adapt.report.surroundings import (
    Surroundings,
    surroundings_after,
    surroundings_before,
)
from onnx_adapt.report.whole_graph import WholeGraph, whole_graph
from onnx_adapt.slot.manifest import Slot, slot_of

BOTTLENECK = 8
"""Bottleneck of the random weights that empty slots are measured with."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the base.

    Attributes:
        depth: How many nodes of the model run before it.
        name: Name of the node.
        op: Its operator.
        width: Size of the feature axis of its output.
    """

    depth: int
    name: str
    op: str
    width: int


@dataclass(frozen=True, slots=True)
class SlotView:
    """One slot and what was measured of it.

    Attributes:
        slot: The slot as the model's manifest records it.
        depth: How many nodes of the base run before it.
        result: What `verify` measured, or None.
        moved: Largest change of a model output when the adapter's weights for this slot
            alone are on, relative to the output's largest value; None without an adapter.
        cost: What the slot adds, or None.
        before: The base's graph around the site, or None.
        after: The adapted model's graph around the slot.
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
        adapter: Name of the adapter that the slots were turned on with, or ''.
        nodes: How many nodes the base has, those in bodies of control flow included.
        layers: The layers of the base whose width is known, in the order in which they run.
        slots: The slots, by depth.
        costs: What the slots add, or None if it could not be measured.
        graph: Where the nodes of the adapted model are on its map.
        compared: The other adapter beside the first, or None.
        about: The files, the inputs and the command.
    """

    report: Report
    adapter: str
    nodes: int
    layers: tuple[Layer, ...]
    slots: tuple[SlotView, ...]
    costs: Costs | None
    graph: WholeGraph
    compared: Compared | None = None
    about: About | None = None

    def as_dict(self) -> dict[str, object]:
        """The overview as the document that `--json` prints; it leaves out the map."""
        data = asdict(replace(self, graph=WholeGraph((), ())))
        del data["graph"]
        return {**{k: _plain(v) for k, v in data.items()}, "report": self.report.as_dict()}


def _plain(value: object) -> object:
    """A value for JSON: infinite numbers and NaN, which it cannot express, become text."""
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
    other: Adapter | None = None,
    inputs: Inputs | Sequence[Inputs] | None = None,
    bottleneck: int = BOTTLENECK,
    strict: bool = False,
    seed: int = 0,
    provider: ProviderArgument = None,
    stage: Stage | None = None,
    command: str = "",
) -> Overview:
    """Verify an adapted model and measure what its slots cost.

    Args:
        base: The base. Slots that it already has are removed first.
        adapted: The model with slots.
        adapter: The adapter to turn the slots on with.
        other: Another adapter to compare it with.
        inputs: Inputs to run with, as for `verify`.
        bottleneck: Bottleneck of the random weights that empty slots are measured with.
        strict: As for `verify`.
        seed: Seed of the random weights and of inputs that are made up.
        provider: As for `verify`. The times are measured on it too.
        stage: Called with a few words before each stage of the work.
        command: The command that asks for it, for the page to show.

    Raises:
        AdaptError: If a model, an input or the adapter cannot be used at all.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/plcmos.onnx")
        >>> found = overview(base, oa.insert(base, after="Conv_0"))
        >>> found.report.passed, found.slots[0].cost.parameters
        (True, 512)
    """
    tell = stage or (lambda _: None)
    required_manifest(adapted)  # a model without slots is refused before any work
    if other is not None:
        require_comparable(adapted, other)
    if adapter is not None:
        adapted = _filled(adapted, adapter)
    report = verify(
        base,
        adapted,
        inputs=inputs,
        strict=strict,
        seed=seed,
        adapter=adapter,
        provider=provider,
        stage=stage,
    )
    if list_slots(base):
        base = remove(base)
    costs, compared, moved = None, None, dict[str, float]()
    if report.slots:
        tell("counting and timing")
        providers = proof_providers(provider)
        weights = weights_on(adapted, adapter, bottleneck, seed)
        feeds = inputs_for(base, inputs, seed, providers)
        extra = weights_fed(adapted, weights, adapter)
        costs = _costs(base, adapted, feeds[0], weights, extra, providers)
        if adapter is not None and costs is not None:
            tell("turning on the adapter slot by slot")
            few = one_by_one(feeds, made_up=inputs is None)
            moved = movements(adapted, weights, few, providers)
            if other is not None:
                tell("comparing the adapters")
                given = adapted, adapter, other, feeds, providers
                compared = compare(*given, made_up=inputs is None)
    found = _assembled(base, adapted, report, adapter, costs, moved)
    return replace(
        found, compared=compared, about=about(base, adapted, report.shapes, command)
    )


def _filled(adapted: Model, adapter: Adapter) -> Model:
    """The model with an adapter's weights stored in its slots; batched slots store none."""
    require_fit(adapted, adapter)
    batched = any(slot.batched for slot in required_manifest(adapted).slots)
    return adapted if batched else fill(adapted, adapter)


def _costs(
    base: Model,
    adapted: Model,
    feeds: Feeds,
    weights: Weights,
    extra: Feeds,
    providers: Providers,
) -> Costs | None:
    """The costs, or None if the model does not run with its slots on (`verify` says why)."""
    try:
        return measure_costs(base, adapted, feeds, weights, extra, providers)
    except RunError:
        return None


def _assembled(
    base: Model,
    adapted: Model,
    report: Report,
    adapter: Adapter | None,
    costs: Costs | None,
    moved: Mapping[str, float],
) -> Overview:
    """Put everything that was measured together."""
    manifest = required_manifest(adapted)
    if manifest.inlined and base.proto.functions:
        base = inline_model(base)
    before, after = index_model(base), index_model(adapted)
    return Overview(
        report,
        adapter.name if adapter else "",
        sum(len(view.nodes) for view in before.views.values()),
        tuple(_layers(before)),
        tuple(_slot_views(before, after, manifest.slots, report, costs, moved)),
        costs,
        whole_graph(after.main),
    )


def _slot_views(
    before: ModelIndex,
    after: ModelIndex,
    slots: Sequence[Slot],
    report: Report,
    costs: Costs | None,
    moved: Mapping[str, float],
) -> list[SlotView]:
    """The slots with their measurements, by depth."""
    results = {result.name: result for result in report.slots}
    cost_of = {cost.name: cost for cost in costs.slots} if costs else {}
    depths = _slot_depths(after, slots)
    views = [
        SlotView(
            slot,
            depths.get(slot.name, 0),
            results.get(slot.name),
            moved.get(slot.owner),
            cost_of.get(slot.name),
            surroundings_before(before.views.get(slot.graph), slot),
            surroundings_after(after.views[slot.graph], slot),
        )
        for slot in slots
    ]
    return sorted(views, key=lambda view: view.depth)


def _in_order(index: ModelIndex, view: GraphView | None = None) -> list[tuple[GraphView, int]]:
    """Every node of a model in the order it runs; a body's nodes come after their owner."""
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


def _slot_depths(index: ModelIndex, slots: Sequence[Slot]) -> dict[str, int]:
    """How many nodes of the base run before each slot, or what reads its output, by slot."""
    depth, found = 0, dict[str, int]()
    changed = {slot.output: slot.name for slot in slots if slot.on_edge}
    for view, number in _in_order(index):
        node = view.nodes[number]
        owner = slot_of(node)
        if owner not in changed.values():
            found.setdefault(owner, depth)
        for name in node.input if not owner else ():
            if name in changed:
                found.setdefault(changed[name], depth)
        depth += not owner
    return found


def _layers(index: ModelIndex) -> list[Layer]:
    found = []
    for depth, (view, number) in enumerate(_in_order(index)):
        node = view.nodes[number]
        width = weight_width(view, node) if is_layer(view, node) else None
        if width:
            found.append(Layer(depth, text(node.name), text(node.op_type), width))
    return found
