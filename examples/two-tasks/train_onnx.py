"""Train an adapter for each task on the ONNX file alone. No PyTorch here.

    pip install 'onnx-adapt[cpu]' tokenizers
    python examples/two-tasks/train_onnx.py              # some minutes on one core
    python examples/two-tasks/train_onnx.py --base int4  # on a base with weights of 4 bits

Bases: `float32` as it is deployed, `int8` (quantised while it runs), `qdq` (int8 with
calibrated activations) and `int4` (MatMulNBits).

Texts, bottlenecks, epochs, batches and rate are those of `train.py`, and so is the way to
answer: a text gets the class whose centre has the direction nearest to its embedding. The
adapters are plain slots at both ends of each layer. `-o FOLDER` keeps them.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from texts import Task, fetch, load_tasks, tokenize

import onnx_adapt as oa
from onnx_adapt.training.settings import Settings

EMBEDDING = "461"  # the deployed model's name for its sentence embedding
BOTTLENECKS = {"mood": 24, "source": 48}
PYTORCH = {"mood": 0.808, "source": 0.881}  # what `train.py` reached
ENDS = ("attention.output.dense", "output.dense")
PLACES = [f"model.0.auto_model.encoder.layer.{n}.{end}" for n in range(3) for end in ENDS]
SETTINGS = Settings(epochs=3, batch_size=32, rate=3e-3, schedule="linear", warm_up=0)

Array = np.ndarray


@dataclass(frozen=True)
class Outcome:
    """The shares of right answers without and with the adapter, and the seconds it took."""

    plain: float
    adapted: float
    seconds: float


class Calibration:
    """Texts to measure the ranges of activations with, as `quantize_static` reads them."""

    def __init__(self) -> None:
        texts = load_tasks()["mood"].splits["train"].texts[:128]
        self._feeds = iter([tokenize(texts[at : at + 32]) for at in range(0, 128, 32)])

    def get_next(self) -> dict[str, Array] | None:
        """Give one batch, or None after the last."""
        return next(self._feeds, None)


def open_base(kind: str, folder: Path) -> oa.Model:
    """Return the encoder as it is deployed, or with weights of 8 or 4 bits."""
    path = Path(fetch("minilm-l3"))
    made = folder / f"{kind}.onnx"
    if kind == "int8":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(path, made, extra_options={"DefaultTensorType": 1})
    elif kind == "qdq":
        from onnxruntime.quantization import QuantFormat, quantize_static

        quantize_static(
            *(path, made, Calibration()),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
        )
    elif kind == "int4":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(str(path), block_size=32, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(made))
    return oa.open_model(path if kind == "float32" else made)


def batches(texts: Sequence[str], labels: Array) -> Iterator[dict[str, Array]]:
    """Give all texts, those of a like number of tokens together: it saves padding."""
    feeds = tokenize(texts)
    lengths = feeds["attention_mask"].sum(1)
    rounded = -(-lengths // 8) * 8
    for length in np.unique(rounded):
        rows = np.flatnonzero(rounded == length)
        few = {name: value[rows, :length] for name, value in feeds.items()}
        yield {**few, "labels": labels[rows]}


def embed(session: oa.AdapterSession, texts: Sequence[str], adapter: str | None) -> Array:
    """Return the directions of the embeddings of texts, `(texts, 384)`."""
    parts = [texts[at : at + 50] for at in range(0, len(texts), 50)]
    found = [
        session.run(tokenize(part), adapter=adapter, outputs=[EMBEDDING])[EMBEDDING]
        for part in parts
    ]
    rows = np.concatenate(found)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def measure(session: oa.AdapterSession, task: Task, adapter: str | None) -> float:
    """Return the share of test texts that get their class by the nearest centre."""
    train, test = task.splits["train"], task.splits["test"]
    learned = embed(session, train.texts, adapter)
    classes = range(len(task.classes))
    centres = np.stack([learned[train.labels == label].mean(0) for label in classes])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    answers = (embed(session, test.texts, adapter) @ centres.T).argmax(1)
    return float(np.mean(answers == test.labels))


def train_task(base: oa.Model, task: Task, folder: Path, seed: int) -> Outcome:
    """Train an adapter and a head for one task; the head is only there to learn by."""
    data, begun = task.splits["train"], time.perf_counter()
    model = oa.insert(base, after=PLACES, bias=True)
    model = oa.add_head(model, len(task.classes), output=EMBEDDING)
    trained = oa.train(
        *(model, list(batches(data.texts, data.labels))),
        loss="cross_entropy",
        output="head",
        name=task.name,
        bottleneck=BOTTLENECKS[task.name],
        validation=0.0,
        settings=replace(SETTINGS, seed=seed),
        check=base.label == "minilm-l3.onnx",  # integers move in steps
    )
    seconds = time.perf_counter() - begun
    oa.save_adapter(trained.adapter, folder / f"{task.name}.safetensors")
    with oa.AdapterSession(model, {task.name: trained.adapter}) as session:
        shares = [measure(session, task, adapter) for adapter in (None, task.name)]
    return Outcome(*shares, seconds)


def main() -> None:
    """Print one row for each task."""
    parser = argparse.ArgumentParser(description="Train two-tasks on the ONNX file alone.")
    parser.add_argument(
        "--base", choices=("float32", "int8", "qdq", "int4"), default="float32"
    )
    parser.add_argument("--tasks", nargs="+", choices=BOTTLENECKS, default=list(BOTTLENECKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="a folder for the adapters")
    given = parser.parse_args()
    logging.disable(logging.INFO)  # quantizers tell of every node
    tasks = load_tasks()
    print("task    plain   adapted  PyTorch  seconds")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        base = open_base(given.base, Path(temporary))
        for name in given.tasks:
            one = train_task(base, tasks[name], folder, given.seed)
            shares = "   ".join(f"{x:6.1%}" for x in (one.plain, one.adapted, PYTORCH[name]))
            print(f"{name:6} {shares}   {one.seconds:5.0f}", flush=True)


if __name__ == "__main__":
    main()
