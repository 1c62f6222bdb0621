"""A progress bar on a terminal, shown for work that takes more than a second."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from onnx_adapt.cli.outputs import is_quiet
from onnx_adapt.words import plain

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE = 1.0
"""Seconds before anything is shown."""


class _Watch:
    """The stage and the progress of the work, drawn once a second has passed."""

    def __init__(self, doing: str) -> None:
        self._state: tuple[str, int | None, int | None] = (doing, None, None)
        self._lock = threading.Lock()
        self._timer = threading.Timer(PATIENCE, self._begin)
        self._timer.daemon = True
        self._bar: Progress | None = None
        self._screen: IO[str] | None = None

    def start(self) -> None:
        self._timer.start()

    def set(self, doing: str, done: int | None = None, total: int | None = None) -> None:
        with self._lock:
            self._state = (doing, done, total)
            self._draw()

    def stop(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._timer = threading.Timer(0, lambda: None)
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.stop()
            if self._screen is not None:
                self._screen.close()

    def _begin(self) -> None:
        with self._lock, suppress(OSError):
            if threading.current_thread() is self._timer:
                # Not stderr itself: it leads elsewhere while a session starts.
                self._screen = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding)
                self._bar = _bar(self._screen)
                self._bar.add_task("", amount="")
                self._bar.tasks[0].start_time = self._bar.get_time() - PATIENCE
                self._draw()
                self._bar.start()

    def _draw(self) -> None:
        if self._bar is not None:
            doing, done, total = self._state
            amount = "" if total is None else f"{_megabytes(done or 0)}/{_megabytes(total)} MB"
            self._bar.update(
                self._bar.task_ids[0],
                description=doing,
                completed=done,
                total=total,
                amount=amount,
            )


def _bar(screen: IO[str]) -> Progress:
    """A bar that fits the terminal; a narrow one shows only the stage and the time."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.table import Column

    console = Console(file=screen)
    said = Column(no_wrap=True, overflow="ellipsis")
    columns: list[ProgressColumn] = []
    columns += [TextColumn("{task.description}", table_column=said, markup=False)]
    if console.width >= 60:
        columns += [BarColumn(20)]
    columns += [TextColumn("{task.fields[amount]}"), TimeElapsedColumn()]
    return Progress(*columns, console=console, transient=True, redirect_stdout=False)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


@contextmanager
def patience(
    doing: str = "working",
) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Show progress on a terminal while the work takes more than a second.

    Args:
        doing: The name of the first stage.

    Yields:
        A function to call with bytes (done, total), and one to call with the stage.
    """
    if is_quiet() or sys.stderr is None or not sys.stderr.isatty():
        yield (lambda done, total: None), (lambda text: None)
        return
    watch = _Watch(plain(doing))
    watch.start()
    try:
        yield (
            lambda done, total: watch.set("writing", done, total),
            lambda text: watch.set(plain(text)),
        )
    finally:
        watch.stop()
