"""The Open Inference Protocol over HTTP: which path does what, and what errors look like."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from onnx_adapt import __version__
from onnx_adapt.errors import AdaptError, RequestError
from onnx_adapt.serve.bodies import read_body
from onnx_adapt.serve.choice import read_choice
from onnx_adapt.serve.counting import Asking, Total, later, status_of
from onnx_adapt.serve.edge import Edge
from onnx_adapt.serve.front_page import described, page
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

_ROUTED_BY = ("serve_multiplexed_model_id", "serve-multiplexed-model-id")
"""Ray Serve's header that names an adapter; proxies drop headers with underscores."""

_TRITON = {"BYTES": "STRING"}
"""The one element type that Triton's configurations call otherwise."""

_SMALL = 1 << 16
"""Bytes that are read or written faster than a thread can be asked to."""


def api(
    gateway_of: Callable[[], Gateway],
    *more: Route,
    names: bool = True,
) -> ASGIApp:
    """The routes of the protocol, and more, answered by the gateway of this process.

    Args:
        gateway_of: Finds that gateway.
        more: What else is answered.
        names: Whether answers say what their request is called.
    """
    model = "/v2/models/{model}"
    paths = (model, model + "/versions/{version}")
    runs = [Route(path + "/infer", _infer, methods=["POST"]) for path in paths]
    routes = [
        *runs,
        Route("/", _front),
        Route("/-/", _front),
        Route("/v2/health/live", _live),
        Route("/v2/health/ready", _ready),
        Route("/v2", _server),
        Route("/v2/repository/index", _index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", _load, methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", _unload, methods=["POST"]),
    ]
    routes += [
        Route("/v2/models", _models),
        Route(model + "/config", _config),
        Route(model + "/stats", _stats),
    ]
    for path in paths:
        routes += [Route(path, _model), Route(path + "/ready", _model_ready)]
    failures: dict[Any, Callable[..., Any]] = {
        AdaptError: _refused,
        HTTPException: _unknown,
    }
    app = Starlette(routes=[*routes, *more], exception_handlers=failures)
    app.state.gateway_of = gateway_of
    return Edge(_Shortcut(app, runs), gateway_of, names=names)


