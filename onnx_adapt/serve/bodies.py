"""The bodies of requests: read in time and whole, unpacked, and never larger than allowed."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Callable, Iterator

from starlette.requests import ClientDisconnect, Request

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.counting import GONE
from onnx_adapt.serve.settings import Settings

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
    """

    def __init__(self, settings: Settings) -> None:
        self._left = _MOST_AT_A_TIME * int(settings.max_body_mb * 1e6)

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """What a request calls with the bytes that it needs, for as long as the block lasts.

        Raises:
            RequestError: That call, if there are not so many left.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if size > self._left:
                raise RequestError("too many bodies at a time", hint="try later", status=503)
            self._left -= size
            taken += size

        try:
            yield take
        finally:
            self._left += taken


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body, if it is not too large, comes in time, and there is memory for it.

    Raises:
        RequestError: If it is, or does not, or there is not.
    """
    take: Callable[[int], None] = request.scope["take"]
    most = int(settings.max_body_mb * 1e6)
    too_large = RequestError(
        f"the body has more than {settings.max_body_mb:g} MB",
        hint="send less at once, or raise --max-body-mb",
        status=413,
    )
    bits = _coding(request)
    length = request.headers.get("content-length", "")
    # A body that does not say where it ends may have none.
    readable = (_READ_TO_THE_END if length.isdecimal() else 1) * most
    if length.isdecimal() and int(length[:20]) > readable:
        raise too_large

    async def read() -> bytes:
        body, seen = bytearray(), 0
        async for chunk in request.stream():
            seen += len(chunk)
            if seen > readable:
                raise too_large
            if seen <= most:
                take(len(chunk))
                body += chunk
        if seen > most:
            raise too_large
        return bytes(body)

    try:
        body = await asyncio.wait_for(read(), settings.timeout_s)
    except ClientDisconnect as error:  # nobody is there to read why
        raise RequestError("the client is gone", status=GONE) from error
    except asyncio.TimeoutError as error:
        raise RequestError(
            f"the body did not come within {settings.timeout_s:g} s", status=408
        ) from error
    if bits is None:
        return body
    found = await asyncio.to_thread(_inflated, body, bits, most, too_large)
    take(len(found))
    return found


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


def _inflated(body: bytes, bits: int, most: int, too_large: RequestError) -> bytes:
    """A compressed body, of which no more is unpacked than may have come."""
    unpacker = zlib.decompressobj(bits)
    try:
        found = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise RequestError(f"the body cannot be unpacked: {error}") from error
    if len(found) > most:
        raise too_large
    if not unpacker.eof:
        raise RequestError("the compressed body ends too early")
    return found
