"""What a server of many adapters does: batching or not, one replica or two.

A hundred clients ask for eight adapters and the base at random, one row each. Every answer is
compared with what an `AdapterSession` computes.

    python benchmarks/serving.py
    python benchmarks/serving.py --quick
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from dense_models import WIDTH, base_model, random_adapter
from ray import serve

import onnx_adapt as oa
from onnx_adapt.cli.outputs import print_table, say
from onnx_adapt.ort import onnxruntime
from onnx_adapt.serve import build_app
from onnx_adapt.serve.batcher import Batcher, Job
from onnx_adapt.serve.ray_running import Place, running

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/fixtures"))
from serve_clients import free_port, load

LAYERS, QUICK_LAYERS, ADAPTERS, CLIENTS, CLOSE = 72, 6, 8, 100, 1e-3
WAYS = [(replicas, batching) for replicas in (1, 2) for batching in (False, True)]

Asked = list[tuple[np.ndarray, str | None]]


@dataclass(frozen=True)
class Measured:
    """What became of the requests."""

    per_second: float
    median_ms: float
    slow_ms: float
    wrong: int


def prepare(folder: Path, layers: int) -> dict[str, str]:
    """A model of 171 MB and its adapters, 28 MB each (72 layers): what to serve."""
    model = oa.insert(base_model(layers), after="layers.*/MatMul", bias=True)
    path = oa.save_model(model, folder / "adapted.onnx").path
    adapters = folder / "adapters"
    adapters.mkdir()
    for i in range(ADAPTERS):
        oa.save_adapter(random_adapter(model, i, 64), adapters / f"a{i}.onnx_adapter")
    return {"model": str(path), "adapters": str(adapters)}


def expected(
    given: dict[str, str], output: str, count: int
) -> tuple[Asked, list[np.ndarray], float]:
    """Requests, what a session answers, and how many it answers in a second."""
    names = [None, *(f"a{i}" for i in range(ADAPTERS))]
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((count, 1, 1, WIDTH)).astype(np.float32)
    requests = [(x, names[i]) for x, i in zip(inputs, rng.integers(0, 9, count), strict=True)]
    options = onnxruntime().SessionOptions()
    options.intra_op_num_threads = 1  # as a replica has
    files = {name: f"{given['adapters']}/{name}.onnx_adapter" for name in names if name}
    with oa.AdapterSession(given["model"], files, session_options=options) as session:
        started = time.perf_counter()
        truth = [session.run({"x": x}, name)[output] for x, name in requests]
        return requests, truth, count / (time.perf_counter() - started)


def measure(address: str, output: str, requests: Asked, truth: list[np.ndarray]) -> Measured:
    """Send the requests, after some that load the adapters."""
    asyncio.run(load(address, requests[:CLIENTS], clients=CLIENTS, output=output))
    started = time.perf_counter()
    answers = asyncio.run(load(address, requests, clients=CLIENTS, output=output))
    seconds = time.perf_counter() - started
    wrong = sum(
        answer.array is None or bool(np.abs(answer.array - value).max() > CLOSE)
        for answer, value in zip(answers, truth, strict=True)
    )
    spent = sorted(answer.milliseconds for answer in answers)
    return Measured(len(spent) / seconds, median(spent), spent[len(spent) * 99 // 100], wrong)


def joined(given: dict[str, str], output: str, requests: Asked) -> tuple[float, float]:
    """Milliseconds for 64 requests in one replica: one at a time, and as one batch."""
    batcher = Batcher(given["model"], threads=1)
    for _, name in requests:
        if name and name not in batcher.session.adapters:
            batcher.session.load(name, f"{given['adapters']}/{name}.onnx_adapter")
    jobs = [Job({"x": x}, (output,), name) for x, name in requests[:64]]
    times: list[list[float]] = [[], []]
    for _ in range(5):
        for spent, batches in zip(times, ([[job] for job in jobs], [jobs]), strict=True):
            started = time.perf_counter()
            for batch in batches:
                batcher.run(batch)
            spent.append((time.perf_counter() - started) * 1e3)
    return median(times[0]), median(times[1])


def main() -> int:
    """Serve in four ways, or two if it must be quick, and print what each does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tenth, of a small model, in two of the four ways",
    )
    quick = parser.parse_args().quick
    ways = WAYS[::3] if quick else WAYS
    count, layers = (100, QUICK_LAYERS) if quick else (1000, LAYERS)
    output = f"r{layers - 1}"
    found = []
    with tempfile.TemporaryDirectory() as name:
        given = prepare(Path(name), layers)
        requests, truth, alone = expected(given, output, count)
        single, batch = joined(given, output, requests)
        apps = [build_app({**given, "replicas": n, "batching": joins}) for n, joins in ways]
        port = free_port()
        with running(apps[0], Place("onnx-adapt", port=port, cpus=2)):
            for app in apps:
                if found:
                    serve.delete("onnx-adapt")
                    serve.run(app, name="onnx-adapt", route_prefix="/")
                found.append(measure(f"127.0.0.1:{port}", output, requests, truth))
    rows = [
        (
            n,
            "yes" if joins else "no",
            *map(round, (m.per_second, m.median_ms, m.slow_ms)),
            m.wrong,
        )
        for (n, joins), m in zip(ways, found, strict=True)
    ]
    print_table(["replicas", "batching", "requests/s", "median ms", "99 % ms", "wrong"], rows)
    say(f"one AdapterSession in a loop, one thread: {alone:.0f} requests/s")
    say(f"64 requests in a replica: {single:.0f} ms one at a time, {batch:.0f} ms as a batch")
    return int(any(m.wrong for m in found))


if __name__ == "__main__":
    sys.exit(main())
