"""PyTorch's side of `training.py`: the same network, adapters, batches and optimiser.

    python training_torch.py export PATH            # write a 12-layer BERT as ONNX
    python training_torch.py train FOLDER           # answer "step N" on stdin

It runs in an environment with torch, transformers, onnx and onnxscript.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel


def bert_base() -> BertModel:
    """A BERT base with random weights, which are the same every time."""
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=8000), add_pooling_layer=False)


def export(path: Path) -> None:
    """Write BERT base as ONNX, with batch and sequence left open."""
    model = bert_base().eval()
    model.config.return_dict = False
    ids = torch.ones(2, 16, dtype=torch.int64)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (),
            path,
            kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            dynamo=True,
            external_data=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes={"input_ids": free, "attention_mask": free},
        )


def minilm(path: Path) -> BertModel:
    """The network of the package's ONNX file, with its weights."""
    import onnx

    prefix = "model.0.auto_model."
    graph = onnx.load(path).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    state = {
        name.removeprefix(prefix): torch.tensor(array)
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    for node in graph.node:  # the exporter transposed these, and renamed them
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.strip("/").split("/", 3)[-1].replace("/", ".")
            weight = torch.tensor(arrays[node.input[1]].T.copy())
            state[module.replace(".MatMul", ".weight")] = weight
    config = BertConfig(
        hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536
    )
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state)
    return model


class Adapted(torch.nn.Module):
    """An encoder with bottlenecks behind some of its layers, and a head on the mean."""

    def __init__(self, encoder: BertModel, start: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.learned = torch.nn.ParameterDict(
            {
                name.replace(".", "/"): torch.nn.Parameter(torch.tensor(value))
                for name, value in start.items()
            }
        )
        names = {name.rpartition(".")[0] for name in start if name.endswith(".down")}
        for name in names:
            module = encoder.get_submodule(
                name.partition("encoder.")[2].join(["encoder.", ""])
            )
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        down, up = (
            self.learned[f"{name}.{part}".replace(".", "/")] for part in ("down", "up")
        )
        return lambda module, given, made: made + functional.relu(made @ down) @ up

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The logits, `(batch, classes)`."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        wide = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * wide).sum(1) / wide.sum(1)
        return mean @ self.learned["head/weight"] + self.learned["head/bias"]


def train(folder: Path) -> None:
    """Take steps as they are asked for; each answer has their times and losses."""
    torch.set_num_threads(1)
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    encoder = minilm(Path(task["base"])) if task["name"] == "minilm-l3" else bert_base()
    model = Adapted(encoder, dict(np.load(folder / "start.npz"))).eval()
    optimizer = torch.optim.AdamW(model.learned.parameters(), lr=task["rate"], weight_decay=0)
    data = {key: torch.tensor(value) for key, value in np.load(folder / "batch.npz").items()}
    for line in sys.stdin:
        times, losses = [], []
        for _ in range(int(line)):
            begun = time.process_time()
            logits = model(data["input_ids"], data["attention_mask"])
            loss = functional.cross_entropy(logits, data["labels"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.process_time() - begun)
            losses.append(loss.item())
        print(json.dumps({"times": times, "losses": losses}), flush=True)


if __name__ == "__main__":
    {"export": export, "train": train}[sys.argv[1]](Path(sys.argv[2]))
