"""The Open Inference Protocol over HTTP: which path does what, and what errors look like."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from onnx_adapt import __version__
from onnx_adapt.errors import (
    AdapterError,
    AdapterNotFoundError,
    AdaptError,
    RequestError,
    RunError,
)
from onnx_adapt.serve.choice import read_choice
from onnx_adapt.serve.edge import Edge
from onnx_adapt.serve.gateway import Gateway
from onnx_adapt.serve.metrics import PrometheusMetrics
from onnx_adapt.serve.protocol import (
    HEADER_LENGTH,
    Spec,
    read_json,
    read_request,
    write_response,
)

_T = TypeVar("_T")

_BASE_VERSION = "1"

_ROUTED_BY = ("serve_multiplexed_model_id", "serve-multiplexed-model-id")
"""Ray Serve's header that names an adapter; proxies drop headers with underscores."""

_SMALL = 1 << 16
"""Bytes that are read or written faster than a thread can be asked to."""


def api(gateway_of: Callable[[], Gateway], *more: Route) -> Starlette:
    """The routes of the protocol, and more, answered by the gateway of this process.

    Args:
        gateway_of: Finds that gateway.
        more: What else is answered.
    """
    model = "/v2/models/{model}"
    routes = [
        Route("/v2/health/live", _live),
        Route("/v2/health/ready", _ready),
        Route("/v2", _server),
        Route("/v2/repository/index", _index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", _load, methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", _unload, methods=["POST"]),
    ]
    for path in (model, model + "/versions/{version}"):
        routes += [
            Route(path, _model),
            Route(path + "/ready", _model_ready),
            Route(path + "/infer", _infer, methods=["POST"]),
        ]
    failures: dict[Any, Callable[..., Any]] = {
        AdaptError: _refused,
        HTTPException: _unknown,
        Exception: _failed,
    }
    edge = Middleware(Edge, gateway_of=gateway_of)
    app = Starlette(routes=[*routes, *more], exception_handlers=failures, middleware=[edge])
    app.state.gateway_of = gateway_of
    return app


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway_of()
    return gateway


async def _live(request: Request) -> Response:
    return JSONResponse({"live": True})


async def _ready(request: Request) -> Response:
    ready = await _gateway(request).ready()
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def _server(request: Request) -> Response:
    extensions = ["binary_tensor_data", "model_repository"]
    return JSONResponse(
        {"name": "onnx-adapt", "version": __version__, "extensions": extensions}
    )


async def _model(request: Request) -> Response:
    name, version = _named(request)
    gateway = _gateway(request)
    return JSONResponse(
        {
            "name": name,
            "versions": [version],
            "platform": "onnxruntime_onnx",
            "inputs": [_described(spec) for spec in gateway.inputs.values()],
            "outputs": [_described(spec) for spec in gateway.outputs.values()],
        }
    )


async def _model_ready(request: Request) -> Response:
    name, _ = _named(request)
    ready = await _gateway(request).ready()
    return JSONResponse({"name": name, "ready": ready}, 200 if ready else 503)


async def _infer(request: Request) -> Response:
    """Run the model, and count what became of it."""
    gateway, started = _gateway(request), time.monotonic()
    # Names that clients make up are no labels: there would be no end of them.
    request.state.label = "unknown"
    status = 500
    try:
        response = await _run(request, gateway)
        status = response.status_code
    except AdaptError as error:
        response = await _refused(request, error)
        status = response.status_code
    except ClientDisconnect:  # nobody is there to read it
        response = Response(status_code=(status := 400))
    finally:
        gateway.metrics.answered(request.state.label, status, time.monotonic() - started)
    return response


