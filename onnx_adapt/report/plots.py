"""The charts of the report page, drawn by pygal and coloured by the page's style sheet."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from onnx_adapt.report.numbers import power
from onnx_adapt.report.overview import Overview, SlotView
from onnx_adapt.words import plain

_EXTRA = ("text-overlay", "tooltip-overlay")
"""Classes of elements that pygal adds for its scripts; the page has no scripts."""

_TICKS = 6
_LETTERS = 13
"""Font size in pixels; pygal leaves room for it."""

Dot = dict[str, Any]
Series = tuple[list[Dot], bool]
"""Points, and whether a line joins them; else they are dots."""


def map_plot(overview: Overview) -> str:
    """Plot the layers of the base, and the slots, by depth and width."""
    layers = [
        {
            "value": (layer.depth, math.log2(layer.width)),
            "tooltip": f"{plain(layer.name or layer.op)}: {layer.op}, width {layer.width}",
        }
        for layer in overview.layers
    ]
    slots = [
        _dot(
            number,
            view,
            view.depth,
            math.log2(max(view.slot.width, 1)),
            f"width {view.slot.width}",
            is_stop=True,
        )
        for number, view in enumerate(overview.slots, 1)
    ]
    found = [dot["value"][1] for dot in [*layers, *slots]]
    powers = _enclosing(min(found, default=0), max(found, default=1))
    return _plot(
        "map",
        [(layers, False), (slots, False)],
        [(exponent, f"{2**exponent}") for exponent in powers],
        _round_steps(0, max(overview.nodes, 1)),
        "depth: nodes of the base before it",
        "width",
        label="Map of the slots; each dot is a link to its slot",
    )


def error_plot(overview: Overview) -> str:
    """Plot the error of each slot against the oracle, with its tolerance."""
    numbered = list(enumerate(overview.slots, 1))
    measured = {
        n: (view.result.error, view.result.tolerance)
        for n, view in numbered
        if view.result is not None
        and view.result.error is not None
        and view.result.tolerance is not None
    }
    errors = [error for error, _ in measured.values()]
    low, high = _decades([*errors, *(limit for _, limit in measured.values())])
    good: list[Dot] = []
    bad: list[Dot] = []
    for n, view in numbered:
        if n in measured:
            error, limit = measured[n]
            y = _place(error, low, high)
            dot = _dot(n, view, n, y, f"error {power(error)}, tolerance {power(limit)}")
            (good if error <= limit else bad).append(dot)
    ends = [
        {"value": (n + side, _place(limit, low, high))}
        for n, (_, limit) in measured.items()
        for side in (-0.5, 0.5)
    ]
    return _plot(
        "error",
        [(ends, True), (good, False), (bad, False)],
        _powers(low, high, zero=0.0 in errors),
        _round_steps(1, len(numbered)),
        "slot",
        "error",
    )


def effect_plot(overview: Overview) -> str:
    """Plot how far each slot moves the outputs, with random weights and with the adapter's."""
    numbered = list(enumerate(overview.slots, 1))
    probed = {n: view.result.effect for n, view in numbered if view.result is not None}
    moved = {n: view.moved for n, view in numbered}
    known = [e for e in [*probed.values(), *moved.values()] if e is not None]
    low, high = _decades(known)
    series = []
    for values, what in ((probed, "random weights"), (moved, "the adapter")):
        dots = []
        for n, view in numbered:
            value = values.get(n)
            if value is not None:
                y = _place(value, low, high)
                dots.append(_dot(n, view, n, y, f"{what}: moves {power(value)}"))
        series.append((dots, False))
    return _plot(
        "effect",
        series,
        _powers(low, high, zero=0 in known),
        _round_steps(1, len(numbered)),
        "slot",
        "effect",
    )


def _dot(
    number: int, view: SlotView, x: float, y: float, text: str, *, is_stop: bool = False
) -> Dot:
    """A dot that leads to the section of its slot.

    The dots of one plot are stops of the Tab key; those of the others would lead to the same.
    """
    name = plain(view.slot.name)
    reached = {"aria-label": f"slot {number}, {name}"} if is_stop else {"tabindex": "-1"}
    return {
        "value": (x, y),
        "xlink": {"href": f"#slot-{number}", **reached},
        "tooltip": f"{number}. {name}: {text}",
    }


