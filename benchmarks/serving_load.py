"""Clients of a server: a closed loop over connections that stay, which costs little itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Load:
    """What became of some requests.

    Attributes:
        seconds: How long all of them took.
        each_ms: How long each took, in milliseconds.
        bodies: The answers, in the order of the requests.
    """

    seconds: float
    each_ms: list[float]
    bodies: list[bytes]

    @property
    def per_second(self) -> float:
        """Requests in a second."""
        return len(self.bodies) / self.seconds

    def quantile(self, share: float) -> float:
        """The time that this share of the requests took at most."""
        return float(np.quantile(self.each_ms, share))


def request(port: int, path: str, document: dict[str, object]) -> bytes:
    """A request as it is sent."""
    body = json.dumps(document).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def send(port: int, requests: Sequence[bytes], clients: int) -> Load:
    """Send requests, of which so many are under way at any time.

    Raises:
        RuntimeError: If one is not answered with status 200.
    """
    return asyncio.run(_send(port, requests, clients))


async def _send(port: int, requests: Sequence[bytes], clients: int) -> Load:
    bodies: list[bytes] = [b""] * len(requests)
    spent = [0.0] * len(requests)
    numbers = iter(range(len(requests)))

    async def one_after_the_other() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            began = time.perf_counter()
            writer.write(requests[number])
            bodies[number] = await _answer(reader)
            spent[number] = (time.perf_counter() - began) * 1e3
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(clients)))
    return Load(time.perf_counter() - began, spent, bodies)


async def _answer(reader: asyncio.StreamReader) -> bytes:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(head + await reader.read(500))
    if b"transfer-encoding: chunked" not in head:
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        return await reader.readexactly(int(length))
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


def wrong(load: Load, truth: Sequence[np.ndarray], most: float) -> int:
    """How many answers are not those of a session."""
    count = 0
    for body, expected in zip(load.bodies, truth, strict=True):
        (output,) = json.loads(body)["outputs"]
        found = np.array(output["data"], np.float32)
        count += not np.abs(found - expected.ravel()).max() < most
    return count
