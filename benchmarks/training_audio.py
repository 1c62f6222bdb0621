"""Two speech models learn something new from their ONNX files alone: a CNN, and an encoder.

    python benchmarks/training_audio.py [--models dnsmos smart-turn] [--samples 160]

dnsmos-p808 is a CNN that rates noise in speech; here it learns to tell how loud made-up noise
is. smart-turn is the encoder of Whisper with a head of its own, in int8 with calibrated
activations; here it learns to tell whether a tone rises or falls at its end. Sounds are drawn
from a seed. The adapters are two slots in late layers; a quarter of the samples is held back,
and the result is told for fresh ones. It exits with 1 if a model does not learn its task.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import onnx_adapt as oa
from onnx_adapt.training.settings import Settings

HERE = Path(__file__).resolve().parent
Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def noises(count: int, rng: np.random.Generator) -> Arrays:
    """Beats in noise, `(count, 900, 120)`, and a rating from 1 to 4, the louder the lower."""
    rate, phase = rng.uniform(3, 12, (count, 1)), rng.uniform(0, 6, (count, 1))
    beat = 0.5 + 0.5 * np.sin(2 * np.pi * rate * np.arange(900) / 900 + phase)
    loud = rng.uniform(0, 1, (count, 1, 1))
    voice = rng.uniform(0.3, 1, (count, 1, 120)) * beat[:, :, None]
    sounds = voice * (1 - loud) + loud * rng.uniform(0, 1, (count, 900, 120))
    return sounds.astype(np.float32), (4 - 3 * loud[:, :, 0]).astype(np.float32)


def tones(count: int, rng: np.random.Generator) -> Arrays:
    """Tones in noise, `(count, 80, 800)`: 1 if they rise at their end, 0 if they fall."""
    rises = rng.permutation(np.arange(count) % 2)[:, None]
    way = (2 * rises - 1) * rng.uniform(5, 15, (count, 1))
    band = rng.uniform(20, 50, (count, 1)) + way * np.clip(np.arange(800) / 200 - 3, 0, 1)
    far = (np.arange(80)[None, :, None] - band[:, None, :]) / 4
    sounds = 2 * np.exp(-(far**2)) - 1 + 0.3 * rng.standard_normal((count, 80, 800))
    return sounds.astype(np.float32), rises.astype(np.float32)


@dataclass(frozen=True)
class Task:
    """What a model learns: its file, where the slots are, its data, what is good enough."""

    file: Callable[[], Path]
    places: tuple[str, ...]
    given: str
    output: str
    draw: Callable[[int, np.random.Generator], Arrays]
    score: Callable[[Any, Any], float]
    goal: Callable[[float, float], bool]
    told: str


def _fetched() -> Path:
    sys.path.append(str(HERE.parent / "tools"))
    from fetch_models import fetch

    return Path(fetch("smart-turn"))


TASKS = {
    "dnsmos": Task(
        lambda: HERE.parent / "models" / "dnsmos-p808.onnx",
        (
            "mos_estimator_small_1/dense_3/MatMul_add",
            "mos_estimator_small_1/dense_4/MatMul_add",
        ),
        *("input_1", "Identity:0", noises),
        lambda given, wanted: float(((given - wanted) ** 2).mean()),
        lambda before, after: after < before / 5,
        "mean squared error",
    ),
    "smart-turn": Task(
        _fetched,
        ("linear_21", "linear_26"),
        *("input_features", "logits", tones),
        lambda given, wanted: float(((given > 0.5) == wanted).mean()),
        lambda before, after: after > 0.9,
        "share that is right",
    ),
}


def learn(name: str, samples: int, epochs: int) -> bool:
    """Train one model, and print what it learned; whether that is good enough."""
    task, rng = TASKS[name], np.random.default_rng(0)
    sounds, labels = task.draw(samples, rng)
    model = oa.insert(task.file(), after=task.places)
    begun = time.process_time()
    trained = oa.train(
        model,
        {task.given: sounds, "labels": labels},
        loss="mse",
        settings=Settings(epochs=epochs, batch_size=16, rate=3e-3),
        validation=0.25,
        notice=lambda text: print(f"  {text}"),
    )
    took = time.process_time() - begun
    fresh, wanted = task.draw(96, rng)
    with oa.AdapterSession(model, {"new": trained.adapter}) as session:
        parts = [{task.given: fresh[at : at + 8]} for at in range(0, len(fresh), 8)]
        before, after = (
            task.score(np.concatenate([run[task.output] for run in runs]), wanted)
            for runs in (
                [session.run(part) for part in parts],
                [session.run(part, adapter="new") for part in parts],
            )
        )
    good = task.goal(before, after)
    print(f"{name}: {task.told} {before:.3f}, with the adapter {after:.3f}", end="")
    print(f" ({took:.0f} s of processor time) {'ok' if good else 'MISSED'}")
    return good


def main() -> int:
    """Train the models that are asked for."""
    parser = argparse.ArgumentParser(description="Speech models that learn something new.")
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=16)
    given = parser.parse_args()
    done = [learn(name, given.samples, given.epochs) for name in given.models]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
