"""The Open Inference Protocol over gRPC: the same gateway, behind other messages."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from onnx_adapt import __version__
from onnx_adapt.errors import AdaptError, RequestError, RunError
from onnx_adapt.serve.access import Access
from onnx_adapt.serve.choice import read_choice
from onnx_adapt.serve.counting import status_of
from onnx_adapt.serve.gateway import Gateway
from onnx_adapt.serve.grpc_messages import message
from onnx_adapt.serve.grpc_requests import parameters_of, read_grpc_request
from onnx_adapt.serve.protocol import Spec
from onnx_adapt.serve.records import REQUEST_ID, Record, read_id, recorded
from onnx_adapt.serve.tensors import bytes_of_array

_log = logging.getLogger(__name__)

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""What gRPC calls an HTTP status."""

_PROBES = ("ServerLive", "ServerReady")
"""What needs no token: whoever watches the server has none."""

_SERVICE = "/inference.GRPCInferenceService/"

_MOST = 1000
"""Calls that may be under way in one process."""


def grpc_server(gateway: Gateway, address: str) -> Any:
    """A server that is to be started in the loop of the gateway.

    Args:
        gateway: What answers.
        address: `host:port` to listen on.

    Raises:
        RunError: If it cannot listen there.
    """
    access = gateway.access
    most = int(gateway.settings.max_body_mb * 1e6)
    server = grpc.aio.server(
        interceptors=[_Guard(access)],
        maximum_concurrent_rpcs=_MOST,
        options=[
            ("grpc.max_receive_message_length", most),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
    )
    server.add_generic_rpc_handlers((_handlers(Servicer(gateway)),))
    try:
        if access.certificate:
            server.add_secure_port(address, _credentials(access))
        else:
            server.add_insecure_port(address)
    except RuntimeError as error:
        raise RunError(f"cannot listen on {address}", hint="choose another port") from error
    return server


def _credentials(access: Access) -> Any:
    certificate = Path(access.certificate).read_bytes()
    key = Path(access.key).read_bytes() if access.key else certificate
    return grpc.ssl_server_credentials([(key, certificate)])


class _Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio has no types
    """Refuses calls without the token, which is metadata as it is a header of HTTP."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        given = dict(details.invocation_metadata).get("authorization", "")
        probe = details.method.rpartition("/")[2] in _PROBES
        if probe or self._access.allows(given.encode()):
            return await continuation(details)

        async def refuse(request: Any, context: Any) -> None:
            with _recorded(details.method, context) as record:
                record.status = 401
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed")

        return grpc.unary_unary_rpc_method_handler(refuse)


class Servicer:
    """The calls of the protocol, each from its request to its response."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def server_live(self, request: Any) -> Any:
        """Whether the process is there."""
        return message("ServerLiveResponse")(live=True)

    async def server_ready(self, request: Any) -> Any:
        """Whether requests are taken."""
        return message("ServerReadyResponse")(ready=await self._gateway.ready())

    async def server_metadata(self, request: Any) -> Any:
        """What the server is."""
        return message("ServerMetadataResponse")(
            name="onnx-adapt", version=__version__, extensions=["model_repository"]
        )

    async def model_ready(self, request: Any) -> Any:
        """Whether a model is served; an unknown one is not."""
        try:
            self._gateway.named(request.name, request.version)
        except AdaptError:
            return message("ModelReadyResponse")(ready=False)
        return message("ModelReadyResponse")(ready=await self._gateway.ready())

    async def model_metadata(self, request: Any) -> Any:
        """The inputs and outputs of a model."""
        version = self._gateway.named(request.name, request.version)
        return message("ModelMetadataResponse")(
            name=request.name,
            versions=[version],
            platform="onnxruntime_onnx",
            inputs=[_described(spec) for spec in self._gateway.inputs.values()],
            outputs=[_described(spec) for spec in self._gateway.outputs.values()],
        )

    async def repository_index(self, request: Any) -> Any:
        """What there is."""
        await self._gateway.refresh()
        states = self._gateway.states()
        ready = [state for state in states if state["state"] == "READY"]
        return message("RepositoryIndexResponse")(models=ready if request.ready else states)

    async def repository_load(self, request: Any) -> Any:
        """Check an adapter's file again, and serve it."""
        await self._gateway.load(request.model_name, parameters_of(request.parameters))
        return message("RepositoryModelLoadResponse")()

    async def repository_unload(self, request: Any) -> Any:
        """Serve an adapter no more."""
        await self._gateway.unload(request.model_name)
        return message("RepositoryModelUnloadResponse")()

    async def infer(self, request: Any) -> Any:
        """Run the model, and count what became of it."""
        gateway = self._gateway
        if gateway.stopping:
            raise RequestError("the server is stopping", hint="try another", status=503)
        gateway.under_way += 1
        try:
            with gateway.request() as asking, gateway.bodies.share() as take:
                take(request.ByteSize())
                version = gateway.named(request.model_name, request.model_version)
                asked = read_grpc_request(request)
                blend = read_choice(request.model_name, gateway.base, asked.adapter, "")
                asking.choose(blend)
                active, outputs = await gateway.infer(asked, blend)
        finally:
            gateway.under_way -= 1
        response = message("ModelInferResponse")(
            model_name=request.model_name, model_version=version, id=request.id
        )
        response.parameters["adapter"].string_param = active
        for name, array in outputs.items():
            datatype = gateway.outputs[name].datatype
            response.outputs.add(name=name, datatype=datatype, shape=array.shape)
            response.raw_output_contents.append(bytes_of_array(datatype, array))
        return response

    async def stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Answer requests one after the other; one that fails does not end the stream."""
        async for request in requests:
            with _recorded(f"{_SERVICE}ModelStreamInfer", context) as record:
                try:
                    found = {"infer_response": await self.infer(request)}
                    record.status = 200
                except AdaptError as error:
                    record.status = status_of(error)
                    found = {"error_message": f"{error.message}; {error.hint}"}
                answer = message("ModelStreamInferResponse")(**found)
                record.size = answer.ByteSize()
            yield answer


def _described(spec: Spec) -> Any:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def _handlers(servicer: Servicer) -> Any:
    calls = {
        "ServerLive": servicer.server_live,
        "ServerReady": servicer.server_ready,
        "ServerMetadata": servicer.server_metadata,
        "ModelReady": servicer.model_ready,
        "ModelMetadata": servicer.model_metadata,
        "ModelInfer": servicer.infer,
        "RepositoryIndex": servicer.repository_index,
        "RepositoryModelLoad": servicer.repository_load,
        "RepositoryModelUnload": servicer.repository_unload,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _answering(_SERVICE + name, call),
            request_deserializer=message(f"{name}Request").FromString,
            response_serializer=lambda found: found.SerializeToString(),
        )
        for name, call in calls.items()
    }
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        servicer.stream,
        request_deserializer=message("ModelInferRequest").FromString,
        response_serializer=lambda found: found.SerializeToString(),
    )
    return grpc.method_handlers_generic_handler(_SERVICE.strip("/"), handlers)


def _answering(
    path: str, call: Callable[[Any], Awaitable[Any]]
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(request: Any, context: Any) -> Any:
        with _recorded(path, context) as record:
            try:
                found = await call(request)
            except AdaptError as error:
                record.status = status_of(error)
                code = _CODES.get(record.status, grpc.StatusCode.INTERNAL)
                why = f"{error.message}; {error.hint}"
            except Exception:
                record.status = 500
                _log.exception("request %s failed", record.id)
                code, why = grpc.StatusCode.INTERNAL, "the server failed; its log tells why"
            else:
                record.status, record.size = 200, found.ByteSize()
                return found
        await context.abort(code, why)

    return answer


@contextlib.contextmanager
def _recorded(path: str, context: Any) -> Iterator[Record]:
    """Answer a call inside the block; what it is called is told behind the answer."""
    given = context.invocation_metadata() or ()
    headers = {key: value for key, value in given if isinstance(value, str)}
    record = Record(read_id(headers.get(REQUEST_ID, "")), path)
    context.set_trailing_metadata(((REQUEST_ID, record.id),))
    with recorded(record, path.strip("/"), headers):
        yield record