async def _run(request: Request, gateway: Gateway) -> Response:
    name, version = _named(request)
    body = await _body(request)
    asked = await _aside(len(body), read_request, body, request.headers.get(HEADER_LENGTH))
    header = next(filter(None, map(request.headers.get, _ROUTED_BY)), "")
    blend = read_choice(name, gateway.settings.base, asked.adapter, header)
    for adapter in blend:
        gateway.version(adapter)
    request.state.label = "blend" if len(blend) > 1 else next(iter(blend), "base")
    active, outputs = await gateway.infer(asked, blend)
    found = [(gateway.outputs[key], array) for key, array in outputs.items()]
    size = sum(array.nbytes for array in outputs.values())
    content, headers = await _aside(size, write_response, asked, name, version, active, found)
    return Response(content, headers=headers)


async def _aside(size: int, action: Callable[..., _T], *arguments: Any) -> _T:
    """Do what takes long in a thread, so that other requests go on; the rest at once."""
    if size <= _SMALL:
        return action(*arguments)
    return await asyncio.to_thread(action, *arguments)


async def _index(request: Request) -> Response:
    body = await _body(request)
    wanted = read_json(body).get("ready", False) if body.strip() else False
    gateway = _gateway(request)
    await gateway.refresh()
    states = [{"name": gateway.settings.base, "version": _BASE_VERSION, "state": "READY"}]
    for entry in gateway.entries.values():
        state = "READY" if entry.version else "UNAVAILABLE"
        version = entry.version.rpartition("@")[2]
        states.append({"name": entry.name, "version": version, "state": state})
        if entry.reason:
            states[-1]["reason"] = entry.reason
    return JSONResponse([item for item in states if not wanted or item["state"] == "READY"])


async def _load(request: Request) -> Response:
    return await _change(request, _gateway(request).load)


async def _unload(request: Request) -> Response:
    return await _change(request, _gateway(request).unload)


async def _change(request: Request, action: Callable[[str], Awaitable[None]]) -> Response:
    """Load or unload; weights and configurations are not taken over HTTP."""
    body = await _body(request)
    parameters = read_json(body).get("parameters", {}) if body.strip() else {}
    if not isinstance(parameters, dict) or parameters.keys() - {"unload_dependents"}:
        raise RequestError(
            "parameters of load and unload are not supported",
            hint="adapters come from the server's folder only",
        )
    name = request.path_params["model"]
    if name == _gateway(request).settings.base:
        raise RequestError("the base is loaded for as long as the server runs")
    await action(name)
    return JSONResponse({})


def _named(request: Request) -> tuple[str, str]:
    """The model that the path names, and the version of it that is served.

    Raises:
        AdapterNotFoundError: If there is none, or the path names another version.
    """
    gateway, name = _gateway(request), request.path_params["model"]
    present = _BASE_VERSION
    if name != gateway.settings.base:
        present = gateway.version(name).rpartition("@")[2]
    if request.path_params.get("version", present) != present:
        raise AdapterNotFoundError(
            f"{name!r} has no such version", hint=f"{present!r} is served"
        )
    return name, present


async def _body(request: Request) -> bytes:
    """The body, if it is not too large and comes in time.

    Raises:
        RequestError: If it is, or does not.
    """
    settings = _gateway(request).settings
    most = int(settings.max_body_mb * 1e6)
    too_large = RequestError(
        f"the body has more than {settings.max_body_mb:g} MB",
        hint="send less at once, or raise --max-body-mb",
        status=413,
    )
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(
            "compressed bodies are not taken", hint="send it as it is", status=415
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), settings.timeout_s)
    except asyncio.TimeoutError as error:
        raise RequestError(
            f"the body did not come within {settings.timeout_s:g} s", status=408
        ) from error


def _described(spec: Spec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, AdaptError)
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, AdapterNotFoundError):
        status = 404
    else:
        status = 400 if isinstance(error, AdapterError | RunError) else 500
    later = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": f"{error.message}; {error.hint}"}, status, later)


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server failed; its log tells why"}, 500)


def metrics_route(metrics: PrometheusMetrics) -> Route:
    """Where Prometheus finds the metrics of a process."""

    async def answer(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return Route("/metrics", answer)
