"""Shared by the tests and the benchmark of serving: a server of one's own, and its clients."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http.aio as triton

PROGRAM = Path(sys.executable).parent / "onnx-adapt"


@dataclass(frozen=True)
class Server:
    """A server that runs: where it listens, its process, and what it has said."""

    address: str
    metrics: str
    pid: int
    log: Path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextlib.contextmanager
def server(model: Path, adapters: Path, *options: str) -> Iterator[Server]:
    """`onnx-adapt serve` on loopback, until the block ends."""
    port, metrics, log = free_port(), free_port(), adapters.parent / "serve.log"
    command = [PROGRAM, "serve", model, "--adapters", adapters, "--port", str(port)]
    command += ["--metrics-port", str(metrics), *options]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, stdout=stderr)
        try:
            while b"serving on" not in log.read_bytes():
                assert process.poll() is None, log.read_text(encoding="utf-8")
                time.sleep(0.1)
            address, exporter = (f"127.0.0.1:{number}" for number in (port, metrics))
            yield Server(address, exporter, process.pid, log)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, log.read_text(encoding="utf-8")


def replicas(server: Server) -> list[int]:
    """The processes of the model's replicas, which are children of the server's."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            named = (
                (path / "cmdline").read_bytes().startswith(b"ray::ServeReplica:onnx-adapt:M")
            )
            if named and server.pid in _ancestors(int(path.name)):
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
) -> list[Answer]:
    """Send requests, of which so many are under way at any time; answers in their order."""
    pending = list(enumerate(requests))[::-1]
    answers: dict[int, Answer] = {}
    async with triton.InferenceServerClient(address, conn_limit=clients) as client:

        async def work() -> None:
            while pending:
                number, (x, adapter) = pending.pop()
                answers[number] = await ask(client, x, adapter, model, output)

        await asyncio.gather(*(work() for _ in range(clients)))
    return [answers[number] for number in sorted(answers)]
