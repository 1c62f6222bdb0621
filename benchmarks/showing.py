"""What benchmarks found: on the terminal, as Markdown, as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import Cell, Finding, Part, Ratio, Table

from onnx_adapt.cli.outputs import print_table

FINDINGS = ("value", "of", "goal", "best (to worst), and details")


def text(cell: Cell) -> str:
    """A cell as it is shown."""
    if isinstance(cell, float):
        return f"{cell:.3f}" if cell < 10 else f"{cell:.1f}" if cell < 100 else f"{cell:.0f}"
    return str(cell)


def without_goals(part: Part) -> Part:
    """The same without goals, which are for the full size."""
    bare = [
        found if found.unit == "yes" else replace(found, most=None, least=None)
        for found in part.findings
    ]
    return replace(part, findings=bare)


def missed(parts: Iterable[Part]) -> list[Finding]:
    """The goals that are not met."""
    return [found for part in parts for found in part.findings if found.met is False]


def show(part: Part) -> None:
    """Print what was found."""
    print(f"\n# {part.name}\n")
    if part.findings:
        print_table(FINDINGS, [finding.cells for finding in part.findings])
    for table in part.tables:
        print(f"\n{table.title}")
        print_table(table.columns, [tuple(map(text, row)) for row in table.rows])
    for note in part.notes:
        print(f"\n{note}")


def to_json(part: Part) -> dict[str, Any]:
    """A part as JSON has it; numbers stay numbers."""
    return asdict(part)


def from_json(found: dict[str, Any]) -> Part:
    """The reverse."""
    return Part(
        found["name"],
        [Finding(**each) for each in found["findings"]],
        [
            Table(each["title"], tuple(each["columns"]), [_row(row) for row in each["rows"]])
            for each in found["tables"]
        ],
        found["notes"],
        found["where"],
    )


def _row(cells: Sequence[Any]) -> tuple[Cell, ...]:
    return tuple(Ratio(**cell) if isinstance(cell, dict) else cell for cell in cells)


def to_markdown(part: Part) -> str:
    """A part as Markdown, the numbers with goals first."""
    lines = [f"## {part.name}", "", part.where, ""]
    if part.findings:
        lines += _grid(FINDINGS, [finding.cells for finding in part.findings])
    for table in part.tables:
        lines += [f"**{table.title}**", ""]
        lines += _grid(table.columns, [tuple(map(text, row)) for row in table.rows])
    return "\n".join([*lines, *(f"{note}\n" for note in part.notes)])


def _grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in cells] + [""]


def surroundings() -> str:
    """The machine and the versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    names = ("onnx-adapt", "onnx", "onnxruntime", "protobuf", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    machine = f"{os.cpu_count()} vCPU ({processor()}), {memory:.0f} GB, {platform.system()}"
    return f"{machine} {platform.release()}, Python {platform.python_version()}, {versions}"


def processor() -> str:
    """What the processor is called."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
