"""HTTP connections of one process: how many there are, how long they last, and what they hold.

uvicorn by itself waits without end for the head of a request, and for a client to read an
answer; and it keeps a head of any size.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from onnx_adapt.serve.upgrades import Parser

if sys.platform != "win32":
    import resource

_KEEP_ALIVE_S = 75
"""How long a connection may be idle: longer than at load balancers, which mostly have 60 s.

If the server closed first, requests that are sent meanwhile would be lost.
"""

_MOST = 10_000
"""Connections that there may be, if the system lets a process have so many files."""

_OTHER_FILES = 100
"""Files that a process has open besides its connections."""

_MOST_HEAD = 1 << 16
"""Bytes of a request besides its body: its head, and how it is chunked."""

_MOST_PER_CHUNKED = 8
"""As many bytes may come for each byte of the body: a chunk of one byte is sent as six."""


class _Joined:
    """A transport that sends the head of an answer together with what follows it.

    uvicorn writes the head of an answer and its body apart: two calls of the system, and a
    client that wakes up twice.

    Args:
        transport: Which sends it.
        loop: The event loop.
        is_sized: Whether the answer says how long it is. Its body follows at once then; that
            of others may take long to begin, and the head goes without it.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        is_sized: Callable[[], bool],
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._is_sized = is_sized
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send this with what was written before, or with what follows."""
        self._parts.append(data)
        if len(self._parts) > 1:
            self.flush()
        elif not self._is_sized():
            self._loop.call_soon(self.flush)

    def close(self) -> None:
        """Send what is written, and close."""
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        """Send what is written."""
        if self._parts and not self._transport.is_closing():
            self._transport.write(b"".join(self._parts))
        self._parts.clear()


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with limits.

    Args:
        arguments: What uvicorn gives.
        timeout_s: How long the head of a request may take, and the client to read an answer.
        most: How many connections there may be.
    """

    def __init__(self, *arguments: Any, timeout_s: float, most: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.parser: Any = Parser(self)
        self._timeout_s = timeout_s
        self._most = most
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._begun = False
        self._apart = 0  # bytes of this request that are not of its body
        self._body = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        joined: Any = _Joined(transport, self.loop, self._is_sized)
        super().connection_made(joined)
        if len(self.connections) > self._most:
            self._refuse(503, "too many connections; try later")
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._head_came()
        self._answer_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and count those that are not of a body."""
        if self.transport.is_closing():
            return
        self._apart += len(data)
        super().data_received(data)
        if self._apart > _MOST_HEAD + _MOST_PER_CHUNKED * self._body:
            self._refuse(431, "the head of the request is too large")
        elif self._begun and self._idle() and self._head_timer is None:
            self._expect_head()

    def on_message_begin(self) -> None:
        """The first byte of a request came."""
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head came in time."""
        if self.parser.should_upgrade():  # it is read once more
            return
        self._head_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count what is of a body."""
        self._apart -= len(body)
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Count anew for the next request."""
        if self.parser.should_upgrade():
            return
        self._begun = False
        self._apart = self._body = 0
        self._head_came()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """What is left of this request, or has come of the next, must not take long."""
        joined: Any = self.transport
        joined.flush()
        super().on_response_complete()
        if self.pipeline:  # or each answer would let thousands of requests come
            self.flow.pause_reading()
        if self._begun and self._idle() and self._head_timer is None:
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, after answers to what came before it."""
        last = self.cycle
        if last is None or last.response_complete or not last.more_body:
            if self._idle():
                self._refuse(400, msg)
            else:
                last.keep_alive = False
                self.flow.pause_reading()
            return
        if not self.pipeline and not last.response_started:  # it is its body that is broken
            self._say(400, msg)
        self.transport.close()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered: it may for a while."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(self._timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
        self._answer_read()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if its client never reads the last answer."""
        super().timeout_keep_alive_handler()
        self._read_timer = self.loop.call_later(self._timeout_s, self.transport.abort)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._idle():  # an earlier request that is under way may delay this one
            self._refuse(408, f"no request came within {self._timeout_s:g} s")

    def _is_sized(self) -> bool:
        return self.cycle is not None and self.cycle.chunked_encoding is False

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, status: int, why: str) -> None:
        """Answer without asking the application, and close."""
        if self.transport.is_closing():
            return
        if self._idle():
            self._say(status, why)
        self.transport.close()

    def _say(self, status: int, why: str) -> None:
        body = json.dumps({"error": why}).encode()
        head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        head += ["Retry-After: 1"] if status != 400 else []
        head += ["Connection: close", "", ""]
        self.transport.write("\r\n".join(head).encode() + body)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _answer_read(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


def limited(timeout_s: float, most: int) -> dict[str, Any]:
    """The settings of uvicorn by which its connections are limited.

    Args:
        timeout_s: How long the head of a request may take, and the client to read an answer.
        most: How many connections there may be.
    """
    connection: Any = functools.partial(Connection, timeout_s=timeout_s, most=most)
    return {"http": connection, "ws": "none", "timeout_keep_alive": _KEEP_ALIVE_S}


def most_connections() -> int:
    """How many connections there may be, after asking the system for as many files."""
    if sys.platform == "win32":  # no such limit
        return _MOST
    wanted = _MOST + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    files = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
    return max(files - _OTHER_FILES, 1)
