"""A report in one sentence of plain words, and what its reader may want to look at first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from onnx_adapt.report.numbers import share
from onnx_adapt.report.overview import Overview, SlotView
from onnx_adapt.words import count


def in_one_sentence(overview: Overview) -> str:
    """Say what was found in one sentence, without the words of this library.

    Example:
        >>> import onnx_adapt as oa
        >>> from onnx_adapt.report.overview import overview
        >>> base = oa.open_model("models/plcmos.onnx")
        >>> found = overview(base, oa.insert(base, after="Conv_0"))
        >>> in_one_sentence(found).startswith("While its adapter is off, ")
        True
    """
    report = overview.report
    if not report.passed:
        bad = [check.name for check in report.checks if not check.passed]
        what = f"the check `{bad[0]}` failed" if bad else "there are warnings"
        return (
            f"Do not use {report.adapted} in place of {report.base}: {what}, and the table "
            "below says what was measured."
        )
    shown = sum(not needs_a_look(view) for view in overview.slots)
    left = len(overview.slots) - shown
    off = f"While its adapter is off, {report.adapted} answers as {report.base} does"
    on = f"at {count(shown, 'place')} an adapter changes what is computed, as its formula says"
    rest = f" {count(left, 'more place')} showed no effect with these inputs." if left else ""
    return f"{off}; while it is on, {on}{_price(overview)}.{rest}"


def _price(overview: Overview) -> str:
    """What an adapter costs: `, for 1.3 % more parameters and no measurable time`."""
    costs = overview.costs
    if costs is None:
        return ""
    added = share(sum(cost.parameters for cost in costs.slots), costs.base_parameters)
    slower = costs.against_base(costs.on)
    time = "no measurable time" if slower is None else f"{share(slower, 1)} time"
    return f", for {added} parameters and {time}"


_NUMBERED = re.compile(r"(?:.*?[./_])?\d+(?=[./_]|$)")


def layers_of(slots: Sequence[SlotView]) -> dict[str, str]:
    """The layer that each slot is in, or '' if its name tells none.

    It is the slot's module up to the first number behind what the modules of all slots begin
    with. For `model.0.layer.3.output` and `model.0.layer.4.output` these are `model.0.layer.3`
    and `model.0.layer.4`.
    """
    modules = {view.slot.name: view.slot.module or view.slot.name for view in slots}
    least, most = min(modules.values(), default=""), max(modules.values(), default="")
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False))
    )
    shared = least[:same].rpartition(".")[0]
    found = {}
    for name, module in modules.items():
        numbered = _NUMBERED.match(module[len(shared) :])
        found[name] = shared + numbered.group() if numbered and len(slots) > 1 else ""
    return found


def needs_a_look(view: SlotView) -> bool:
    """Whether a slot is wrong, was not reached, or moves no output."""
    result = view.result
    if result is None or result.ratio is None:
        return True
    return not result.ratio <= 1 or not result.effect


def by_need(slots: Sequence[SlotView]) -> dict[str, int]:
    """The place of each slot when the worst come first: wrong ones, then the nearest to it.

    A slot that was not measured comes before all others.
    """

    def badness(view: SlotView) -> tuple[bool, float, float]:
        result = view.result
        if result is None or result.ratio is None:
            return True, 0.0, 0.0
        return False, result.ratio, -(result.effect or 0.0)

    ordered = sorted(slots, key=badness, reverse=True)
    return {view.slot.name: place for place, view in enumerate(ordered)}
