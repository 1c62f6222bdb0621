"""Draw `results.json` as one small SVG. Runs in the environment of the peers.

python plot.py RESULTS.json OUTPUT.svg
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "onnx-adapt", "font.size": 8}
Row = dict[str, Any]
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def rows(results: dict[str, Any], part: str, title: str) -> list[Row]:
    """The lines of the table whose title begins so, by column."""
    for table in results.get(part, {}).get("tables", ()):
        if table["title"].startswith(title):
            bare = ([_number(cell) for cell in row] for row in table["rows"])
            return [dict(zip(table["columns"], row, strict=True)) for row in bare]
    return []


def _number(cell: Any) -> Any:
    """A ratio without its spread; other cells as they are."""
    return cell["value"] if isinstance(cell, dict) else cell


def amount(text: str) -> float:
    """The size or the number of nodes in the name of a model."""
    size = re.search(r"([\d.]+) (kB|MB|GB)", text)
    if size:
        return float(size[1]) * UNITS[size[2]] / 1e6
    return float(text.split()[0].replace(",", ""))


def curve(axes: Any, found: list[Row], column: str, labels: tuple[str, str, str]) -> None:
    """A line for each way, over the size of the model."""
    for by in dict.fromkeys(row["by"] for row in found):
        points = [
            (amount(row["of"]), row[column])
            for row in found
            if row["by"] == by and isinstance(row[column], float)
        ]
        ours = by.startswith(("insert", "one slot"))
        style = {"marker": "o", "markersize": 3, "linewidth": 2 if ours else 1}
        axes.plot(*zip(*points, strict=True), label=by, **style)
    axes.set(xscale="log", yscale="log", title=labels[0], xlabel=labels[1], ylabel=labels[2])
    axes.legend(fontsize=6)


def runs(axes: Any, found: list[Row]) -> None:
    """Time over base, beside what the arithmetic says."""
    for name, marker in (("baked", "x"), ("LoraAdapter", "o"), ("feeds", "+")):
        axes.scatter(
            [row["arithmetic"] for row in found],
            [row[name] for row in found],
            label=name,
            marker=marker,
            s=14,
        )
    limits = sorted({row["arithmetic"] for row in found})
    axes.plot(limits, limits, label="arithmetic", color="black", linewidth=1)
    axes.set(title="a run with an adapter", xlabel="arithmetic / base", ylabel="time / base")
    axes.legend(fontsize=6)


def memory(axes: Any, found: list[Row]) -> None:
    """Adapters in one session, or as many sessions."""
    counts = [row["adapters"] for row in found]
    for name in ("one session, MB", "as many sessions, MB"):
        axes.plot(counts, [row[name] for row in found], label=name[:-4], marker="o")
    axes.set(xscale="log", yscale="log", title="many adapters", xlabel="adapters", ylabel="MB")
    axes.legend(fontsize=6)


def main() -> None:
    """Draw what there is."""
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    plt.switch_backend("svg")
    plt.rcParams.update(STYLE)
    figure, grid = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    inline = rows(results, "insert", "inline")
    nodes = rows(results, "nodes", "many nodes")
    dense = rows(results, "inference", "dense")
    held = rows(results, "swap", "memory")
    ways = rows(results, "checkpoints", "")
    if inline:
        curve(grid[0][0], inline, "s", ("insert, inline weights", "MB of weights", "s"))
        curve(grid[0][1], inline, "MB", ("its memory", "MB of weights", "MB"))
    if nodes:
        curve(grid[0][2], nodes, "s, processor", ("insert, many nodes", "nodes", "s"))
    if dense:
        runs(grid[1][0], dense)
    if held:
        memory(grid[1][1], held)
    if ways:
        timed = [row for row in ways if isinstance(row["s"], float)]
        grid[1][2].barh([row["way"] for row in timed], [row["s"] for row in timed])
        grid[1][2].set(title="a trained adapter to its first output", xlabel="s")
    for axes in grid.flat:
        axes.set_visible(bool(axes.get_title()))
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
