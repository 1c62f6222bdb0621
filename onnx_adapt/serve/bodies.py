"""The bodies of requests: read in time and whole, unpacked, and never larger than allowed."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from types import TracebackType

from starlette.requests import Request

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.counting import GONE
from onnx_adapt.serve.settings import Settings
from onnx_adapt.serve.waiting import within

_CODINGS: dict[str, int | None] = {"identity": None, "gzip": 31, "deflate": 15}
"""How bodies may be compressed, with what zlib calls it."""

_READ_TO_THE_END = 4
"""A body up to this many times too large is read, and dropped, before it is refused.

Who is still sending does not read an answer, and would find the connection closed.
"""

_MOST_AT_A_TIME = 8
"""The bodies of all requests under way have at most this many times what one may have."""


class Bodies:
    """The memory that the bodies of requests under way have.

    Args:
        settings: What was said about the server.

    Attributes:
        left: The bytes that nobody has.
    """

    def __init__(self, settings: Settings) -> None:
        self.left = _MOST_AT_A_TIME * int(settings.max_body_mb * 1e6)

    def share(self) -> Share:
        """The memory of one request, which it has for as long as a block lasts."""
        return Share(self)


class Share:
    """The memory that one request has, inside a block.

    Args:
        bodies: The memory of all of them.
    """

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._taken = 0

    def __enter__(self) -> Callable[[int], None]:
        """What takes so many bytes more."""
        return self._take

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give all of them back."""
        self._bodies.left += self._taken

    def _take(self, size: int) -> None:
        if size > self._bodies.left:
            raise RequestError("too many bodies at a time", hint="try later", status=503)
        self._bodies.left -= size
        self._taken += size


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body, if it is not too large, comes in time, and there is memory for it.

    Raises:
        RequestError: If it is, or does not, or there is not.
    """
    take: Callable[[int], None] = request.scope["take"]
    most = int(settings.max_body_mb * 1e6)
    bits = _coding(request)
    length = request.headers.get("content-length", "")
    # A body that does not say where it ends may have none.
    readable = (_READ_TO_THE_END if length.isdecimal() else 1) * most
    if length.isdecimal() and int(length[:20]) > readable:
        raise _too_large(settings)

    async def read() -> bytes:
        body, seen, more = bytearray(), 0, True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":  # nobody is there to read why
                raise RequestError("the client is gone", status=GONE)
            chunk, more = message.get("body", b""), message.get("more_body", False)
            seen += len(chunk)
            if seen > readable:
                raise _too_large(settings)
            if seen <= most:
                take(len(chunk))
                body += chunk
        if seen > most:
            raise _too_large(settings)
        return bytes(body)

    try:
        body = await within(settings.timeout_s, read())
    except asyncio.TimeoutError as error:
        raise RequestError(
            f"the body did not come within {settings.timeout_s:g} s", status=408
        ) from error
    if bits is None:
        return body
    found = await asyncio.to_thread(_inflated, body, bits, most)
    if found is None:
        raise _too_large(settings)
    take(len(found))
    return found


def _too_large(settings: Settings) -> RequestError:
    return RequestError(
        f"the body has more than {settings.max_body_mb:g} MB",
        hint="send less at once, or raise --max-body-mb",
        status=413,
    )


def _coding(request: Request) -> int | None:
    """What zlib calls the form that a body is compressed in, or None if it is not."""
    name = request.headers.get("content-encoding", "identity")
    if name not in _CODINGS:
        raise RequestError(
            f"content-encoding {name!r:.50} is not taken",
            hint=f"one of {', '.join(_CODINGS)}",
            status=415,
        )
    return _CODINGS[name]


def _inflated(body: bytes, bits: int, most: int) -> bytes | None:
    """A compressed body, or None if it is larger than one may be; no more is unpacked."""
    unpacker = zlib.decompressobj(bits)
    try:
        found = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise RequestError(f"the body cannot be unpacked: {error}") from error
    if len(found) > most:
        return None
    if not unpacker.eof:
        raise RequestError("the compressed body ends too early")
    return found
