"""The adapters of an architecture as their libraries save them, and what PyTorch computes."""

from __future__ import annotations

import json
from pathlib import Path

import adapters
import numpy as np
import peft
import torch
from case_making import SMALLEST_EFFECT, Arrays, clean_folder, train, write_json
from pipelines.architectures import ARCHITECTURES, Architecture, make
from torch import nn

RANK = 4
STEPS = 8
STD = 0.3


def lora(targets: str | list[str], **fields: bool) -> peft.PeftConfig:
    """Return the settings of a LoRA or DoRA."""
    return peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, **fields)


def configs(architecture: Architecture) -> dict[str, peft.PeftConfig]:
    """Return the settings of every method of PEFT, by the method's name."""
    scaled, before = architecture.keys
    attention = list(architecture.attention)
    return {
        "lora": lora(attention),
        "lora_all": lora("all-linear"),
        "dora": lora(attention, use_dora=True),
        "ia3": peft.IA3Config(target_modules=list(scaled), feedforward_modules=list(before)),
    }


def compute(model: nn.Module, inputs: Arrays) -> np.ndarray:
    """Return the logits of PyTorch."""
    with torch.no_grad():
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return model(**given).logits.numpy()


def decode(model: nn.Module, inputs: Arrays) -> Arrays:
    """Return what greedy decoding gives in PyTorch, without a cache: tokens and their logits.

    ``tokens`` is ``(rows, STEPS + 1)``, with the start token first; ``logits`` is
    ``(rows, STEPS, vocabulary)``.
    """
    rows = len(inputs["decoder_input_ids"])
    given = {name: array for name, array in inputs.items() if name != "decoder_input_ids"}
    found = np.full((rows, 1), model.config.decoder_start_token_id, np.int64)
    for _ in range(STEPS):
        logits = compute(model, {**given, "decoder_input_ids": found})
        chosen = logits[:, -1:].argmax(-1)
        found = np.concatenate([found, chosen], axis=1)
    return {"tokens": found, "logits": logits}


def attach_peft(name: str, method: str, folder: Path) -> nn.Module:
    """Add a trained adapter of PEFT to a fresh model, and save it."""
    config = configs(ARCHITECTURES[name])[method]
    adapted = peft.get_peft_model(make(name), config).eval()
    for key, parameter in adapted.named_parameters():
        if "lora_" in key or "ia3_" in key:
            train(parameter, f"{method}.{key}", STD)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["base_model_name_or_path"] = None
    for key in ("target_modules", "feedforward_modules"):
        facts |= {key: sorted(facts[key])} if facts.get(key) else {}
    write_json(path, facts)
    return adapted


def attach_adapterhub(name: str, folder: Path) -> nn.Module:
    """Add a trained bottleneck of AdapterHub behind each feed-forward block, and save it."""
    model = make(name)
    adapters.init(model)
    model.add_adapter("task", config=adapters.SeqBnConfig(reduction_factor=8))
    model.set_active_adapters("task")
    for key, parameter in model.named_parameters():
        if ".adapters." in key:
            train(parameter, key, STD)
    model.save_adapter(str(folder), "task", with_head=False)
    return model.eval()


def write_answers(name: str, folder: Path) -> None:
    """Write the inputs of an architecture, its adapters, and PyTorch's answers.

    Raises:
        RuntimeError: If an adapter has hardly any effect.
    """
    architecture = ARCHITECTURES[name]
    inputs = architecture.inputs()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "inputs.npz", **inputs)
    base = compute(make(name), inputs)
    np.savez_compressed(folder / "base.npz", logits=base)
    methods = [*configs(architecture), *(["bottleneck"] if name in WITH_BOTTLENECK else [])]
    for method in methods:
        saved = clean_folder(folder / method)
        if method == "bottleneck":
            adapted = attach_adapterhub(name, saved)
        else:
            adapted = attach_peft(name, method, saved)
        logits = compute(adapted, inputs)
        effect = float(np.abs(logits - base).max())
        if not SMALLEST_EFFECT < effect < np.inf:
            raise RuntimeError(f"{name}/{method}: the adapter's effect is {effect}")
        np.savez_compressed(folder / f"{method}.npz", logits=logits)
        if method == "lora" and "decoder_input_ids" in inputs:
            write_decoded(name, adapted, folder)
        print(f"{name}/{method}: effect {effect:.3f}", flush=True)


def write_decoded(name: str, adapted: nn.Module, folder: Path) -> None:
    """Write what the base and an adapted model of an encoder and a decoder generate.

    Raises:
        RuntimeError: If both generate the same.
    """
    inputs = ARCHITECTURES[name].inputs()
    plain, trained = decode(make(name), inputs), decode(adapted, inputs)
    if np.array_equal(plain["tokens"], trained["tokens"]):
        raise RuntimeError(f"{name}: the adapter changes no token")
    np.savez_compressed(
        folder / "decoded.npz",
        **{f"base.{key}": value for key, value in plain.items()},
        **{f"lora.{key}": value for key, value in trained.items()},
    )


WITH_BOTTLENECK = ("bert", "gpt2", "llama", "bart")
"""Architectures that AdapterHub knows and onnx-adapt reads."""
