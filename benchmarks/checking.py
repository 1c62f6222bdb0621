"""Compare the ratios of two runs: is one worse by more than its spread?

An example: an earlier run has 1.02 with a spread of 0.02, and this one 1.06 with 0.03. The
larger spread is 0.03, and 1.06 is above 1.05: the ratio is worse.
"""

from __future__ import annotations

from collections.abc import Mapping

from measuring import Cell, Part, Ratio

from onnx_adapt.cli.outputs import say

Name = tuple[Cell, ...]


def ratios(parts: Mapping[str, Part]) -> dict[Name, Ratio]:
    """Every ratio of a run, by its part, table, row and column."""
    found: dict[Name, Ratio] = {}
    for part in parts.values():
        for table in part.tables:
            for row in table.rows:
                measured = (i for i, cell in enumerate(row) if not isinstance(cell, str | int))
                label = row[: next(measured, len(row))]
                for column, cell in zip(table.columns, row, strict=True):
                    if isinstance(cell, Ratio):
                        found[(part.name, table.title, *label, column)] = cell
    return found


def is_worse(now: Ratio, before: Ratio) -> bool:
    """Whether a ratio is larger than an earlier one by more than the larger spread."""
    return now.value - before.value > max(now.spread, before.spread)


def report(parts: Mapping[str, Part], earlier: Mapping[str, Part]) -> int:
    """Say which ratios are worse than in an earlier run.

    Returns:
        The exit status: 0 if none is, 1 if one is, 2 if the runs have no ratio in common.
    """
    now = ratios(parts)
    before = ratios({name: part for name, part in earlier.items() if name in parts})
    common = [name for name in now if name in before]
    worse = [name for name in common if is_worse(now[name], before[name])]
    for name in worse:
        what = ", ".join(map(str, name))
        say(f"worse: {what}: {now[name]}, before {before[name]}")
    alone = len(now.keys() ^ before.keys())
    say(f"{len(worse)} of {len(common)} ratios are worse; {alone} are in one of the runs only")
    return 2 if not common else int(bool(worse))
