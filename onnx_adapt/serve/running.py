"""A server in the foreground, on a Ray of its own or on a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from onnx_adapt.errors import RunError

_NAME = "onnx-adapt"


@contextlib.contextmanager
def running(
    app: Any,
    host: str,
    port: int,
    *,
    address: str | None = None,
    metrics_port: int | None = None,
    cpus: int = 1,
) -> Iterator[Callable[[], object]]:
    """Run an application for as long as the block lasts.

    Args:
        app: What `build_app` gives.
        host: The address to listen on.
        port: The port to listen on.
        address: A Ray cluster, or None to start Ray here.
        metrics_port: Where Prometheus finds the metrics of a Ray that starts here.
        cpus: How many the replicas ask for; a Ray that starts here has no fewer.

    Yields:
        What waits until the process is told to end.

    Raises:
        RunError: If the port is taken, or Ray cannot run it.
    """
    if address is None:
        _refuse_taken(host, port)
    ended = threading.Event()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: ended.set())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _start(app, host, port, address, metrics_port, cpus)
        yield ended.wait
    finally:
        if ray.is_initialized():
            serve.delete(_NAME)  # requests under way are answered first
        ray.shutdown()


def _start(
    app: Any, host: str, port: int, address: str | None, metrics_port: int | None, cpus: int
) -> None:
    # Ray tells its makers what it is used for, unless somebody says something.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {}
    if address is None:
        local = {"include_dashboard": False, "_metrics_export_port": metrics_port}
        if cpus > (os.cpu_count() or 1):  # or replicas would wait for some without end
            local["num_cpus"] = cpus
    try:
        ray.init(address, logging_level=logging.ERROR, **local)
        quiet = LoggingConfig(log_level="WARNING")
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        serve.run(app, name=_NAME, route_prefix="/")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"Ray cannot serve this: {error}", hint="its log has more") from error


def _refuse_taken(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise RunError(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another --port"
        ) from error