class _Shortcut:
    """ASGI middleware that runs the model at once, and hands all other requests on.

    To come through Starlette's own layers takes as long as to run a small model.

    Args:
        app: What answers all other requests.
        runs: The routes by which the model is run.
    """

    def __init__(self, app: Starlette, runs: Sequence[Route]) -> None:
        self._app = app
        self._runs = runs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        for route in self._runs:
            match, found = route.matches(scope)
            if match is Match.FULL:
                request = Request({**scope, **found, "app": self._app}, receive)
                try:
                    response = await _infer(request)
                except AdaptError as error:
                    response = await _refused(request, error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway_of()
    return gateway


async def _front(request: Request) -> Response:
    """What this server is: a page for a browser, and a document for others."""
    gateway = _gateway(request)
    paths = {route.path for route in request.app.routes}
    if not gateway.inputs:  # a server of texts, which runs no tensors
        paths -= {"/v2/models/{model}", "/v2/models/{model}/infer"}
    about = described(gateway.base, gateway.served()[1:], paths)
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(page(about, request.scope.get("root_path", "")))
    return JSONResponse(about)


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


async def _models(request: Request) -> Response:
    return JSONResponse({"models": _gateway(request).served()})


async def _config(request: Request) -> Response:
    """What Triton's clients ask for; a `max_batch_size` of 0 means that shapes are whole."""
    name, _ = _named(request)
    gateway = _gateway(request)
    document: dict[str, Any] = {"name": name, "platform": "onnxruntime_onnx"}
    document |= {"backend": "onnxruntime", "max_batch_size": 0}
    for kind, specs in (("input", gateway.inputs), ("output", gateway.outputs)):
        document[kind] = [
            {"name": s.name, "data_type": f"TYPE_{_TRITON.get(s.datatype, s.datatype)}"}
            | {"dims": list(s.shape)}
            for s in specs.values()
        ]
    return JSONResponse(document)


async def _stats(request: Request) -> Response:
    name, version = _named(request)
    gateway = _gateway(request)
    counted = gateway.counted.get("base" if name == gateway.base else name)
    good, bad = (counted.good, counted.bad) if counted else (Total(), Total())
    stats = {
        "name": name,
        "version": version,
        "inference_count": good.count,
        "inference_stats": {"success": good.described(), "fail": bad.described()},
    }
    return JSONResponse({"model_stats": [stats]})


async def _model_ready(request: Request) -> Response:
    name, _ = _named(request)
    ready = await _gateway(request).ready()
    return JSONResponse({"name": name, "ready": ready}, 200 if ready else 503)


async def _infer(request: Request) -> Response:
    """Run the model, and count what became of it."""
    gateway = _gateway(request)
    with gateway.request() as asking:
        return await _run(request, gateway, asking)


async def _run(request: Request, gateway: Gateway, asking: Asking) -> Response:
    name = request.path_params["model"]
    version = gateway.named(name, request.path_params.get("version", ""))
    body = await read_body(request, gateway.settings)
    asked = await _aside(len(body), read_request, body, request.headers.get(HEADER_LENGTH))
    header = next(filter(None, map(request.headers.get, _ROUTED_BY)), "")
    blend = read_choice(name, gateway.base, asked.adapter, header)
    asking.choose(blend)
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
    body = await read_body(request, _gateway(request).settings)
    wanted = read_json(body).get("ready", False) if body.strip() else False
    gateway = _gateway(request)
    await gateway.refresh()
    return JSONResponse(
        [item for item in gateway.states() if not wanted or item["state"] == "READY"]
    )


async def _load(request: Request) -> Response:
    parameters = await _parameters(request)
    await _gateway(request).load(request.path_params["model"], parameters)
    return JSONResponse({})


async def _unload(request: Request) -> Response:
    if await _parameters(request):
        raise RequestError("parameters of unload are not supported")
    await _gateway(request).unload(request.path_params["model"])
    return JSONResponse({})


async def _parameters(request: Request) -> dict[str, Any]:
    """The parameters of a load or unload; Triton's clients send one that has no bearing."""
    body = await read_body(request, _gateway(request).settings)
    parameters = (read_json(body).get("parameters") or {}) if body.strip() else {}
    if not isinstance(parameters, dict):
        raise RequestError(f"`parameters` is {parameters!r:.50}", hint="give an object")
    return {key: value for key, value in parameters.items() if key != "unload_dependents"}


def _named(request: Request) -> tuple[str, str]:
    """The model that the path names, and the version of it that is served."""
    name = request.path_params["model"]
    return name, _gateway(request).named(name, request.path_params.get("version", ""))


def _described(spec: Spec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, AdaptError)
    status = status_of(error)
    return JSONResponse({"error": f"{error.message}; {error.hint}"}, status, later(status))


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def metrics_route(metrics: PrometheusMetrics) -> Route:
    """Where Prometheus finds the metrics of a process."""

    async def answer(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return Route("/metrics", answer)


def openai_routes(
    embed: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    error_of: Callable[[AdaptError], tuple[dict[str, Any], int]],
) -> list[Route]:
    """The paths of OpenAI's API: the models, and embeddings by one of them."""

    async def embeddings(request: Request) -> Response:
        try:
            body = await read_body(request, _gateway(request).settings)
            found, status = await embed(read_json(body)), 200
        except AdaptError as error:
            found, status = error_of(error)
        return JSONResponse(found, status, later(status))

    async def models(request: Request) -> Response:
        served = _gateway(request).served()
        data = [{"id": name, "object": "model", "created": 0} for name in served]
        data = [item | {"owned_by": "onnx-adapt"} for item in data]
        return JSONResponse({"object": "list", "data": data})

    return [
        Route("/v1/models", models),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
    ]
