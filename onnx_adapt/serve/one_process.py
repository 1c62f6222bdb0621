"""A server in one process: uvicorn, the gateway, one replica and the repository."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from onnx_adapt.errors import RunError, UnprovableError
from onnx_adapt.serve.access import ANYBODY, Access
from onnx_adapt.serve.connections import limited, most_connections
from onnx_adapt.serve.copies import Copies
from onnx_adapt.serve.edge import drained
from onnx_adapt.serve.gateway import Gateway, News
from onnx_adapt.serve.grpc_server import grpc_server
from onnx_adapt.serve.held import Fetch
from onnx_adapt.serve.http import api, metrics_route, openai_routes
from onnx_adapt.serve.llm.facts import Writing
from onnx_adapt.serve.metrics import Metrics, PrometheusMetrics
from onnx_adapt.serve.openai_errors import openai_error
from onnx_adapt.serve.records import open_access_log
from onnx_adapt.serve.replica import Replica
from onnx_adapt.serve.repository import Repository
from onnx_adapt.serve.settings import Settings
from onnx_adapt.serve.warm import COLD, Warm, Warmer

_log = logging.getLogger(__name__)

_SETTLE_S = 0.5
"""How long a server that ends goes on to say so at least."""


@dataclass(frozen=True, slots=True)
class Embed:
    """How `/v1/embeddings` makes vectors of texts.

    Attributes:
        tokenizer: The path of the tokenizer's file.
        pooling: How the vectors of a text's tokens become one: mean, cls or last.
        normalize: Whether vectors get length 1.
    """

    tokenizer: str
    pooling: str
    normalize: bool


def serve_here(
    settings: Settings,
    listening: socket.socket,
    grace_s: float,
    started: Callable[[], None],
    grpc_address: str = "",
    embed: Embed | None = None,
    write: Writing | None = None,
    access: Access = ANYBODY,
    warm: Warm = COLD,
) -> None:
    """Serve until the process is told to end by SIGTERM or SIGINT.

    Args:
        settings: What was said about the server.
        listening: The socket to take connections from.
        grace_s: How long requests under way may take after the signal.
        started: Called once requests are answered.
        grpc_address: `host:port` to take gRPC calls on, or '' for none.
        embed: How `/v1/embeddings` makes vectors, or None for no such path.
        write: How `/v1/completions` writes texts, or None for no such path. The model is
            that of its folder then, and runs no tensors.
        access: Who may use the server, and whether by TLS.
        warm: Which adapters are loaded before requests are answered.

    Raises:
        AdaptError: If the model or the folder of adapters cannot be used.
    """
    if settings.access_log:
        open_access_log(settings.access_log)
    with contextlib.closing(Copies()) as copies:
        model, place, base = settings.model, settings.adapters, settings.base
        repository = Repository(
            model,
            place,
            copies.path,
            base,
            feeds=write is None,
            settle_s=settings.settle_s,
        )
        repository.sweep()
        metrics = PrometheusMetrics()

        async def fetch(version: str) -> Path:
            return copies.link(repository.path(version))

        versions, routes = _Local(repository), [metrics_route(metrics)]
        if write is None:
            replica = Replica(settings, fetch, metrics)
            gateway = Gateway(settings, replica, versions, metrics, access)
            recent = replica.recent
            if embed is not None:
                routes += _embedding(embed, replica, gateway)
        else:
            writer, texts_of = _writer(settings, write, fetch, metrics)
            gateway = Gateway(settings, writer, versions, metrics, access)
            recent = writer.recent
            routes += texts_of(writer, gateway)
        app = api(lambda: gateway, *routes)
        warmer, look = Warmer(warm, recent, gateway.version), repository.sweep
        config = _config(app, settings, access)
        _Server(config, gateway, warmer, look, grace_s, started, grpc_address).run([listening])


def _config(app: Any, settings: Settings, access: Access) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ssl_certfile=access.certificate or None,
        ssl_keyfile=access.key or None,
        **limited(settings.timeout_s, most_connections()),
    )


def _embedding(embed: Embed, replica: Replica, gateway: Gateway) -> list[Any]:
    try:
        from onnx_adapt.serve import embeddings
    except ModuleNotFoundError as error:
        raise UnprovableError(
            f"{error.name} is not installed", hint="pip install 'onnx-adapt[serve-embed]'"
        ) from error
    inputs, outputs = replica.specs
    embeddings.refuse_other_models(list(inputs.values()), list(outputs.values()))
    tokenizer = embeddings.read_tokenizer(embed.tokenizer)
    embedder = embeddings.Embedder(gateway, tokenizer, embed.pooling, embed.normalize)
    return openai_routes(embedder.answer, openai_error)


def _writer(
    settings: Settings, write: Writing, fetch: Fetch, metrics: Metrics
) -> tuple[Any, Callable[..., list[Any]]]:
    """What writes texts, and what makes its routes."""
    try:
        from onnx_adapt.serve.llm.routes import text_routes
        from onnx_adapt.serve.llm.writer import Writer
    except ModuleNotFoundError as error:
        raise UnprovableError(
            f"{error.name} is not installed", hint="pip install 'onnx-adapt[serve-llm]'"
        ) from error
    return Writer(settings, write, fetch, metrics), text_routes


class _Local:
    """The repository of this process, as the gateway asks for it."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def news(self, under_way: int) -> News:
        return News(self._repository.entries)

    async def load(self, name: str) -> None:
        await asyncio.to_thread(self._repository.load, name)

    async def unload(self, name: str) -> None:
        await asyncio.to_thread(self._repository.unload, name)

    async def point(self, name: str, adapter: str) -> None:
        await asyncio.to_thread(self._repository.point, name, adapter)


class _Server(uvicorn.Server):
    """uvicorn, which by itself closes its door at the signal; this one says first why."""

    def __init__(
        self,
        config: uvicorn.Config,
        gateway: Gateway,
        warmer: Warmer,
        look: Callable[[], None],
        grace_s: float,
        started: Callable[[], None],
        grpc_address: str,
    ) -> None:
        super().__init__(config)
        self._warmer = warmer
        self._look = look
        self._grpc_address = grpc_address
        self._grpc: Any = None
        self._gateway = gateway
        self._grace_s = grace_s
        self._told = started
        self._drain: asyncio.Task[None] | None = None
        self._ended = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await self._gateway.start()
        await self._warmer.begin()
        if self._grpc_address:
            self._grpc = grpc_server(self._gateway, self._grpc_address)
            await self._grpc.start()
        await super().startup(sockets)
        threading.Thread(target=self._look_always, daemon=True).start()
        self._told()

    def _look_always(self) -> None:
        """Look at the adapters every while; a store that hangs does not keep the process."""
        while not self._ended.wait(self._gateway.settings.poll_s):
            try:
                self._look()
                news = asyncio.run_coroutine_threadsafe(self._follow(), self._loop)
                news.result()
            except Exception:  # the libraries of object stores may raise anything
                _log.exception("cannot look at the adapters; what is known is served")

    async def _follow(self) -> None:
        await self._gateway.refresh()
        await self._warmer.follow()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first ends what is under way, the second everything."""
        if self._gateway.stopping:
            self.should_exit = self.force_exit = True
        else:
            self._gateway.stopping = True
            self._loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        self._drain = self._loop.create_task(self._end())

    async def _end(self) -> None:
        await drained(self._gateway, self._grace_s, _SETTLE_S)
        if self._grpc is not None:
            await self._grpc.stop(0.5)
        self._ended.set()
        self.config.timeout_graceful_shutdown = 1  # what is left had its time
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        RunError: If the address is taken, or none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise RunError(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another --port"
        ) from error
