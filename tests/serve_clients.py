"""Shared by the tests and the benchmark of serving: a server of one's own, and its clients."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http.aio as triton
from waiting import LONG, until

PROGRAM = Path(sys.executable).parent / "onnx-adapt"

PATIENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(LONG),
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": str(LONG),
    "RAY_gcs_server_port_wait_time_s": str(LONG),
    "RAY_worker_register_timeout_seconds": str(LONG),
    "RAY_agent_register_timeout_ms": str(LONG * 1000),
}
"""Ray ends parts of itself that are slow, and starts them again: on a machine that has much
else to do, for ever."""


@dataclass(frozen=True)
class Server:
    """A server that runs: where it listens, its process, and what it has said."""

    address: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        """What it has said; its process must not have ended."""
        ended = self.process.poll()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        assert ended is None, text
        return text


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One Ray at a time on this machine, whoever else runs tests."""
    path = Path(tempfile.gettempdir()) / f"onnx-adapt-tests-{os.getuid()}.lock"
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextlib.contextmanager
def server(model: Path, adapters: Path, *options: str) -> Iterator[Server]:
    """`onnx-adapt serve` on loopback, until the block ends."""
    port, metrics, log = free_port(), free_port(), adapters.parent / "serve.log"
    command = [PROGRAM, "serve", model, "--adapters", adapters, "--port", str(port)]
    command += ["--metrics-port", str(metrics), *options]
    with alone(), log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stderr=stderr, stdout=stderr, env=os.environ | PATIENT
        )
        address, exporter = (f"127.0.0.1:{number}" for number in (port, metrics))
        started = Server(address, exporter, process, log)
        try:
            until(lambda: "serving on" in started.said(), started.said)
            yield started
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(LONG) == 0, log.read_text(encoding="utf-8")


def replicas(server: Server) -> list[int]:
    """The processes of the model's replicas, which are children of the server's."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            named = (
                (path / "cmdline").read_bytes().startswith(b"ray::ServeReplica:onnx-adapt:M")
            )
            if named and server.process.pid in _ancestors(int(path.name)):
                found.append(int(path.name))
    return found


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        pid = int(stat.rpartition(")")[2].split()[1])
        yield pid


@dataclass(frozen=True)
class Answer:
    """What came of a request: an output and which adapter was active, or an error."""

    adapter: str | None
    array: np.ndarray | None
    active: str
    error: str
    milliseconds: float


async def ask(
    client: Any, x: np.ndarray, adapter: str | None, model: str, output: str = "y"
) -> Answer:
    """Run the model on one input `x`, with raw tensors."""
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    parameters = {"adapter": adapter} if adapter else None
    started = time.perf_counter()
    try:
        result = await client.infer(model, [tensor], parameters=parameters)
    except triton.InferenceServerException as error:
        return Answer(adapter, None, "", f"{error.status()}: {error.message()}", 0)
    spent = (time.perf_counter() - started) * 1e3
    active = result.get_response()["parameters"]["adapter"]
    return Answer(adapter, result.as_numpy(output), active, "", spent)


async def load(
    address: str,
    requests: Sequence[tuple[np.ndarray, str | None]],
    *,
    model: str = "adapted",
    clients: int = 100,
    output: str = "y",
    answered: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Send requests, of which so many are under way at any time; answers in their order.

    After each, `answered` is told how many have been.
    """
    pending = list(enumerate(requests))[::-1]
    answers: dict[int, Answer] = {}
    limits = {"conn_limit": clients, "conn_timeout": LONG}
    async with triton.InferenceServerClient(address, **limits) as client:

        async def work() -> None:
            while pending:
                number, (x, adapter) = pending.pop()
                answers[number] = await ask(client, x, adapter, model, output)
                answered(len(answers))

        await asyncio.gather(*(work() for _ in range(clients)))
    return [answers[number] for number in sorted(answers)]