def _plot(
    name: str,
    series: Iterable[Series],
    y_labels: list[tuple[float, str]],
    x_labels: list[int],
    x_title: str,
    y_title: str,
    label: str = "",
) -> str:
    """Draw one chart as SVG without styles or scripts; the page's style sheet applies.

    A chart without a label is hidden from screen readers: the list of slots gives the same
    numbers as text.
    """
    pygal = _pygal()
    from pygal.etree import etree
    from pygal.style import Style

    chart = pygal.XY(
        css=[],
        js=[],
        style=Style(label_font_size=_LETTERS, title_font_size=_LETTERS),
        width=480,
        height=260,
        margin=8,
        show_legend=False,
        stroke=False,
        dots_size=4,
        x_title=x_title,
        y_title=y_title,
        range=(y_labels[0][0] - 0.3, y_labels[-1][0] + 0.3),
        xrange=(x_labels[0] - 0.5, x_labels[-1] + 0.5),
    )
    chart.uuid = name
    chart.y_labels = [{"value": value, "label": label} for value, label in y_labels]
    chart.x_labels = [{"value": value, "label": str(value)} for value in x_labels]
    for number, (dots, is_line) in enumerate(series):
        chart.add(str(number), dots, stroke=is_line, show_dots=not is_line)
    root = chart.render_tree()
    _strip(root)
    for key, value in {"role": "group", "aria-label": label}.items() if label else ():
        root.set(key, value)
    if not label:
        root.set("aria-hidden", "true")
    text = etree.tostring(root, encoding="unicode")
    return str(text).replace("xlink:href", "href")


def _pygal() -> Any:
    """Import pygal, and remove the import hook for plugins that it installs.

    Up to Python 3.11 the hook would turn every later failed import into a warning.
    """
    import pygal

    fixer = pygal.PluginImportFixer
    sys.meta_path[:] = [item for item in sys.meta_path if not isinstance(item, fixer)]
    return pygal


def _strip(root: Any) -> None:
    """Remove comments, styles, scripts and the elements that only scripts use."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _is_extra(parent, child) or (child.tag == "title" and parent is root):
                parent.remove(child)


def _is_extra(parent: Any, child: Any) -> bool:
    if not isinstance(child.tag, str) or child.tag in ("defs", "desc"):
        return True
    if child.tag == "title":
        return bool(parent.get("class") == "guides")
    return any(name in _EXTRA for name in child.get("class", "").split())


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """Exponents of the powers of ten that enclose the positive finite values."""
    logs = [math.log10(v) for v in values if v > 0 and math.isfinite(v)]
    low, high = math.floor(min(logs, default=-8)), math.ceil(max(logs, default=0))
    return low - (low == high), high


def _place(value: float, low: int, high: int) -> float:
    """A value's place on a logarithmic axis: 0 is below all powers, infinity and NaN above."""
    if value == 0:
        return low - 1
    if not math.isfinite(value):
        return high + 0.2
    return math.log10(value)


def _powers(low: int, high: int, *, zero: bool) -> list[tuple[float, str]]:
    """Labels for powers of ten, and for 0 below them if it is a value."""
    step = max(1, math.ceil((high - low) / _TICKS))
    labels: list[tuple[float, str]] = [(e, f"1e{e}") for e in range(low, high + step, step)]
    return [(low - 1, "0"), *labels] if zero else labels


def _enclosing(low: float, high: float) -> list[int]:
    """Evenly spaced whole numbers that enclose a range."""
    first, last = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    step = max(1, math.ceil((last - first) / _TICKS))
    return list(range(first, last + step, step))


def _round_steps(first: int, last: int) -> list[int]:
    """Labels from the first to the last number in steps of 1, 2 or 5 times a power of ten."""
    wanted = max(1, (last - first) / _TICKS)
    power_of_ten = 10 ** math.floor(math.log10(wanted))
    step = next(m * power_of_ten for m in (1, 2, 5, 10) if m * power_of_ten >= wanted)
    inner = range(-(-first // step) * step, last + 1, step)
    return sorted({first, last, *(n for n in inner if last - n >= step / 2 or n == last)})
