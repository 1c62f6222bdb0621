"""How results look: tables for people, one JSON document for machines, talk on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.errors import AdaptError
from onnx_adapt.printable import plain

if TYPE_CHECKING:
    from onnx_adapt import Adapter, Model
    from onnx_adapt.model_file import Saved

_PATIENCE = 1.0


def say(text: str) -> None:
    """Talk to the person, on stderr; that nobody can hear it is no failure."""
    with contextlib.suppress(OSError):
        click.echo(plain(text), err=True)


def emit(text: str = "") -> None:
    """Print a result on stdout; what its encoding lacks is escaped.

    Raises:
        AdaptError: If the result cannot be written. A reader that went away (`| head`)
            has all it wants.
    """
    encoding = _encoding()
    try:
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding))
    except OSError as error:
        drop_output()
        if not isinstance(error, BrokenPipeError):
            raise AdaptError(
                f"cannot print the result: {error.strerror}",
                hint="make room where standard output goes; files were written as asked",
            ) from error


def drop_output() -> None:
    """Let go of what stdout could not take: it would fail again when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _encoding() -> str:
    return sys.stdout.encoding or "utf-8"


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode(_encoding())
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2)
    emit(text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout; numbers are right-aligned, nothing is cut when piped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    body = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        numbers = bool(body) and all(isinstance(row[i], int | float) for row in body)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in body:
        table.add_row(*(Text(plain("" if cell is None else str(cell))) for cell in row))
    out, seen = StringIO(), sys.stdout.isatty()
    Console(file=out, force_terminal=seen, width=None if seen else 1_000_000).print(table)
    emit(out.getvalue().rstrip("\n"))


def size_text(size: int) -> str:
    """A number of bytes for people: `69.1 MB`."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def file_label(adapter: Adapter) -> str:
    """An adapter's name as a part of a file name: nothing in it leads elsewhere."""
    return re.sub(r"[^\w.-]+", "_", adapter.name).strip(".") or "adapter"


def tell_saved(saved: Saved) -> None:
    """Say on stderr what a save wrote."""
    say(f"wrote {saved.path} ({size_text(saved.size)})")
    if saved.moved_out:
        say(
            f"note: with its weights {saved.path.name} would pass protobuf's 2 GB; they are "
            f"in {saved.data[-1].name}, which belongs beside it"
        )
    elif saved.data:
        names = ", ".join(file.name for file in saved.data)
        say(f"copied the data beside it: {names}")


def tell_thin(base: Model, saved: Saved) -> None:
    """Say on stderr what a thin model needs."""
    if not saved.weights_in:
        say(f"note: no weight is large enough to stay in {base.label}; the result is whole")
        return
    files = [f"{file.name} ({size_text(file.stat().st_size)})" for file in saved.weights_in]
    together = "two" if len(files) == 1 else "files"
    say(f"its weights stay in {' and '.join(files)}: keep the {together} together")


@contextmanager
def patience() -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Show what is going on, on a terminal, once work has lasted over a second.

    Yields:
        A function to tell about bytes (done, total), and one to tell about stages.
    """
    started = time.monotonic()
    bar: Any = None
    task: Any = None

    def show(description: str, done: int | None, total: int | None) -> None:
        nonlocal bar, task
        if bar is None:
            watched = sys.stderr is not None and sys.stderr.isatty()
            if time.monotonic() - started < _PATIENCE or not watched:
                return
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
            task = bar.add_task(description, total=total)
            bar.start()
        bar.update(task, description=description, completed=done, total=total)

    try:
        yield (
            lambda done, total: show("writing", done, total),
            lambda text: show(plain(text), None, None),
        )
    finally:
        if bar is not None:
            bar.stop()
