"""Make what `train.c` reads, and what Python learns from it, in `made/`.

The model is a BERT of 0.1 MB of our tests, with a slot in each of its two layers. A sample is
of the class that its first token says.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import onnx_adapt as oa
from onnx_adapt.ort import CPU
from onnx_adapt.training.data import Batch
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.optimisers import Optimiser
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_model import make_step

ROOT = Path(__file__).resolve().parents[2]
MADE = Path(__file__).resolve().parent / "made"
BASE = ROOT / "tests/cases/peft_bert_lora_default_ts/base.onnx"
PLACES = "bert.encoder.layer.*.output.dense"
SAMPLES, TOKENS, BATCH = 20, 6, 8  # the last batch has 4
STEPS, RATE = 30, 1e-2


def main() -> None:
    """Write the adapted model, the samples, and the losses and weights of Python."""
    MADE.mkdir(exist_ok=True)
    base = oa.open_model(BASE)
    adapted = oa.insert(base, oa.find_sites(base, PLACES))
    oa.save_model(adapted, MADE / "adapted.onnx", overwrite=True)
    ids = np.random.default_rng(0).integers(1, 60, (SAMPLES, TOKENS))
    mask, labels = np.ones_like(ids), ids[:, 0] % 3
    numbers = (np.array(ids.shape), ids, mask, labels)
    (MADE / "samples.bin").write_bytes(b"".join(x.astype("<i8").tobytes() for x in numbers))
    feeds = {"input_ids": ids, "attention_mask": mask}
    np.savez(MADE / "samples.npz", **feeds, labels=labels)
    losses, weights = python_learns(adapted, feeds, labels)
    np.savez(MADE / "weights.npz", **weights)
    expected = {"steps": STEPS, "rate": RATE, "losses": losses}
    (MADE / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def python_learns(
    adapted: oa.Model, feeds: dict[str, np.ndarray], labels: np.ndarray
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss of each step and the last weights, by the optimiser in numpy."""
    weights = weights_to_train(adapted, 16, None, 0)
    engine = Engine(make_step(adapted, list(weights), loss="cross_entropy"), CPU)
    optimiser = Optimiser()
    state, losses = optimiser.start(weights), []
    starts = range(0, SAMPLES, BATCH)
    for count in range(1, STEPS + 1):
        first = starts[(count - 1) % len(starts)]
        rows = np.arange(first, min(first + BATCH, SAMPLES))
        batch = Batch({name: x[rows] for name, x in feeds.items()}, labels[rows], rows)
        found = engine.run(weights, batch)
        losses.append(float(found.loss))
        weights, state = optimiser.step(weights, found.grads, state, count, RATE)
    return losses, weights


if __name__ == "__main__":
    main()
