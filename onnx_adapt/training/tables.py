"""Read samples from tables: `.csv`, `.jsonl` and `.parquet`, a row for each sample."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnx_adapt.checkpoints.readers.optional import optional_library
from onnx_adapt.errors import TrainingError

Table = dict[str, list[Any]]
"""Columns by name: numbers, texts, or lists of numbers for each row."""


def read_csv(path: Path) -> Table:
    """Read a `.csv` with the names of its columns in the first line.

    A column whose cells are all numbers holds numbers, else texts.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        names = next(lines, [])
        columns: list[list[Any]] = [[] for _ in names]
        for row in lines:
            if not row:
                continue  # an empty line
            if len(row) != len(names):
                raise TrainingError(
                    f"line {lines.line_num} of {path} has {len(row)} cells, and the first "
                    f"line has {len(names)}",
                    hint='put cells that hold commas or line breaks between " and "',
                )
            for name, column, cell in zip(names, columns, row, strict=True):
                if not cell.strip():
                    raise _missing(path, f"line {lines.line_num}", name)
                column.append(cell)
    if len(set(names)) != len(names):
        raise TrainingError(f"two columns of {path} have one name: {', '.join(names)}")
    return dict(zip(names, map(_numbers_or_texts, columns), strict=True))


def _numbers_or_texts(column: list[str]) -> list[Any]:
    for kind in (int, float):
        try:
            return [kind(cell) for cell in column]
        except ValueError:
            continue
    return column


def read_jsonl(path: Path) -> Table:
    """Read a `.jsonl`: an object in each line, with the same keys in all."""
    columns: Table = {}
    count = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TrainingError(f"line {number} of {path} is no JSON object")
            for name in {**columns, **row}:
                if row.get(name) is None or (count and name not in columns):
                    raise _missing(path, f"line {number}", name)
                columns.setdefault(name, []).append(row[name])
            count += 1
    return columns


def read_parquet(path: Path) -> Table:
    """Read a `.parquet` file, with pyarrow.

    Raises:
        TrainingError: If pyarrow is not installed, or a cell is empty.
    """
    parquet = optional_library("pyarrow.parquet", "parquet", f"{path}", TrainingError)
    columns: Table = parquet.read_table(path).to_pydict()
    for name, column in columns.items():
        if None in column:
            raise _missing(path, f"row {column.index(None)}", name)
    return columns


def _missing(path: Path, where: str, name: str) -> TrainingError:
    return TrainingError(
        f"{where} of {path} has no {name!r}, or others do not have it",
        hint="every row needs every column",
    )


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
"""The readers of tables by suffix."""


def read_table(path: Path) -> Table:
    """Read a table.

    Raises:
        TrainingError: If it cannot be read, or rows lack cells.
    """
    try:
        table = READERS[path.suffix.lower()](path)
    except TrainingError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    if not table or not next(iter(table.values())):
        raise TrainingError(f"{path} has no rows")
    return table


def is_text(column: Sequence[Any]) -> bool:
    """Whether a column holds texts."""
    return any(isinstance(cell, str) for cell in column)
