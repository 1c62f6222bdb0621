"""Whether an adapter's values fit the ranges that a quantised model was calibrated for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.edit.base_weights import fill_base_weights
from onnx_adapt.edit.ranges import widened_ranges, with_base_ranges
from onnx_adapt.edit.weights import fill_weights
from onnx_adapt.graph.index import index_model
from onnx_adapt.graph.quantizers import Quantizer, quantizers_behind
from onnx_adapt.model.file import Model
from onnx_adapt.ort import Providers
from onnx_adapt.proof.compare import distance
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.probe import neutral_model
from onnx_adapt.proof.result import Check, Saturation
from onnx_adapt.proof.runner import Runner, Values
from onnx_adapt.proof.unsaturated import Ends, Seen, observe, ranges_of
from onnx_adapt.slot.manifest import Slot, read_manifest
from onnx_adapt.words import count


def switched_on(model: Model, adapter: Adapter | None) -> Model:
    """A model with an adapter as the weights of its slots; as it is without one."""
    if adapter is None:
        return model
    return fill_base_weights(fill_weights(model, adapter.weights), adapter.replaced)


def range_warnings(model: Model, slots: Sequence[Slot]) -> list[str]:
    """Warn where an adapter's values are quantised with a range calibrated on the base."""
    found: dict[str, list[str]] = {}
    for quantizer in quantizers_behind(index_model(model), slots):
        for slot in quantizer.direct:
            found.setdefault(slot, []).append(repr(quantizer.name))
    return [
        f"{_kind(model, slot)} {slot!r}: its values are quantised by {', '.join(nodes[:3])}, "
        "whose range was calibrated on the base; an adapter's may saturate"
        for slot, nodes in found.items()
    ]


def _kind(model: Model, name: str) -> str:
    """What to call a source of an adapter's values: a slot, or a weight that it replaces."""
    manifest = read_manifest(model.proto)
    replaced = {weight.name for weight in manifest.weights} if manifest else set()
    return "trained weight" if name in replaced else "slot"


def check_ranges(
    off: Model,
    slots: Sequence[Slot],
    feeds: list[Feeds],
    expected: Sequence[list[Values]],
    providers: Providers,
) -> Check:
    """Check that a model with widened ranges still computes what its base does.

    The two round to different steps, and the base saturates values that the wider ranges
    hold. The effect of each is measured by comparing the model with one that lacks it. The
    outputs may differ by the sum of these effects, and by as much as the outputs of the base
    with and without optimisation.

    Args:
        off: The model with its slots off.
        slots: The slots.
        feeds: Inputs to run it with.
        expected: The base's outputs, not optimised and optimised.
        providers: Where the model runs.
    """
    allowed = distance(*expected)
    for side in (with_base_ranges(off), off):
        ranges = ranges_of(side, slots, feeds, providers)
        if ranges is not None:
            runner = Runner(ranges.unsaturated(side, rounded=True), providers, optimised=False)
            free = [runner.run(item, list(ranges.outputs[0])) for item in feeds]
            del runner
            allowed += ranges.rounding(side) + distance(ranges.outputs, free)
    worst = 0.0
    for optimised, wanted in zip((False, True), expected, strict=True):
        runner = Runner(off, providers, optimised=optimised)
        got = [runner.run(item, list(wanted[0])) for item in feeds]
        worst = max(worst, distance(wanted, got))
        del runner
    changed = widened_ranges(required_manifest(off))
    detail = (
        f"{count(len(changed), 'widened range')} move the outputs by {worst:.1e} "
        f"(rounding, and what saturates in the base: {allowed:.1e})"
    )
    return Check("ranges", worst <= allowed, detail)


def check_saturation(
    adapted: Model,
    slots: Sequence[Slot],
    adapter: Adapter | None,
    feeds: list[Feeds],
    providers: Providers,
) -> tuple[Check | None, tuple[Saturation, ...]]:
    """Check that an adapter's values fit the calibrated ranges behind what it changes.

    They fit if no more values saturate than without the adapter, or if the additional
    saturation moves the outputs no further than rounding does. Saturation of the base itself
    does not count: the ranges are taken to reach as far as the base's own values.

    Args:
        adapted: The model with slots.
        slots: The slots.
        adapter: The adapter; without one, what the model was filled or baked with.
        feeds: Inputs to run it with.
        providers: Where the model runs.

    Returns:
        The check, and where more saturates; no check if there is no adapter, or if the model
        itself holds it and no range is behind a slot.
    """
    off = neutral_model(adapted)
    if adapter is None and off is adapted:
        return None, ()
    on = switched_on(adapted, adapter)
    ranges = ranges_of(off, slots, feeds, providers)
    if ranges is None:
        what = "no value that an adapter changes is quantised with a calibrated range"
        return None if adapter is None else Check("saturation", True, what), ()
    seen, _ = observe(on, ranges.quantizers, feeds, providers)
    pairs = zip(ranges.quantizers, ranges.ends, ranges.seen, seen, strict=True)
    more = tuple(
        _saturation(quantizer, _share(before, ends), _share(after, ends), after)
        for quantizer, ends, before, after in pairs
        if _share(after, ends) > _share(before, ends)
    )
    if not more:
        what = count(len(ranges.quantizers), "QuantizeLinear node")
        return Check("saturation", True, f"with the adapter no more saturates in {what}"), ()
    names = [value.name for value in on.proto.graph.output]
    got = []
    for model in (ranges.unsaturated(on, rounded=True), ranges.as_wide_as_off(on)):
        runner = Runner(model, providers, optimised=False)
        got.append([runner.run(item, names) for item in feeds])
        del runner
    lost, allowed = distance(*got), ranges.rounding(on)
    unknown = {q.name: q.refused for q in ranges.quantizers if q.refused}
    hidden = [item.node for item in more if item.node in unknown]
    passed = lost <= allowed and not hidden
    worst = max(more, key=lambda item: item.on - item.off)
    where = count(len(more), "QuantizeLinear node")
    detail = (
        f"with the adapter more saturates in {where}, at most {worst.on:.1%} of "
        f"the values of {worst.node!r}; it moves the outputs by "
        f"{lost:.1e} (rounding does by {allowed:.1e})"
    )
    if hidden:
        detail += f"; what {hidden[0]!r} costs is not known: {unknown[hidden[0]]}"
    if not passed:
        detail += "; the answer is not the trained adapter's"
    return Check("saturation", passed, detail, _warnings(off, more)), more


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


def _warnings(model: Model, more: Sequence[Saturation]) -> tuple[str, ...]:
    """One line for each slot or trained weight: where most of its values saturate."""
    worst: dict[str, Saturation] = {}
    for item in more:
        for slot in item.slots:
            if slot not in worst or item.on - item.off > worst[slot].on - worst[slot].off:
                worst[slot] = item
    return tuple(
        f"{_kind(model, slot)} {slot!r}: {item.on:.2%} of the values of {item.node!r} "
        f"saturate, without the adapter {item.off:.2%}; they are {item.least:.3g} to "
        f"{item.most:.3g}, its range is {item.low:.3g} to {item.high:.3g}"
        for slot, item in worst.items()
    )
