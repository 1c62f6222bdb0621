"""Whether an adapter's values fit the ranges that a quantised model was calibrated for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_adapt.adapter import Adapter
from onnx_adapt.graph.index import index_model
from onnx_adapt.graph.quantizers import Quantizer, quantizers_behind
from onnx_adapt.initializers import fill_weights
from onnx_adapt.manifest import Slot, read_manifest
from onnx_adapt.model_file import Model
from onnx_adapt.printable import count
from onnx_adapt.proof.compare import distance
from onnx_adapt.proof.endless import Ends, Seen, observe, ranges_of
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.probe import neutral_model
from onnx_adapt.report import Check, Saturation
from onnx_adapt.rewriting.base_weights import fill_base_weights
from onnx_adapt.rewriting.ranges import with_base_ranges
from onnx_adapt.runtime import Runner


def switched_on(model: Model, adapter: Adapter | None) -> Model:
    """A model with an adapter as the weights of its slots; as it is without one."""
    if adapter is None:
        return model
    return fill_base_weights(fill_weights(model, adapter.weights), adapter.replaced)


def range_warnings(model: Model, slots: Sequence[Slot]) -> list[str]:
    """Which slots' values are quantised with a range that was calibrated on the base."""
    found: dict[str, list[str]] = {}
    for quantizer in quantizers_behind(index_model(model), slots):
        for slot in quantizer.direct:
            found.setdefault(slot, []).append(repr(quantizer.name))
    return [
        f"slot {slot!r}: its values are quantised by {', '.join(nodes[:3])}, whose range was "
        "calibrated on the base; an adapter's may saturate"
        for slot, nodes in found.items()
    ]


def widening(model: Model, slots: Sequence[Slot], feeds: list[Feeds]) -> float:
    """How far coarser steps may move the outputs of a model whose ranges were widened.

    Both sides round: the base to its own steps, the result to coarser ones. Either is
    measured against the same model without rounding.

    Args:
        model: The model with its slots off.
        slots: The slots.
        feeds: Inputs to run it with.
    """
    manifest = read_manifest(model.proto)
    if manifest is None or not manifest.widened:
        return 0.0
    sides = (with_base_ranges(model), model)
    found = [ranges_of(side, slots, feeds) for side in sides]
    return sum(ranges.rounding(ranges.off) for ranges in found if ranges)


def check_saturation(
    model: Model, slots: Sequence[Slot], adapter: Adapter | None, feeds: list[Feeds]
) -> tuple[Check | None, tuple[Saturation, ...]]:
    """Whether an adapter's values fit the calibrated ranges behind the slots.

    They do if nothing more saturates than without the adapter, or if that costs no more of
    the answer than the base itself loses: its rounding, and what saturates in it anyway.

    Args:
        model: The model with slots.
        slots: The slots.
        adapter: The adapter; without one, what the model was filled or baked with.
        feeds: Inputs to run it with.

    Returns:
        The check, and where more saturates; no check if there is no adapter, or if no
        range is behind a slot.
    """
    off = neutral_model(model)
    if adapter is None and off is model:
        return None, ()
    on = switched_on(model, adapter)
    ranges = ranges_of(off, slots, feeds)
    if ranges is None:
        return None, ()
    seen, outputs = observe(on, ranges.quantizers, feeds)
    pairs = zip(ranges.quantizers, ranges.ends, ranges.seen, seen, strict=True)
    more = tuple(
        _saturation(quantizer, _share(before, ends), _share(after, ends), after)
        for quantizer, ends, before, after in pairs
        if _share(after, ends) > _share(before, ends)
    )
    if not more:
        what = count(len(ranges.quantizers), "QuantizeLinear node")
        return Check("saturation", True, f"no value more is outside the range of {what}"), ()
    names = [value.name for value in on.proto.graph.output]
    lost = []
    for model, wanted in ((off, ranges.outputs), (on, outputs)):
        runner = Runner(ranges.endless(model, rounded=True), optimised=False)
        lost.append(distance([runner.run(item, names) for item in feeds], wanted))
        del runner
    allowed = lost[0] + ranges.rounding(on)
    unknown = {q.name: q.refused for q in ranges.quantizers if q.refused}
    hidden = [item.node for item in more if item.node in unknown]
    passed = lost[1] <= allowed and not hidden
    worst = max(more, key=lambda item: item.on - item.off)
    detail = (
        f"{count(len(more), 'QuantizeLinear node')} saturate more than without the adapter, "
        f"at most {worst.on:.1%} of the values of {worst.node!r}; it moves the outputs by "
        f"{lost[1]:.1e} (rounding and the base's own saturation: {allowed:.1e})"
    )
    if hidden:
        detail += f"; what {hidden[0]!r} costs is not known: {unknown[hidden[0]]}"
    if not passed:
        detail += "; the answer is not the trained adapter's"
    return Check("saturation", passed, detail, _warnings(more)), more


def _share(seen: Seen, ends: Ends) -> float:
    """The share of values outside a range, but for ends that are the model's own."""
    outside = (0 if ends.low else seen.below) + (0 if ends.high else seen.above)
    return outside / seen.total if seen.total else 0.0


def _saturation(quantizer: Quantizer, off: float, on: float, seen: Seen) -> Saturation:
    low, high = quantizer.range
    return Saturation(
        quantizer.name,
        quantizer.slots,
        off,
        on,
        float(np.min(seen.least)),
        float(np.max(seen.most)),
        float(np.min(low)),
        float(np.max(high)),
    )


def _warnings(more: Sequence[Saturation]) -> tuple[str, ...]:
    """One line for each slot: where most of its values saturate."""
    worst: dict[str, Saturation] = {}
    for item in more:
        for slot in item.slots:
            if slot not in worst or item.on - item.off > worst[slot].on - worst[slot].off:
                worst[slot] = item
    return tuple(
        f"slot {slot!r}: {item.on:.1%} of the values of {item.node!r} saturate (without the "
        f"adapter {item.off:.1%}): they are {item.least:.3g} to {item.most:.3g}, its range "
        f"{item.low:.3g} to {item.high:.3g}"
        for slot, item in worst.items()
    )
