"""Connections that last too long, hold too much, or are too many."""

import asyncio
import contextlib
import functools
import gc
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from waiting import LONG, until

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.bodies import Bodies
from onnx_adapt.serve.connections import Connection, limited
from onnx_adapt.serve.settings import Settings

TIMEOUT_S, MOST = 0.4, 3
ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def _answer(request: Request) -> Response:
    await asyncio.sleep(float(request.query_params.get("sleep", 0)))
    said = await request.body()
    return PlainTextResponse(said or "x" * int(request.query_params.get("size", 1)))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = Starlette(routes=[Route("/", _answer, methods=["GET", "POST"])])
    config = uvicorn.Config(app, log_config=None, lifespan="off", **limited(TIMEOUT_S, MOST))
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=functools.partial(running.run, [listening]))
        thread.start()
        until(lambda: running.started)
        yield listening.getsockname()[1]
        running.should_exit = True
        thread.join()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LONG)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while chunk := connection.recv(1 << 16):
        found += chunk
    return found


@pytest.mark.parametrize("sent", [b"", ASK[:-2], ASK + ASK[:9]], ids=["none", "part", "next"])
def test_a_head_that_does_not_come_is_not_waited_for(port: int, sent: bytes) -> None:
    with connected(port) as slow:
        slow.sendall(sent)
        last = all_of(slow).rpartition(b"HTTP/1.1 ")[2]
        assert last.startswith(b"408 Request Timeout")


@pytest.mark.parametrize(
    "start",
    [
        b"GET /?",
        b"GET / HTTP/1.1\r\nA: ",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: ",
    ],
    ids=["url", "header", "trailer"],
)
def test_a_head_without_end_is_refused(port: int, start: bytes) -> None:
    with connected(port) as endless:
        endless.sendall(start)
        until(lambda: _refuses(endless, b"x" * (1 << 16)))


def _refuses(connection: socket.socket, more: bytes) -> bool:
    try:
        connection.sendall(more)
    except OSError:
        return True
    return False


def test_a_slow_answer_and_one_in_small_chunks_are_not_cut_off(port: int) -> None:
    body = b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n"
    with connected(port) as patient:
        head = b"POST /?sleep=1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        patient.sendall(head + body)
        assert patient.recv(1000).startswith(b"HTTP/1.1 200")


def test_an_answer_that_nobody_reads_is_dropped(port: int) -> None:
    with connected(port) as deaf:
        deaf.sendall(ASK.replace(b"/ ", b"/?size=50000000 "))
        time.sleep(3 * TIMEOUT_S)
        assert len(all_of(deaf)) < 50_000_000


def test_connections_above_the_limit_are_told_so(port: int) -> None:
    held = [connected(port) for _ in range(MOST)]
    for connection in held:
        connection.sendall(ASK)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    with connected(port) as another:
        assert all_of(another).startswith(b"HTTP/1.1 503")
    for connection in held:
        connection.close()

    def free() -> bool:
        with connected(port) as another:
            another.sendall(ASK)
            return another.recv(1000).startswith(b"HTTP/1.1 200")

    until(free)


OFFER = b"POST / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nContent-Length: 5\r\n"
OFFER += b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n\r\nfirst"
NEXT = b"POST / HTTP/1.1\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlast"


@pytest.mark.parametrize("offer", [OFFER, OFFER.replace(b"h2c", b"websocket"), ASK])
@pytest.mark.parametrize("apart", [1, 40, 10_000])
def test_an_offer_of_another_protocol_is_ignored_and_loses_nothing(
    port: int, offer: bytes, apart: int
) -> None:
    whole = offer + offer + NEXT
    with connected(port) as client:
        for start in range(0, len(whole), apart):
            client.sendall(whole[start : start + apart])
        bodies = [
            part.partition(b"\r\n\r\n")[2] for part in all_of(client).split(b"HTTP/1.1 ")
        ]
    first = b"x" if offer is ASK else b"first"
    assert bodies == [b"", first, first, b"last"]


@pytest.mark.parametrize(
    "junk", [b"BLAH\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: a\r\n\r\n"]
)
def test_what_is_no_http_is_refused_after_the_answers_before_it(
    port: int, junk: bytes
) -> None:
    with connected(port) as client:
        client.sendall(ASK + ASK + junk)
        answers = all_of(client).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200", b"200"]
    with connected(port) as client:
        client.sendall(junk)
        (answer,) = all_of(client).split(b"HTTP/1.1 ")[1:]
    assert answer.startswith(b"400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
        "error": "Invalid HTTP request received."
    }


@pytest.mark.parametrize(
    "sent",
    [
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_connect_and_a_broken_body_are_refused(port: int, sent: bytes) -> None:
    with connected(port) as client:
        client.sendall(sent)
        assert all_of(client).startswith(b"HTTP/1.1 400 ")


def test_requests_in_a_row_wait_outside_until_those_before_are_answered(port: int) -> None:
    """Each answer would else let as many requests in as one look at the socket brings."""
    with connected(port) as client:
        client.setblocking(False)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                client.send(b"GET /?sleep=0.02 HTTP/1.1\r\n\r\n" * 1000)
        held = [
            len(item.pipeline) for item in gc.get_objects() if isinstance(item, Connection)
        ]
    assert 0 < max(held) < 10_000


def test_bodies_have_so_much_memory_together_and_give_it_back() -> None:
    bodies = Bodies(Settings("m", "a", max_body_mb=1.0))
    with bodies.share() as first:
        first(7_000_000)
        with bodies.share() as second:
            second(1_000_000)
            with pytest.raises(RequestError, match="too many") as error:
                second(1)
        assert error.value.status == 503
        first(1_000_000)
    with bodies.share() as again:
        again(8_000_000)
