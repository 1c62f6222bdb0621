"""Train an adapter for each task on the weights of the deployed ONNX file.

It needs PyTorch, in an environment of its own, and takes some minutes on one core::

    python -m venv /tmp/two-tasks
    /tmp/two-tasks/bin/pip install torch 'adapters~=1.3' onnx onnxruntime tokenizers
    /tmp/two-tasks/bin/python examples/two-tasks/train.py

It writes `adapters/` as the library saves them, the middle of each class (`centres.npz`),
and what PyTorch answers: `pytorch.json` and `pytorch.npz`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import adapters
import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from texts import HERE, Task, fetch, load_tasks, tokenize
from torch.nn import functional

SEED = 0
REDUCTIONS = {"mood": 16, "source": 8}  # bottlenecks of 24 and 48 units
EPOCHS = 3
BATCH = 32
RATE = 3e-3
SHOWN = 8  # test texts of each task whose embeddings are written down
LIBRARIES = ("torch", "transformers", "adapters")


@dataclass(frozen=True)
class Measured:
    """PyTorch's answers, the centres that gave them, and some of the embeddings."""

    right: float
    linear: float
    answers: str
    embeddings: np.ndarray
    centres: np.ndarray


def build_encoder(path: Path) -> transformers.BertModel:
    """Return the network of the ONNX file, with the weights that are in the file."""
    prefix = "model.0.auto_model."
    graph = onnx.load(path).graph
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    state = {
        name.removeprefix(prefix): torch.tensor(array)
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    for node in graph.node:  # the exporter transposed these, and called them MatMul_470
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.strip("/").split("/", 3)[-1].replace("/", ".")
            weight = arrays[node.input[1]].T.copy()
            state[module.replace(".MatMul", ".weight")] = torch.tensor(weight)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536
    )
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict(state)
    return encoder.eval()


def embed(encoder: transformers.BertModel, texts: list[str]) -> torch.Tensor:
    """Return the mean of each text's token vectors, `(texts, 384)`, as the ONNX file does."""
    feeds = {name: torch.tensor(array) for name, array in tokenize(texts).items()}
    mask = feeds["attention_mask"].unsqueeze(-1)
    return (encoder(**feeds).last_hidden_state * mask).sum(1) / mask.sum(1)


def embed_all(encoder: transformers.BertModel, texts: list[str]) -> torch.Tensor:
    """Return the embeddings of many texts, computed 50 of a like length at a time."""
    encoder.eval()
    found = torch.empty(len(texts), encoder.config.hidden_size)
    with torch.no_grad():
        for rows in torch.tensor([len(text) for text in texts]).argsort().split(50):
            found[rows] = embed(encoder, [texts[row] for row in rows])
    return found


def train_adapter(encoder: transformers.BertModel, task: Task) -> None:
    """Train an adapter called as the task; the encoder's own weights stay as they are."""
    torch.manual_seed(SEED)
    config = adapters.SeqBnConfig(reduction_factor=REDUCTIONS[task.name])
    encoder.add_adapter(task.name, config=config)
    encoder.train_adapter(task.name)
    encoder.train()
    head = torch.nn.Linear(384, len(task.classes))  # thrown away: see find_centres
    learned = [one for one in encoder.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW([*learned, *head.parameters()], lr=RATE)
    data = task.splits["train"]
    labels = torch.tensor(data.labels)
    batches = [rows for _ in range(EPOCHS) for rows in shuffle(data.texts)]
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, len(batches))
    for rows in batches:
        logits = head(embed(encoder, [data.texts[row] for row in rows]))
        functional.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        slower.step()


def shuffle(texts: list[str]) -> list[torch.Tensor]:
    """Return batches of indices; texts of a like length share one, which saves padding."""
    batches = []
    for rows in torch.randperm(len(texts)).split(BATCH * 20):
        lengths = torch.tensor([len(texts[row]) for row in rows])
        batches += rows[lengths.argsort()].split(BATCH)
    return [batches[index] for index in torch.randperm(len(batches))]


