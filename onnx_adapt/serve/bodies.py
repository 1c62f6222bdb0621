"""The bodies of requests: read in time and whole, unpacked, and never larger than allowed."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from starlette.requests import Request

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.settings import Settings

_CODINGS: dict[str, Any] = {"identity": None, "gzip": 31, "deflate": 15}
"""How bodies may be compressed, with what zlib calls it."""

_READ_TO_THE_END = 4
"""A body up to this many times too large is read, and dropped, before it is refused.

Who is still sending does not read an answer, and would find the connection closed.
"""


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body, if it is not too large and comes in time.

    Raises:
        RequestError: If it is, or does not.
    """
    most = int(settings.max_body_mb * 1e6)
    too_large = RequestError(
        f"the body has more than {settings.max_body_mb:g} MB",
        hint="send less at once, or raise --max-body-mb",
        status=413,
    )
    coding = request.headers.get("content-encoding", "identity")
    if coding not in _CODINGS:
        raise RequestError(
            f"content-encoding {coding!r:.50} is not taken",
            hint=f"one of {', '.join(_CODINGS)}",
            status=415,
        )
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
            body += chunk if seen <= most else b""
        if seen > most:
            raise too_large
        return bytes(body)

    try:
        body = await asyncio.wait_for(read(), settings.timeout_s)
    except asyncio.TimeoutError as error:
        raise RequestError(
            f"the body did not come within {settings.timeout_s:g} s", status=408
        ) from error
    if _CODINGS[coding] is None:
        return body
    return await asyncio.to_thread(_inflated, body, _CODINGS[coding], most, too_large)


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
