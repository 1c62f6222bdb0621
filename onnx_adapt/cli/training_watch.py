"""What `onnx-adapt train` tells while it runs, and how it is stopped."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from onnx_adapt.cli.outputs import say

if TYPE_CHECKING:
    from onnx_adapt.training.event_log import EventLog
    from onnx_adapt.training.log import Log
    from onnx_adapt.training.progress import Epoch, Report
    from onnx_adapt.training.settings import Settings


class Watch:
    """Tells of steps and epochs; the first Ctrl-C lets the step under way come to its end.

    A second one interrupts at once, as does one before the first step.

    Args:
        settings: How it trains.
        log: A file to write each step to, or None.
        stage: Shows one line on a terminal, in place of the one before.
    """

    def __init__(
        self, settings: Settings, log: Log | EventLog | None, stage: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._log = log
        self._stage = stage
        self._stopped = False
        self._running = False
        self._clock = time.monotonic()
        self._samples = 0
        self._steps = 0
        self._last = ""

    def __enter__(self) -> Watch:
        """Take over Ctrl-C."""
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *failure: object) -> None:
        """Give it back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._stopped or not self._running:
            raise KeyboardInterrupt
        self._stopped = True

    def is_stopped(self) -> bool:
        """Whether it is to stop after this step."""
        return self._stopped

    def tell(self, report: Report) -> None:
        """Tell of a step."""
        if not self._running:  # the first step takes longer than others
            self._running, self._clock = True, time.monotonic()
        else:
            self._samples += report.samples
            self._steps += 1
        if self._log is not None:
            self._log.write(report)
        self._stage(self._line(report))
        if report.epoch is not None:
            self._last = epoch_text(report.epoch, self._settings)
            say(self._last)

    def _line(self, report: Report) -> str:
        """The loss, samples in a second and the time left."""
        line = f"step {report.step} of {report.steps}, loss {report.loss:.4f}"
        passed = time.monotonic() - self._clock
        if self._steps and passed > 0:
            left = round(passed / self._steps * (report.steps - report.step))
            line += f", {self._samples / passed:.1f} samples/s, {time_text(left)} left"
        return line if not self._last else f"{line} ({self._last})"


def time_text(seconds: int) -> str:
    """A time such as `1:05:09` or `5:09`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def epoch_text(epoch: Epoch, settings: Settings) -> str:
    """What one epoch gave, as a line."""
    of_all = "" if settings.steps else f" of {settings.epochs}"
    text = f"epoch {epoch.number}{of_all}: loss {epoch.loss:.4f}"
    if epoch.validation_loss is not None:
        text += f", held back {epoch.validation_loss:.4f}"
    if epoch.score is not None and settings.metric != "loss":
        text += f", {settings.metric} {epoch.score:.4f}"
    return f"{text}, best so far" if epoch.best and epoch.score is not None else text
