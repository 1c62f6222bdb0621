"""What is known of a request while it is answered: its id, its span, its line in the log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler
from pathlib import Path

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.tracing import finish, request_span

REQUEST_ID = "x-request-id"
"""The header of HTTP, and the metadata of gRPC, that names a request."""

_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_LONGEST_PATH = 300

_access = logging.getLogger("onnx_adapt.access")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Record:
    """What is known of a request while it is answered.

    Attributes:
        id: What it is called in answers and logs.
        path: What was asked for.
        adapter: What it is counted under: an adapter, `base`, `blend`, or '' where no model
            was asked for.
        status: The HTTP status of the answer, or 0 if none was begun.
        size: The bytes of the answer's body that were sent.
        began: When it came, by `time.perf_counter`.
    """

    id: str
    path: str
    adapter: str = ""
    status: int = 0
    size: int = 0
    began: float = field(default_factory=time.perf_counter)


_current: ContextVar[Record | None] = ContextVar("record", default=None)


def read_id(given: str) -> str:
    """What a request is called: as its client says, if that fits into a line of a log.

    Example:
        >>> read_id("7f3a-1"), len(read_id("two words")), len(read_id("7" * 200))
        ('7f3a-1', 32, 32)
    """
    return given if _ID.fullmatch(given) else os.urandom(16).hex()


@contextlib.contextmanager
def recorded(record: Record, name: str, headers: Mapping[str, str]) -> Iterator[Record]:
    """Answer a request inside the block, which has a span and a line of the access log.

    Args:
        record: What is known of the request.
        name: What its span is called.
        headers: Its headers, which may name the span that it is a part of.
    """
    token = _current.set(record)
    known = {"url.path": record.path[:_LONGEST_PATH], "onnx_adapt.request_id": record.id}
    try:
        with request_span(name, headers, known) as span:
            try:
                yield record
            finally:
                said: dict[str, str | int] = {"http.response.status_code": record.status}
                said |= {"onnx_adapt.adapter": record.adapter} if record.adapter else {}
                finish(span, said, failed=record.status >= 500)
    finally:
        _current.reset(token)
        if _access.isEnabledFor(logging.INFO):
            _access.info(line(record, time.perf_counter() - record.began))


def note_adapter(adapter: str) -> None:
    """Note which adapter the present request asks for, if there is such a request."""
    record = _current.get()
    if record is not None:
        record.adapter = adapter


def line(record: Record, seconds: float) -> str:
    """A request's line of the access log.

    Example:
        >>> line(Record("7", "/v2", status=200, size=9), 0.0042)[42:]
        '"id": "7", "adapter": "", "path": "/v2", "status": 200, "ms": 4.2, "bytes": 9}'
    """
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    found = {"time": now, "id": record.id, "adapter": record.adapter}
    found |= {"path": record.path[:_LONGEST_PATH]}
    measured = {"status": record.status, "ms": round(seconds * 1e3, 3), "bytes": record.size}
    return json.dumps(found | measured)


def check_access_log(path: str) -> None:
    """Refuse an access log that cannot be written.

    Raises:
        RequestError: If it cannot.
    """
    file = Path(path).absolute()
    there = file.exists()
    if path != "-" and (
        file.is_dir() or not os.access(file if there else file.parent, os.W_OK)
    ):
        raise RequestError(
            f"the access log {path} cannot be written",
            hint="--access-log takes a file, or - for stderr",
        )


def open_access_log(path: str) -> None:
    """Write a line for each request from now on.

    Args:
        path: The file to write to, which may be moved away at any time; `-` is stderr.

    Raises:
        RequestError: If it cannot be written.
    """
    check_access_log(path)
    handler: logging.Handler = logging.StreamHandler()
    if path != "-":
        # The file is made with its first line: a server that does not start leaves none.
        handler = _File(Path(path).absolute(), encoding="utf-8", delay=True)
    _access.setLevel(logging.INFO)
    _access.propagate = False
    _access.addHandler(handler)


class _File(WatchedFileHandler):
    """A file to which lines are added; a new one is made when it is moved away."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            super().emit(record)
        except OSError:  # it was moved away, and no new one can be made
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say once that lines are lost; requests are answered all the same."""
        if not self._failed:
            _log.warning("lines of the access log are lost: %s", sys.exc_info()[1])
        self._failed = True
