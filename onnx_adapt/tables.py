"""Rows of values as a table of text, and as one for a notebook."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence

from onnx_adapt.words import plain


def text_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows under the names of their columns; columns of numbers are right-aligned.

    Example:
        >>> print(text_table(("slot", "width"), [("fc", 64), ("head", 8)]))
        slot  width
        fc       64
        head      8
    """
    given = [list(row) for row in rows]
    numbers = number_columns(columns, given)
    lines = [list(columns), *([cell_text(cell) for cell in row] for row in given)]
    sizes = [[_width(cell) for cell in line] for line in lines]
    widths = [max(column) for column in zip(*sizes, strict=True)]

    def placed(cell: str, room: int, number: bool) -> str:
        return " " * room + cell if number else cell + " " * room

    return "\n".join(
        "  ".join(
            placed(cell, width - size, number)
            for cell, size, width, number in zip(line, taken, widths, numbers, strict=True)
        )
        for line, taken in zip(lines, sizes, strict=True)
    )


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same for a notebook, under a line that says what it is."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell_text(cell))}</td>' for cell in row)}</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p>{html.escape(plain(caption))}</p>{table}"


def cell_text(cell: object) -> str:
    """What a cell shows: nothing for None, and no character that controls a terminal."""
    return plain("" if cell is None else str(cell))


def number_columns(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    """Which columns hold nothing but numbers."""
    return [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(columns))
    ]


def _width(text: str) -> int:
    """How many columns of a terminal a text takes: East Asian characters take two."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)
