"""Numbers for people."""

from __future__ import annotations

import math


def count(value: int) -> str:
    """A number with its thousands apart: `12,288`."""
    return f"{value:,}"


def by_unit(value: float) -> str:
    """A large number in short: `876.6 M`."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:,.0f}" if not unit else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit takes everything")


def power(value: float | None, none: str = "not measured") -> str:
    """A small number: `1.6e-07`."""
    if value is None:
        return none
    return f"{value:.1e}" if value else "0"


def seconds(milliseconds: float) -> str:
    """A time with three digits that matter: `41.3 ms`."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.3g} s"
    if milliseconds >= 1:
        return f"{milliseconds:.3g} ms"
    return f"{milliseconds * 1000:.3g} µs"


def share(part: float, whole: float) -> str:
    """A part of a whole: `+1.3 %`."""
    if not whole or not math.isfinite(part / whole):
        return "?"
    percent = 100 * part / whole
    if 0 < abs(percent) < 0.01:
        return "under 0.01 %"
    return f"{percent:+.{2 if abs(percent) < 0.1 else 1}f} %"
