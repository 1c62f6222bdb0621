"""What PyTorch needs for a trained adapter in ONNX Runtime: export the model with it.

    python torch_export.py make FOLDER LAYERS WIDTH
    python torch_export.py EXPORTER FOLDER

`make` writes a BERT with random weights, its ONNX export, and a LoRA that PEFT saved.
EXPORTER is `torchscript` or `dynamo`: load both, merge, export, and run once. It runs in an
environment with torch, transformers, peft and onnxruntime.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

NAMES = ["input_ids", "attention_mask"]


def export(model: Any, path: Path, *, dynamo: bool) -> None:
    """Write a model as ONNX, with batch and sequence left open."""
    ids = torch.ones(2, 16, dtype=torch.int64)
    names: dict[str, Any] = {"input_names": NAMES, "output_names": ["logits"]}
    axes = {0: "batch", 1: "sequence"}
    if dynamo:
        free = torch.export.Dim.DYNAMIC
        names["dynamic_shapes"] = {name: {0: free, 1: free} for name in NAMES}
    else:
        names["dynamic_axes"] = {**dict.fromkeys(NAMES, axes), "logits": {0: "batch"}}
    model.config.return_dict = False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.onnx.export(model.eval(), (), path, kwargs=given, dynamo=dynamo, **names)


def make(folder: Path, layers: int, width: int) -> None:
    """Write the base, its export, an adapter with random weights, and inputs."""
    import peft

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        intermediate_size=4 * width,
        vocab_size=2000,
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder / "base")
    export(model, folder / "base.onnx", dynamo=False)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    adapted = peft.get_peft_model(model, lora)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(folder / "adapter")
    ids = np.arange(2 * 16).reshape(2, 16) + 5
    np.savez(folder / "inputs.npz", input_ids=ids, attention_mask=np.ones_like(ids))


def through_torch(folder: Path, exporter: str) -> None:
    """From the adapter's folder to the first output."""
    import onnxruntime
    import peft

    model = BertForSequenceClassification.from_pretrained(
        folder / "base", attn_implementation="eager"
    )
    merged = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    path = folder / f"{exporter}.onnx"
    export(merged, path, dynamo=exporter == "dynamo")
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, dict(np.load(folder / "inputs.npz")))
    np.save(folder / f"{exporter}.npy", logits)


if __name__ == "__main__":
    what, place, *sizes = sys.argv[1:]
    if what == "make":
        make(Path(place), *map(int, sizes))
    else:
        through_torch(Path(place), what)
