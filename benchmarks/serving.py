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
from ray import serve
from swapping import WIDTH, base_model, random_adapter

import onnx_adapt as oa
from onnx_adapt.cli.show import print_table, say
from onnx_adapt.serve import build_app
from onnx_adapt.serve.running import running

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from serving import free_port, load

ADAPTERS, CLIENTS, CLOSE = 8, 100, 1e-3
SHAPE = (1, 1, WIDTH)


@dataclass(frozen=True)
class Measured:
    """What became of the requests."""

    label: str
    per_second: float
    median_ms: float
    slow_ms: float
    wrong: int


def prepare(folder: Path) -> tuple[Path, Path, list[str]]:
    """The model with 24 slots, 57 MB, and its adapters, 9.5 MB each."""
    model = oa.insert(base_model(), after="layers.*/MatMul", bias=True)
    path = oa.save_model(model, folder / "adapted.onnx").path
    (folder / "adapters").mkdir()
    names = [f"a{i}" for i in range(ADAPTERS)]
    for i, name in enumerate(names):
        oa.save_adapter(random_adapter(model, i), folder / f"adapters/{name}.onnx_adapter")
    return path, folder / "adapters", names


def measure(label: str, address: str, requests: list, truth: list) -> Measured:
    """Send the requests, after some that load the adapters."""
    asyncio.run(load(address, requests[:CLIENTS], clients=CLIENTS, output=OUTPUT))
    started = time.perf_counter()
    answers = asyncio.run(load(address, requests, clients=CLIENTS, output=OUTPUT))
    seconds = time.perf_counter() - started
    wrong = sum(
        answer.array is None or bool(np.abs(answer.array - expected).max() > CLOSE)
        for answer, expected in zip(answers, truth, strict=True)
    )
    spent = sorted(answer.milliseconds for answer in answers)
    slow = spent[int(len(spent) * 0.99)]
    return Measured(label, len(requests) / seconds, median(spent), slow, wrong)


OUTPUT = "r23"


def main() -> int:
    """Serve four ways, and print what each does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    count = 200 if parser.parse_args().quick else 2000
    rng = np.random.default_rng(0)
    found = []
    with tempfile.TemporaryDirectory() as name:
        model, adapters, names = prepare(Path(name))
        choices = [*names, None]
        inputs = rng.standard_normal((20, *SHAPE)).astype(np.float32)
        session = oa.AdapterSession(model, {n: adapters / f"{n}.onnx_adapter" for n in names})
        picked = [(int(a), choices[b]) for a, b in rng.integers(0, (20, 9), (count, 2))]
        table = {(a, n): session.run({"x": inputs[a]}, n)[OUTPUT] for a, n in set(picked)}
        truth = [table[key] for key in picked]
        requests = [(inputs[a], n) for a, n in picked]
        started = time.perf_counter()
        for x, adapter in requests[:200]:
            session.run({"x": x}, adapter)
        alone = 200 / (time.perf_counter() - started)
        session.close()
        port = free_port()
        given = {"model": str(model), "adapters": str(adapters)}
        with running(build_app(given), "127.0.0.1", port, cpus=2):
            for replicas in (1, 2):
                for batching in (False, True):
                    settings = {"replicas": replicas, "batching": batching}
                    serve.delete("onnx-adapt")
                    app = build_app(given | settings)
                    serve.run(app, name="onnx-adapt", route_prefix="/")
                    label = f"{replicas} replica{'s' * (replicas > 1)}, "
                    label += "batching" if batching else "no batching"
                    found.append(measure(label, f"127.0.0.1:{port}", requests, truth))
    rows = [
        (m.label, round(m.per_second), round(m.median_ms), round(m.slow_ms), m.wrong)
        for m in found
    ]
    print_table(["server", "requests/s", "median ms", "99 % ms", "wrong"], rows)
    say(f"one AdapterSession in a loop: {alone:.0f} requests/s")
    return int(any(m.wrong for m in found))


if __name__ == "__main__":
    sys.exit(main())
