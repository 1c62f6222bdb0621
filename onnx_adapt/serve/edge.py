"""The edge of the server: every HTTP request passes here first, and every answer last."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onnx_adapt.serve.gateway import Gateway
from onnx_adapt.serve.records import REQUEST_ID, Record, read_id, recorded

_log = logging.getLogger(__name__)

_PROBES = ("/v2/health/live", "/v2/health/ready")
"""What needs no token: whoever watches the server has none."""

_ALWAYS = (*_PROBES, "/metrics")
"""What is answered while the server stops, or has too much to do."""

_MOST = 1000
"""Requests that may be under way in one process; the rest get a 503."""


class Edge:
    """ASGI middleware that counts requests, and refuses them where there must be no more.

    Args:
        app: What answers requests.
        gateway_of: The gateway of this process.
        names: Whether answers say what their request is called; Ray's proxy says so itself.
    """

    def __init__(
        self, app: ASGIApp, gateway_of: Callable[[], Gateway], *, names: bool
    ) -> None:
        self._app = app
        self._gateway_of = gateway_of
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":  # Ray's server starts and ends the application by messages
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record(read_id(headers.get(REQUEST_ID, "")), scope["path"])
        with recorded(record, scope["method"], headers):
            send = _noting(send, record, names=self._names)
            try:
                await self._answer(scope, receive, send)
            except Exception:
                if record.status:  # the answer is begun: all that is left is to cut it off
                    raise
                _log.exception("request %s failed", record.id)
                await _FAILED(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if scope["path"] not in _PROBES and not self._gateway_of().access.allows(given):
            await _UNKNOWN(scope, receive, send)
            return
        if scope["path"] in _ALWAYS:
            await self._app(scope, receive, send)
            return
        gateway = self._gateway_of()
        if gateway.stopping:
            await _unavailable("the server is stopping", 1)(scope, receive, send)
        elif gateway.under_way >= _MOST:
            await _unavailable("too many requests; try later", 1)(scope, receive, send)
        else:
            gateway.under_way += 1
            try:
                with gateway.bodies.share() as scope["take"]:
                    await self._app(scope, receive, _closing(send, gateway))
            finally:
                gateway.under_way -= 1


_FAILED = JSONResponse({"error": "the server failed; its log tells why"}, 500)

_UNKNOWN = JSONResponse(
    {"error": "a bearer token is needed"}, 401, {"WWW-Authenticate": "Bearer"}
)


def _unavailable(why: str, seconds: int) -> JSONResponse:
    headers = {"Retry-After": str(seconds), "Connection": "close"}
    return JSONResponse({"error": why}, 503, headers)


def _noting(send: Send, record: Record, *, names: bool) -> Send:
    """A `send` that notes what became of a request."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            if names:
                own = (REQUEST_ID.encode(), record.id.encode())
                message["headers"] = [*message.get("headers", []), own]
        await send(message)
        record.size += len(message.get("body", b""))

    return sent


def _closing(send: Send, gateway: Gateway) -> Send:
    """A `send` that ends the connection after its answer once the server stops.

    A client that sent its next request on it would find it closed, and not know whether the
    request was run.
    """

    async def sent(message: Message) -> None:
        if gateway.stopping and message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
        await send(message)

    return sent


async def drained(gateway: Gateway, grace_s: float, settle_s: float) -> None:
    """Refuse new requests, and wait for those under way.

    Args:
        gateway: Which takes no more requests from now on.
        grace_s: How long to wait for them at most.
        settle_s: How long to refuse requests at least: clients that are connected, and
            whoever watches readiness, learn of the end by an answer.
    """
    gateway.stopping = True
    loop = asyncio.get_running_loop()
    began = loop.time()
    while (passed := loop.time() - began) < grace_s:
        if not gateway.under_way and passed >= settle_s:
            return
        await asyncio.sleep(0.02)
