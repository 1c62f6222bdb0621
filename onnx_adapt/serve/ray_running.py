"""A server of many replicas in the foreground, on a Ray of its own or on a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from onnx_adapt.errors import RunError
from onnx_adapt.serve.one_process import listen


@dataclass(frozen=True, slots=True)
class Place:
    """Where an application runs, and what it is called there.

    Attributes:
        name: The name of the application; a Ray has one of each.
        host: The address to listen on, where Ray starts here.
        port: The port to listen on there.
        route_prefix: The path before those of the protocol.
        address: A Ray cluster, or None to start Ray here.
        metrics_port: Where Prometheus finds the metrics of a Ray that starts here.
        cpus: How many the replicas ask for; a Ray that starts here has no fewer.
        grace_s: How long requests under way may take when the server ends.
        certificate: The path of the certificates for TLS, or '' for connections without.
        key: The path of their private key; '' if it is in the same file.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    route_prefix: str = "/"
    address: str | None = None
    metrics_port: int | None = None
    cpus: int = 1
    grace_s: float = 30.0
    certificate: str = ""
    key: str = ""


@contextlib.contextmanager
def running(app: Any, place: Place) -> Iterator[tuple[str, Callable[[], object]]]:
    """Run an application for as long as the block lasts.

    Args:
        app: What `build_app` gives.
        place: Where.

    Yields:
        The URL before the protocol's paths, and what waits until the process is told to end.

    Raises:
        RunError: If the port or the name is taken, the cluster serves without TLS that is
            wanted, or Ray cannot run it.
    """
    if place.address is None:
        listen(place.host, place.port).close()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ended = threading.Event()
    ours = False
    try:
        _start_ray(place)
        # Ray has handlers of its own, under which a process dies of SIGTERM.
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, lambda *_: ended.set())
        _refuse_taken(place)
        ours = True
        url = _run(app, place)
        yield url, ended.wait
    finally:
        if ray.is_initialized():
            if ours:
                _drain(place)
                serve.delete(place.name)
            ray.shutdown()


def _start_ray(place: Place) -> None:
    # Ray tells its makers what it is used for, unless somebody says something.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {}
    if place.address is None:
        local = {"include_dashboard": False, "_metrics_export_port": place.metrics_port}
        if place.cpus > (os.cpu_count() or 1):  # or replicas would wait for some without end
            local["num_cpus"] = place.cpus
    http: dict[str, Any] = {"host": place.host, "port": place.port}
    if place.certificate:
        http |= {"ssl_certfile": place.certificate}
        http |= {"ssl_keyfile": place.key or place.certificate}
    try:
        ray.init(place.address, logging_level=logging.ERROR, **local)
        serve.start(http_options=http, logging_config=LoggingConfig(log_level="WARNING"))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"Ray does not start: {error}", hint="its log has more") from error


def _refuse_taken(place: Place) -> None:
    if place.name in serve.status().applications:
        raise RunError(
            f"an application {place.name!r} runs there already", hint="choose another --name"
        )
    if place.certificate and not _http().ssl_certfile:
        raise RunError(
            "the cluster serves without TLS already",
            hint="stop Serve there first (`serve shutdown`), or leave out --ssl-certfile",
        )


def _run(app: Any, place: Place) -> str:
    try:
        serve.run(app, name=place.name, route_prefix=place.route_prefix)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"Ray cannot serve this: {error}", hint="its log has more") from error
    found = _http()
    scheme = "https" if found.ssl_certfile else "http"
    return f"{scheme}://{found.host}:{found.port}{place.route_prefix.rstrip('/')}"


def _http() -> Any:
    """How HTTP is served; a cluster that serves already has its own settings."""
    client = _get_global_client()
    assert client is not None
    return client.http_config


def _drain(place: Place) -> None:
    """Let the gateways refuse new requests, and wait until they have answered the others."""
    end = time.monotonic() + place.grace_s
    try:
        repository: Any = serve.get_deployment_handle("Repository", place.name)
        while time.monotonic() < end:
            if repository.stop.remote().result(timeout_s=5):
                return
            time.sleep(0.1)
    except Exception as error:  # it is ended all the same
        logging.getLogger(__name__).warning("requests may be lost: %s", error)
