"""A log of a training in a folder that TensorBoard shows."""

from __future__ import annotations

import os
import time
import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

from onnx_adapt.errors import SaveError, TrainingError
from onnx_adapt.training.log import row_of
from onnx_adapt.training.progress import Report

_COUNTS = ("step", "epoch", "samples")
"""What a step has that is no curve."""


class EventLog:
    """A folder of event files, written by tensorboardX; each step is on disk when it is told.

    Args:
        path: The folder.
        resume: Go on with the log of a training that is resumed. Steps that are taken again
            replace those that were logged before.

    Raises:
        TrainingError: If tensorboardX is not installed, or there is such a folder of another
            training.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self._path = Path(path)
        try:
            import_module("tensorboardX")
            self._files = import_module("tensorboardX.event_file_writer")
            self._proto = import_module("tensorboardX.proto.event_pb2")
            self._summary = import_module("tensorboardX.summary")
        except ImportError as error:
            raise TrainingError(
                f"to log to {path} for TensorBoard takes tensorboardX, which is not installed",
                hint="pip install 'onnx-adapt[tensorboard]', or log to a .csv or .jsonl",
            ) from error
        if self._path.exists() and not self._path.is_dir():
            raise TrainingError(f"{path} is a file", hint="choose a folder for the log")
        if not resume and self._path.is_dir() and any(self._path.iterdir()):
            raise TrainingError(
                f"{path} is there already", hint="choose another folder for the log"
            )
        self._writer: Any = None

    def write(self, report: Report) -> None:
        """Add a step.

        Raises:
            SaveError: If it cannot be written.
        """
        try:
            if self._writer is None:
                # Its own SummaryWriter writes in a thread, where a full disk is not noticed.
                self._path.mkdir(parents=True, exist_ok=True)
                self._writer = self._files.EventsWriter(str(self._path / "events"))
                weakref.finalize(self, self._writer.close)
                if report.step > 1:  # later steps of a run that was stopped do not count
                    self._write(report.step, session_log={"status": 1})
            for name, value in row_of(report).items():
                if value is not None and name not in _COUNTS:
                    self._write(report.step, summary=self._summary.scalar(name, value))
            self._writer.flush()
        except OSError as error:
            raise SaveError(
                f"cannot write to {self._path}: {error.strerror}",
                hint="make room, or choose another path with --log",
            ) from error

    def _write(self, step: int, **content: Any) -> None:
        event = self._proto.Event(step=step, wall_time=time.time(), **content)
        self._writer.write_event(event)