def find_centres(embeddings: torch.Tensor, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the direction of each class, `(384, classes)`: nothing is fitted."""
    unit = functional.normalize(embeddings)
    centres = torch.stack([unit[labels == label].mean(0) for label in range(classes)])
    return functional.normalize(centres).T.numpy()


def fit_linear(embeddings: torch.Tensor, labels: np.ndarray, classes: int) -> torch.nn.Linear:
    """Return a linear classifier: what can be had without touching the encoder."""
    torch.manual_seed(SEED)
    linear = torch.nn.Linear(embeddings.shape[1], classes)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=500, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(linear(embeddings), torch.tensor(labels))
        value = value + 1e-4 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return linear


def measure(encoder: transformers.BertModel, task: Task, part: str) -> Measured:
    """Return what the encoder, as it is set now, makes of the texts of one part."""
    data, asked = task.splits["train"], task.splits[part]
    learned, found = embed_all(encoder, data.texts), embed_all(encoder, asked.texts)
    centres = find_centres(learned, data.labels, len(task.classes))
    answers = (found.numpy() @ centres).argmax(1)
    linear = fit_linear(learned, data.labels, len(task.classes))
    return Measured(
        right=float(np.mean(answers == asked.labels)),
        linear=float(np.mean(linear(found).argmax(1).numpy() == asked.labels)),
        answers="".join(map(str, answers)),
        embeddings=found[:SHOWN].numpy(),
        centres=centres,
    )


def main(part: str) -> None:
    """Train both adapters and measure them on a part of the texts; write all if it is test."""
    torch.set_num_threads(1)
    tasks = load_tasks()
    encoder = build_encoder(fetch("minilm-l3"))
    far = compare_with_onnx(encoder, tasks["source"].splits[part].texts[:100])
    print(f"the rebuilt encoder is {far:.1e} from the ONNX file")
    if far > 1e-5:
        sys.exit("this is not the network of the ONNX file")
    plain = {name: measure(encoder, task, part) for name, task in tasks.items()}
    adapters.init(encoder)
    adapted = {}
    for name, task in tasks.items():
        started = time.perf_counter()
        train_adapter(encoder, task)
        adapted[name] = measure(encoder, task, part)
        if part == "test":
            encoder.save_adapter(str(HERE / "adapters" / name), name)
        for state, one in (("plain", plain[name]), ("adapted", adapted[name])):
            print(f"{name} {state}: {one.right:.1%} of {part}, linear {one.linear:.1%}")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    if part == "test":
        write(plain, adapted, far)


def write(plain: dict[str, Measured], adapted: dict[str, Measured], far: float) -> None:
    """Write the centres, which are deployed, and PyTorch's answers, which are not."""
    each = {f"{name}.plain": one for name, one in plain.items()}
    each |= {f"{name}.adapted": one for name, one in adapted.items()}
    np.savez(HERE / "centres.npz", **{name: one.centres for name, one in each.items()})
    np.savez(HERE / "pytorch.npz", **{name: one.embeddings for name, one in each.items()})
    facts = {
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "rebuilt_encoder_is_from_onnx": far,
        "answers": {
            name: {"right": one.right, "linear": one.linear, "classes": one.answers}
            for name, one in each.items()
        },
    }
    (HERE / "pytorch.json").write_text(json.dumps(facts, indent=1) + "\n")


def compare_with_onnx(encoder: transformers.BertModel, texts: list[str]) -> float:
    """Return how far the rebuilt encoder is from the file that is deployed."""
    session = onnxruntime.InferenceSession(fetch("minilm-l3"))
    (deployed,) = session.run(["461"], tokenize(texts))
    return float(np.abs(embed_all(encoder, texts).numpy() - deployed).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the adapters of two-tasks again.")
    parser.add_argument("--dev", action="store_true", help="to choose settings: write nothing")
    main("dev" if parser.parse_args().dev else "test")
