"""A log of a training: a line for each step, as CSV or JSON lines."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from onnx_adapt.errors import SaveError, TrainingError
from onnx_adapt.training.progress import Report

COLUMNS = ("step", "epoch", "loss", "rate", "samples", "validation_loss", "score")
"""What each line has; the last two only after the last step of an epoch."""

Row = Mapping[str, Any]


def row_of(report: Report) -> dict[str, Any]:
    """A step as a line of the log."""
    done = report.epoch
    values = (report.step, report.number, report.loss, report.rate, report.samples)
    scores = (None, None) if done is None else (done.validation_loss, done.score)
    return dict(zip(COLUMNS, (*values, *scores), strict=True))


def _csv_line(row: Row) -> str:
    text = StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerow(row)
    return text.getvalue()


def _csv_step(line: str) -> int:
    return int(line.partition(",")[0])


def _json_line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _json_step(line: str) -> int:
    return int(json.loads(line)["step"])


@dataclass(frozen=True, slots=True)
class Form:
    """A form of log file.

    Attributes:
        head: What stands above all lines.
        write: A line for a step.
        step: The number of the step that a line is for.
    """

    head: str
    write: Callable[[Row], str]
    step: Callable[[str], int]


FORMS = {
    ".csv": Form(",".join(COLUMNS) + "\n", _csv_line, _csv_step),
    ".jsonl": Form("", _json_line, _json_step),
}
"""The forms by their suffix."""


class Log:
    """A log file; each step is on disk when it is told.

    Args:
        path: The file; its suffix tells the form.
        resume: Go on with the log of a training that is resumed. Lines of steps that are
            taken again are replaced.

    Raises:
        TrainingError: If the suffix is unknown, or there is such a file of another training.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self._path = Path(path)
        if self._path.suffix not in FORMS:
            raise TrainingError(
                f"a log cannot be written as {self._path.name}",
                hint=f"give a name that ends with {' or '.join(FORMS)}, or a folder's name",
            )
        if self._path.exists() and not resume:
            raise TrainingError(
                f"{self._path} is there already", hint="choose another path for the log"
            )
        self._form = FORMS[self._path.suffix]
        self._begun = False

    def write(self, report: Report) -> None:
        """Add a step.

        Raises:
            SaveError: If it cannot be written.
            TrainingError: If the file to go on with is no such log.
        """
        line = self._form.write(row_of(report))
        try:
            if self._begun:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)
            else:
                before = self._lines_before(report.step) if self._path.exists() else []
                text = "".join([self._form.head, *before, line])
                self._path.write_text(text, encoding="utf-8")
                self._begun = True
        except OSError as error:
            raise SaveError(
                f"cannot write {self._path}: {error.strerror}",
                hint="make room, or choose another path with --log",
            ) from error

    def _lines_before(self, step: int) -> list[str]:
        """The lines of the file for steps before one, without its head."""
        try:
            lines = self._path.read_text(encoding="utf-8").removeprefix(self._form.head)
            whole = [line for line in lines.splitlines(keepends=True) if line.endswith("\n")]
            return [line for line in whole if self._form.step(line) < step]
        except (ValueError, LookupError, TypeError) as error:
            raise TrainingError(
                f"{self._path} is no log of a training", hint="choose another path with --log"
            ) from error
