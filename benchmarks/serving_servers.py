"""Servers as processes: started, asked what they cost, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from measuring import ADAPT

from onnx_adapt.cli.outputs import say

HERE = Path(__file__).resolve().parent
SECONDS = 60
"""How long a server may take to start."""

PATIENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(SECONDS)}
"""On a busy machine Ray would end its proxy, and start it again, before it is ready."""

INSTALLS = {
    "FastAPI": ("fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
    "MLServer": ("mlserver==1.7.1",),
    "KServe": ("kserve==0.21.0",),
    "LitServe": ("litserve==0.2.19",),
}
"""The peers, each in an environment of its own: they need other versions of one library."""


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        port: Where it takes HTTP.
        process: Its first process.
        started_s: How long it took until it took connections.
    """

    port: int
    process: subprocess.Popen[bytes]
    started_s: float

    def processes(self) -> list[int]:
        """Its process, and all that came of it."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                stat = (path / "stat").read_text(encoding="utf-8", errors="replace")
                parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def busy_s(self) -> float:
        """The processor time that all of them have used."""
        ticks = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
                ticks += sum(map(int, stat.rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """The memory of all of them; what they share is counted once."""
        kilobytes = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
                kilobytes += int(text.split("\nPss:")[1].split()[0])
        return kilobytes / 1e3


def ours(model: Path, adapters: Path, *options: str) -> list[str]:
    """The command of our own server, without its port."""
    return [ADAPT, "serve", str(model), "--adapters", str(adapters), *options, "--port"]


def peer(name: str, environments: Path, models: Path) -> list[str]:
    """The command of another server, which is installed if it is not yet."""
    python = environments / name / "bin" / "python"
    if not python.exists():
        say(f"installing {name} in {environments / name}")
        venv.create(environments / name, with_pip=True)
        wanted = [*INSTALLS[name], "onnxruntime==1.32.0"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return [str(python), str(HERE / "peer_serving.py"), name, str(models)]


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, first: Callable[[int], list[bytes]]
) -> Iterator[Server]:
    """A server, for as long as the block lasts.

    Args:
        command: Its command line, without the port at the end.
        log: Where it writes what it says.
        first: The request, of a port, that it must answer before it counts as started.

    Raises:
        SystemExit: If it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    began = time.perf_counter()
    quiet = {**os.environ, **PATIENT, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as said:
        process = subprocess.Popen([*command, str(port)], stdout=said, stderr=said, env=quiet)
    server = Server(port, process, 0)
    try:
        _await(port, process, *first(port), log)
        yield replace(server, started_s=time.perf_counter() - began)
    finally:
        all_of_it = server.processes()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in all_of_it:  # LitServe leaves its workers behind
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _await(port: int, process: subprocess.Popen[bytes], first: bytes, log: Path) -> None:
    """Wait until it answers."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=5) as connection,
        ):
            connection.sendall(first)
            if connection.recv(99)[9:12] == b"200":
                return
        time.sleep(0.02)
    sys.exit(f"{process.args} does not start:\n{log.read_text(encoding='utf-8')[-3000:]}")
