"""A step of training on the ONNX file alone, beside a step of PyTorch on the same weights.

    python benchmarks/training.py --torch PYTHON [--models minilm-l3 bert-base] [--rounds 8]

PYTHON has torch, transformers, onnx and onnxscript. Each side is a process of its own on one
core and with one thread. They take steps in turn, and time is that of the process on the
processor, which other programs disturb little; of all rounds the shortest step counts. Both
begin with the same adapters and see the same batch, and their losses are compared. Memory is
the most that a process had resident, from its start. It exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import one_thread

import onnx_adapt as oa
from onnx_adapt.ort import CPU, onnxruntime
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.kept import Kept, keep_frozen
from onnx_adapt.training.optimisers import Optimiser
from onnx_adapt.training.reading import read_dataset
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_model import make_step

HERE = Path(__file__).resolve().parent
RATE, BOTTLENECK, CLASSES, POSITIONS = 1e-3, 64, 2, 64
GOAL_TIME, GOAL_MEMORY, GOAL_LATE = 1.0, 0.75, 1.2


@dataclass(frozen=True)
class Network:
    """A network: its layers, where they are, its output, and the rows of a batch."""

    layers: int
    prefix: str
    output: str
    rows: int

    def places(self, late: bool) -> list[str]:
        """Two places in each layer, or in the last one alone."""
        layers = [self.layers - 1] if late else range(self.layers)
        ends = ("attention.output.dense", "output.dense")
        return [f"{self.prefix}encoder.layer.{n}.{end}" for n in layers for end in ends]


NETWORKS = {
    "minilm-l3": Network(3, "model.0.auto_model.", "461", 16),
    "bert-base": Network(12, "", "last_hidden_state", 8),
}


def prepare(name: str, folder: Path, python: str) -> None:
    """Write the base, adapted models, the first weights, the batch and the task."""
    network = NETWORKS[name]
    if name == "minilm-l3":
        sys.path.append(str(HERE.parent / "tools"))
        from fetch_models import fetch

        base = Path(fetch(name))
    else:
        base = folder / "base.onnx"
        torch = str(HERE / "training_torch.py")
        subprocess.run([python, torch, "export", str(base)], check=True)
    opened = oa.open_model(base)
    for file, late in (("adapted.onnx", False), ("late.onnx", True)):
        adapted = oa.insert(opened, after=network.places(late))
        adapted = oa.add_head(adapted, CLASSES, output=network.output)
        oa.save_model(adapted, folder / file)
        if not late:
            start = weights_to_train(adapted, BOTTLENECK, None, 0)
    short = {key.removeprefix("adapter."): value for key, value in start.items()}
    np.savez(folder / "start.npz", **short)
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 8000, (network.rows, POSITIONS))
    labels = np.arange(network.rows) % CLASSES
    np.savez(folder / "batch.npz", input_ids=ids, attention_mask=ids * 0 + 1, labels=labels)
    task = {"name": name, "base": str(base), "rate": RATE}
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")


def worker(folder: Path, file: str) -> None:
    """Take steps as they are asked for; with `forward`, run the base's outputs alone.

    With `kept`, what is before the late slots is computed once.
    """
    kept = file == "kept"
    file = "late.onnx" if kept else file
    batch = dict(np.load(folder / "batch.npz"))
    labels = batch.pop("labels")
    if file == "forward":
        task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        output = NETWORKS[task["name"]].output
        base = onnxruntime().InferenceSession(task["base"], one_thread())
    else:
        model = oa.open_model(folder / file)
        weights = weights_to_train(model, BOTTLENECK, None, 0)
        step = make_step(model, list(weights), loss="cross_entropy", output="head")
        optimiser, samples = Optimiser(clip=0), read_dataset({**batch, "labels": labels})
        if kept:
            given = {"batch_size": len(labels), "most": 10**9, "providers": CPU}
            found = keep_frozen(step, weights, samples, None, **given)
            assert isinstance(found, Kept), found
            step, samples = found.step, found.samples
        engine, state = Engine(step, CPU), optimiser.start(weights)
        samples = samples.first(len(labels))
    count = 0
    for line in sys.stdin:
        times, losses = [], []
        for _ in range(int(line)):
            begun = time.process_time()
            if file == "forward":
                base.run([output], batch)
            else:
                count += 1
                found = engine.run(weights, samples)
                weights, state = optimiser.step(weights, found.grads, state, count, RATE)
                losses.append(found.loss)
            times.append(time.process_time() - begun)
        print(json.dumps({"times": times, "losses": losses}), flush=True)


@dataclass
class Side:
    """A process that takes steps, and what it said so far."""

    process: subprocess.Popen[str]
    times: list[float]
    losses: list[float]

    def take(self, steps: int) -> None:
        """Take some steps, and wait for them."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or "null")
        if answer is None:
            raise SystemExit(f"a process ended with {self.process.wait()}")
        self.times += answer["times"]
        self.losses += answer["losses"]

    @property
    def best(self) -> float:
        """The shortest step, in seconds."""
        return min(self.times)

    @property
    def peak(self) -> int:
        """The most memory it had resident, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


@contextmanager
def started(line: list[str]) -> Iterator[Side]:
    """A process that ends with the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) as process:
        yield Side(process, [], [])
        assert process.stdin is not None
        process.stdin.close()


def compare(name: str, folder: Path, python: str, rounds: int) -> bool:
    """Print one network's numbers; whether its goals are met."""
    prepare(name, folder, python)
    own = [sys.executable, __file__, "--worker", str(folder), "--file"]
    lines = {
        "ours": [*own, "adapted.onnx"],
        "torch": [python, str(HERE / "training_torch.py"), "train", str(folder)],
        "late": [*own, "late.onnx"],
        "kept": [*own, "kept"],
        "forward": [*own, "forward"],
    }
    with ExitStack() as stack:
        sides = {key: stack.enter_context(started(line)) for key, line in lines.items()}
        for _ in range(rounds):
            for side in sides.values():
                side.take(3)
        ours, torch, late, kept, forward = sides.values()
        few = min(len(ours.losses), 10)
        apart = np.abs(np.subtract(ours.losses[:few], torch.losses[:few])).max()
        ratios = {
            "time": (ours.best / torch.best, GOAL_TIME),
            "memory": (ours.peak / torch.peak, GOAL_MEMORY),
            "late": (kept.best / forward.best, GOAL_LATE),
        }
        print(f"{name}: {NETWORKS[name].rows} x {POSITIONS} tokens")
        print(f"  step    {ours.best:.3f} s, PyTorch {torch.best:.3f} s", end="")
        print(f"; 2 slots in the last layer {late.best:.3f} s", end="")
        print(f", {kept.best:.3f} s on what is kept; forward {forward.best:.3f} s")
        print(f"  memory  {ours.peak / 1e6:.0f} MB, PyTorch {torch.peak / 1e6:.0f} MB")
        print(f"  losses of {few} steps are within {apart:.1e}")
    for what, (ratio, goal) in ratios.items():
        print(f"  {what:7} {ratio:.2f} of {goal:.2f} {'ok' if ratio <= goal else 'MISSED'}")
    return apart < 1e-3 and all(ratio <= goal for ratio, goal in ratios.values())


def main() -> int:
    """Compare, or be one of the processes that are compared."""
    parser = argparse.ArgumentParser(description="Training beside PyTorch.")
    parser.add_argument("--torch", default=sys.executable, help="a Python with torch")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.file)
        return 0
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(f"{platform.machine()}, one core, Python {platform.python_version()}")
    met = True
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            met &= compare(name, Path(folder), given.torch, given.rounds)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
