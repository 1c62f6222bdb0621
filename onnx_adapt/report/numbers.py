"""Numbers as text for people to read."""

from __future__ import annotations

import math


def count(value: int) -> str:
    """Write an integer with thousands separators: `12,288`."""
    return f"{value:,}"


def by_unit(value: float) -> str:
    """Write a large number with a unit prefix: `876.6 M`."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:,.0f}" if not unit else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit has no limit")


def power(value: float | None, none: str = "not measured") -> str:
    """Write a small number in scientific notation: `1.6e-07`."""
    if value is None:
        return none
    return f"{value:.1e}" if value else "0"


def seconds(milliseconds: float) -> str:
    """Write a time with three significant digits: `41.3 ms`."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.3g} s"
    if milliseconds >= 1:
        return f"{milliseconds:.3g} ms"
    return f"{milliseconds * 1000:.3g} µs"


def share(part: float, whole: float) -> str:
    """Write a part of a whole in per cent: `+1.3 %`."""
    if not whole or not math.isfinite(part / whole):
        return "?"
    percent = 100 * part / whole
    if 0 < abs(percent) < 0.01:
        return "under 0.01 %"
    return f"{percent:+.{2 if abs(percent) < 0.1 else 1}f} %"


def file_size(size: int) -> str:
    """Write a number of bytes: `34.6 MB`."""
    return f"{by_unit(size)}B" if size >= 1000 else f"{size} bytes"
