"""Words for people: text that is safe to show, counted things, names that may be meant."""

from __future__ import annotations

import difflib
import heapq
import re
from collections.abc import Callable, Iterable
from pathlib import Path


def plain(text: str) -> str:
    """Text that is safe to show: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def count(number: int, thing: str) -> str:
    """A number of things: `1 slot`, `2 slots`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def glob_matcher(pattern: str, separator: str) -> Callable[[str], bool]:
    """What tells whether a name matches a glob: `*` stays within one part, `**` does not.

    Args:
        pattern: The glob; `*` alone matches all names.
        separator: What is between the parts of a name.

    Example:
        >>> matches = glob_matcher("layers.*.fc", ".")
        >>> matches("layers.0.fc"), matches("layers.0.mlp.fc")
        (True, False)
    """
    parts = {"**": ".*", "*": f"[^{re.escape(separator)}]*", "?": "."}
    pieces = re.split(r"(\*\*|\*|\?)", "**" if pattern == "*" else pattern)
    text = "".join(parts.get(piece) or re.escape(piece) for piece in pieces)
    expression = re.compile(text, re.DOTALL)
    return lambda name: expression.fullmatch(name) is not None


_SHORTLIST = 100
_LONGEST, _MOST_BESIDE = 500, 1000
"""Nobody mistyped a longer name, and to compare two takes the square of it."""


def nearest(name: str, known: Iterable[str], count: int = 5) -> list[str]:
    """The known names most like `name`, best first; none if there is nothing to compare.

    Args:
        name: What was not found, perhaps a glob.
        known: The names that are there; of those that are equally like it the first count.
        count: How many to give.
    """
    wanted = re.sub(r"[*?]+", "", name).strip("./: ")[:_LONGEST]
    if not wanted:
        return []
    pairs = _pairs(wanted)
    labels = dict.fromkeys(label for label in known if 0 < len(label) <= _LONGEST)
    likely = heapq.nlargest(
        _SHORTLIST, labels, key=lambda label: (len(pairs & _pairs(label)), -len(label))
    )
    return heapq.nlargest(count, likely, key=lambda label: _likeness(wanted, label))


def _pairs(text: str) -> set[str]:
    """The pairs of neighbouring characters: quick to compare in thousands of names."""
    return {text[i : i + 2] for i in range(len(text))}


def _likeness(wanted: str, label: str) -> float:
    """How alike two names are, as a whole and part by part."""
    parts = _parts(label)
    best = (len(own) * max(_ratio(own, part) for part in parts) for own in _parts(wanted))
    return _ratio(wanted, label) + sum(best) / len(wanted)


def _parts(name: str) -> list[str]:
    return re.split(r"[./:]", name)


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def beside(path: Path) -> str:
    """What to do about a file that is not there: the names beside it that are most like it."""
    try:
        names = sorted(item.name for item in path.parent.iterdir())[:_MOST_BESIDE]
        near = difflib.get_close_matches(path.name[:_LONGEST], names, 3)
    except (OSError, ValueError):
        near = []
    return (
        f"check the path; nearest beside it: {', '.join(near)}" if near else "check the path"
    )
