"""Text as it can be shown: names of models hold whatever a file held."""

from __future__ import annotations


def plain(text: str) -> str:
    """Text that is safe to show: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def count(number: int, thing: str) -> str:
    """A number of things: `1 slot`, `2 slots`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
