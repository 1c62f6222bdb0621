"""Text of models as it can be shown: names hold whatever a file held."""

from __future__ import annotations


def plain(text: str) -> str:
    """Text that is safe to show: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
