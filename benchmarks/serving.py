"""What servers of many adapters do, side by side, and ours with a thousand adapters.

Clients ask for adapters at random, one row each, in the Open Inference Protocol's JSON. Every
answer is compared with what an `AdapterSession` computes.

    python benchmarks/serving.py --peers FOLDER  # with FastAPI, MLServer, KServe and LitServe
    python benchmarks/serving.py --ray           # ours in one process, and on Ray
    python benchmarks/serving.py --quick         # a little of each
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from dense_models import base_model, random_adapter
from measuring import one_thread
from serving_load import Load, request, send, wrong
from serving_servers import INSTALLS, Server, ours, peer, running

import onnx_adapt as oa
from onnx_adapt.cli.outputs import print_table, say

WIDTH, LAYERS, BOTTLENECK = 256, 6, 8
ADAPTERS, MANY, CACHE = 20, 1024, 64
CLOSE = 1e-3
CLIENTS = (1, 16)
RAY = "onnx-adapt on Ray, 2 replicas"


@dataclass(frozen=True)
class World:
    """What is served, and what is asked.

    Attributes:
        model: The adapted model.
        adapters: The folder of adapters, `a0` and on.
        baked: A folder with a model for each adapter, in which its weights are constants.
        inputs: A row to send, each with other numbers.
    """

    model: Path
    adapters: Path
    baked: Path
    inputs: np.ndarray


@dataclass
class Measured:
    """What was found of one server: loads and processor time once per round."""

    loads: dict[int, list[Load]] = field(default_factory=dict)
    busy_ms: dict[int, list[float]] = field(default_factory=dict)
    memory_mb: float = 0
    started_s: float = 0
    wrong: int = 0

    def cells(self) -> tuple[object, ...]:
        """A line of the table."""
        found: list[object] = []
        for clients, loads in self.loads.items():
            found.append(round(median(load.per_second for load in loads)))
            found.append(f"{min(self.busy_ms[clients]):.2f}")
        return (*found, round(self.memory_mb), f"{self.started_s:.1f}", self.wrong)


def prepare(folder: Path, count: int, baked: int) -> World:
    """A model, so many adapters, and models with some of them."""
    model = oa.insert(base_model(LAYERS, WIDTH), after="layers.*/MatMul")
    world = World(
        oa.save_model(model, folder / "adapted.onnx").path,
        folder / "adapters",
        folder / "baked",
        np.random.default_rng(0).standard_normal((64, 1, 1, WIDTH)).astype(np.float32),
    )
    world.adapters.mkdir()
    world.baked.mkdir()
    for i in range(count):
        item = random_adapter(model, i, BOTTLENECK)
        oa.save_adapter(item, world.adapters / f"a{i}.onnx_adapter")
        if i < baked:
            oa.save_model(oa.bake(oa.fill(model, item)), world.baked / f"a{i}.onnx")
    return world


def asked(world: World, adapters: Sequence[int]) -> tuple[list[dict], list[np.ndarray]]:
    """Requests for adapters, and what a session answers."""
    names = [f"a{i}" for i in adapters]
    files = {name: world.adapters / f"{name}.onnx_adapter" for name in set(names)}
    documents, truth = [], []
    with oa.AdapterSession(world.model, files, session_options=one_thread()) as session:
        for number, name in enumerate(names):
            x = world.inputs[number % len(world.inputs)]
            tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape)}
            data = [round(value, 6) for value in x.ravel().tolist()]
            documents.append({"model": name, "inputs": [tensor | {"data": data}]})
            x = np.array(data, np.float32).reshape(x.shape)
            truth.append(session.run({"x": x}, name)[f"r{LAYERS - 1}"])
    return documents, truth


def sent(documents: Sequence[dict], name: str, port: int) -> list[bytes]:
    """The requests as a server takes them: LitServe has one path for everything."""
    paths = [
        "/predict" if name == "LitServe" else f"/v2/models/{document['model']}/infer"
        for document in documents
    ]
    kept = documents
    if name != "LitServe":
        kept = [{"inputs": document["inputs"]} for document in documents]
    return [request(port, path, each) for path, each in zip(paths, kept, strict=True)]


def measure(server: Server, requests: list[bytes], truth: list, found: Measured) -> None:
    """Send the requests with few clients and with many, after some that load the adapters."""
    send(server.port, requests[:100], CLIENTS[-1])
    for clients in CLIENTS:
        before = server.busy_s()
        load = send(server.port, requests, clients)
        busy = (server.busy_s() - before) / len(requests) * 1e3
        found.loads.setdefault(clients, []).append(load)
        found.busy_ms.setdefault(clients, []).append(busy)
        found.wrong += wrong(load, truth, CLOSE)
    found.memory_mb = server.memory_mb()
    found.started_s = server.started_s


def beside_peers(folder: Path, peers: Path | None, ray: bool, quick: bool) -> int:
    """Each server in turn, some rounds of them; how many answers were wrong."""
    count, rounds, adapters = (40, 1, 3) if quick else (400, 9, ADAPTERS)
    world = prepare(folder, adapters, adapters if peers else 0)
    chosen = np.random.default_rng(1).integers(0, adapters, count)
    documents, truth = asked(world, list(chosen))
    commands = {"onnx-adapt": ours(world.model, world.adapters)}
    if ray:
        commands[RAY] = ours(world.model, world.adapters, "--replicas", "2")
    if peers:
        commands |= {name: peer(name, peers, world.baked) for name in INSTALLS}
    found = {name: Measured() for name in commands}
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, command in commands.items():
            first = functools.partial(sent, documents[:1], name)
            servers[name] = stack.enter_context(running(command, folder / name, first))
        for _ in range(rounds):  # in turn, so that noise meets all alike
            for name, server in servers.items():
                requests = sent(documents, name, server.port)
                measure(server, requests, truth, found[name])
    head = [f"{adapters} adapters"]
    head += [f"{what}, {n} clients" for n in CLIENTS for what in ("requests/s", "CPU ms")]
    rows = [(name, *measured.cells()) for name, measured in found.items()]
    print_table([*head, "MB", "start s", "wrong"], rows)
    return sum(measured.wrong for measured in found.values())


def many_adapters(folder: Path, quick: bool) -> int:
    """Ours with more adapters than it keeps loaded; how many answers were wrong."""
    count, many, cache = (60, 12, 4) if quick else (3000, MANY, CACHE)
    world = prepare(folder, many, 0)
    rng = np.random.default_rng(2)
    draws = {
        f"{cache}, uniform": rng.integers(0, cache, count),
        f"{many}, uniform": rng.integers(0, many, count),
        f"{many}, Zipf": (rng.zipf(1.2, count) - 1) % many,
    }
    command = ours(world.model, world.adapters, "--max-adapters", str(cache))
    first, _ = asked(world, [0])
    rows, failed = [], 0
    with running(command, folder / "log", functools.partial(sent, first, "")) as server:
        for name, chosen in draws.items():
            documents, truth = asked(world, [int(i) for i in chosen])
            requests = sent(documents, "", server.port)
            send(server.port, requests[: count // 3], CLIENTS[-1])
            for clients in CLIENTS:
                load = send(server.port, requests, clients)
                failed += (bad := wrong(load, truth, CLOSE))
                times = [f"{load.quantile(share):.1f}" for share in (0.5, 0.99)]
                rows.append((name, clients, round(load.per_second), *times, bad))
        say(
            f"with {many} adapters in the folder: {server.memory_mb():.0f} MB, "
            f"started in {server.started_s:.1f} s"
        )
    head = [f"adapters, of which {cache} stay loaded", "clients", "requests/s"]
    print_table([*head, "median ms", "99 % ms", "wrong"], rows)
    return failed


def main() -> int:
    """Measure, and print tables."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a little of each")
    parser.add_argument("--ray", action="store_true", help="ours on Ray as well")
    parser.add_argument("--peers", type=Path, help="the folder of the peers' environments")
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        failed += beside_peers(Path(one), given.peers, given.ray, given.quick)
        failed += many_adapters(Path(other), given.quick)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
