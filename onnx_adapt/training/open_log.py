"""Open the log of a training in the form that its path tells."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_adapt.training.event_log import EventLog
from onnx_adapt.training.log import Log


def open_log(path: str | os.PathLike[str], *, resume: bool = False) -> Log | EventLog:
    """Open a log: a `.csv` or `.jsonl`, or without a suffix a folder for TensorBoard.

    Raises:
        TrainingError: If the suffix is unknown, a library is missing, or there is such a log
            of another training.
    """
    form = Log if Path(path).suffix else EventLog
    return form(path, resume=resume)
