"""What commands share in writing results.

Results go to stdout, as tables or as one JSON document; messages go to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from onnx_adapt.errors import AdaptError, SaveError
from onnx_adapt.formats import suffix_of
from onnx_adapt.tables import cell_text, number_columns, text_table
from onnx_adapt.words import plain

if TYPE_CHECKING:
    from onnx_adapt import Adapter, Checkpoint, Model
    from onnx_adapt.model.file import Saved

_QUIET = "onnx_adapt.quiet"

_HIDDEN = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Characters that JSON allows but that control a terminal (ISO 6429, text direction)."""


def be_quiet(ctx: click.Context) -> None:
    """Silence `say` while this command runs; errors are still printed."""
    ctx.meta[_QUIET] = True


def is_quiet() -> bool:
    """Whether only errors are to be printed on stderr."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and _QUIET in ctx.meta


def say(text: str) -> None:
    """Print a message on stderr; a closed stderr is no error."""
    if not is_quiet():
        with contextlib.suppress(OSError):
            click.echo(plain(text), err=True)


def say_next(*words: str | Path) -> None:
    """Suggest the command that usually comes next."""
    say(f"next: onnx-adapt {shlex.join(map(str, words))}")


def emit(text: str = "") -> None:
    """Print a result on stdout; characters that its encoding lacks are escaped.

    Raises:
        AdaptError: If the result cannot be written. A reader that closed its end of the
            pipe (`| head`) is no error.
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
    """Discard what is left to print; Python would try again at exit and fail."""
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
    emit(_HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout; numbers are right-aligned, nothing is cut when piped.

    On a narrow terminal only sentences are wrapped, because a name that is broken into
    two lines cannot be copied. If the names do not fit, each row becomes a paragraph.
    """
    given = [list(row) for row in rows]
    if not sys.stdout.isatty():
        emit(text_table(columns, given))
        return
    numbers = number_columns(columns, given)
    body = [[cell_text(cell) for cell in row] for row in given]
    width = shutil.get_terminal_size().columns
    if _fits(columns, body, width):
        emit(_terminal_table(columns, body, numbers, width))
    else:
        emit("\n".join(_paragraphs(columns, body)))


_SHORT = 16
"""The longest cell that shares its line with other cells in a paragraph."""

_PROSE = 24
"""The narrowest column for text of several words."""


def _fits(columns: Sequence[str], body: Sequence[Sequence[str]], width: int) -> bool:
    """Whether a table is no wider than this when its prose is wrapped."""
    from rich.cells import cell_len

    needed = 2 * (len(columns) - 1)
    for i, column in enumerate(columns):
        texts = [column, *(row[i] for row in body)]
        words = max(cell_len(word) for text in texts for word in text.split() or [""])
        needed += min(max(map(cell_len, texts)), max(words, _PROSE))
    return needed <= width


def _terminal_table(
    columns: Sequence[str],
    body: Sequence[Sequence[str]],
    numbers: Sequence[bool],
    width: int,
) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        prose = any(" " in row[i] and len(row[i]) > _PROSE for row in body)
        justify: Literal["left", "right"] = "right" if numbers[i] else "left"
        table.add_column(column, justify=justify, no_wrap=not prose, overflow="fold")
    for row in body:
        table.add_row(*map(Text, row))
    out = StringIO()
    Console(file=out, force_terminal=True, width=width).print(table)
    return "\n".join(map(str.rstrip, out.getvalue().splitlines()))


def _paragraphs(columns: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Each row as several lines: the first cell, each long cell, then all short cells."""
    rest = range(1, len(columns))
    long = [i for i in rest if any(len(row[i]) > _SHORT for row in body)]
    lines = []
    for row in body:
        named = {i: f"{columns[i]} {row[i]}" for i in rest if row[i]}
        short = ", ".join(named[i] for i in named if i not in long)
        lines += [row[0], *(f"  {named[i]}" for i in long if i in named)]
        lines += [f"  {short}"] if short else []
    return lines


def size_text(size: int) -> str:
    """A number of bytes in words, such as `69.1 MB`."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def file_label(adapter: Adapter) -> str:
    """An adapter's name as part of a file name, without path separators."""
    return re.sub(r"[^\w.-]+", "_", adapter.name).strip(".") or "adapter"


def adapter_beside(
    path: Path, checkpoint: Checkpoint | None, file_format: str
) -> list[tuple[Path, Any]]:
    """The file for a checkpoint's weights beside the model, with its contents."""
    from onnx_adapt.adapter.files import encode_adapter

    if checkpoint is None:
        return []
    label = file_label(checkpoint.adapter)
    file = path.absolute().parent / f"{path.stem}.{label}{suffix_of(file_format)}"
    return [(file, [encode_adapter(checkpoint.adapter, file)])]


def output_path(model: str, output: str | None, kind: str) -> Path:
    """The path to write to; by default `MODEL.<kind>.onnx` beside the model."""
    return Path(model).with_suffix(f".{kind}.onnx") if output is None else Path(output)


def refuse_to_replace(output: str | Path, *read: str | Path) -> None:
    """Refuse an output path that is one of the files that a command reads.

    Raises:
        SaveError: If it is.
    """
    for path in read:
        if Path(output).exists() and Path(path).exists() and Path(output).samefile(path):
            raise SaveError(
                f"the output would replace {path}, which is read",
                hint="choose another path for the output",
            )


def tell_saved(saved: Saved) -> None:
    """Print on stderr which files a save wrote."""
    say(f"wrote {saved.path} ({size_text(saved.size)})")
    if saved.externalised:
        say(
            f"note: with its weights {saved.path.name} would pass protobuf's 2 GB; they are "
            f"in {saved.data[-1].name}, which belongs beside it"
        )
    elif saved.data:
        names = ", ".join(file.name for file in saved.data)
        say(f"copied the data beside it: {names}")


def tell_thin(base: Model, saved: Saved) -> None:
    """Print on stderr which files a thin model needs."""
    if not saved.weights_in:
        say(f"note: no weight is large enough to stay in {base.label}; the result is whole")
        return
    files = [f"{file.name} ({size_text(file.stat().st_size)})" for file in saved.weights_in]
    together = "two" if len(files) == 1 else "files"
    say(f"its weights stay in {' and '.join(files)}: keep the {together} together")
