"""Build tiny language models with onnxruntime-genai's own builder, and adapters for them.

What is written to ``tests/genai/`` is committed, so that the tests need neither torch nor
the builder::

    tinyllama/        a Llama with random weights, float32
    tinyllama_int4/   the same Llama with 4-bit weights
    lora/             a LoRA on every Linear of its layers, as PEFT saves it
    narrow.safetensors, mixed.safetensors
                      two bottleneck adapters: <module>.down and <module>.up
    expected.npz      what PyTorch generates: prompt, and <adapter>.tokens, <adapter>.logits

In PyTorch a bottleneck adapter is a forward hook on the module, ``y + relu(y @ down) @ up``.
Every token is the first choice by a margin, so that rounding cannot change it.

The models are as the builder wrote them but for two things that onnxruntime-genai 0.9 and
ONNX Runtime 1.22, the newest that Python 3.10 can have here, do not know: the empty names at
the end of a node's inputs, and transformers 5's name for the class of the tokenizer.
No Linear may be as wide as the vocabulary: the builder would take it for the head. To make
the environment and run the script, from the root of the repository::

    python -m venv /tmp/genai
    /tmp/genai/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    /tmp/genai/bin/pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
    /tmp/genai/bin/pip install onnx-ir==1.1.0 onnxruntime-genai==0.18.0
    /tmp/genai/bin/python tools/make_genai_model.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import peft
import torch
import transformers
from case_making import (
    MACHINE_PATH,
    Arrays,
    clean_folder,
    generator,
    randomise,
    train,
    write_json,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "genai"
CORPUS = ["the cat sat on the mat", "a dog ran to the sea", "one adapter for each task"]
PROMPT = "the dog ran to the cat"
VOCABULARY = 60
STEPS = 16
SMALLEST_MARGIN = 0.01
MODELS = {"tinyllama": "fp32", "tinyllama_int4": "int4"}
PLACES = ("self_attn.o_proj", "mlp.down_proj")
BOTTLENECKS = {"narrow": (8, 8, 8, 8), "mixed": (4, 16, 2, 8)}

Weights = dict[str, torch.Tensor]


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer of lower-case words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=[*letters, "Ġ"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def build_llama() -> transformers.LlamaForCausalLM:
    """Return a Llama with grouped key and value heads and random weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    randomise(model)
    return model


def build_onnx(saved: Path, folder: Path, precision: str) -> None:
    """Run onnxruntime-genai's builder on a saved model.

    Raises:
        RuntimeError: If a file holds a path of this machine.
    """
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-m", ".", "-i", str(saved), "-o", str(clean_folder(folder))]
    command += ["-p", precision, "-e", "cpu", "-c", str(saved / "cache")]
    command += ["--extra_options", "hf_token=false"]
    subprocess.run(command, check=True, cwd=saved, capture_output=True)
    trim(folder / "model.onnx")
    config = folder / "tokenizer_config.json"
    facts = json.loads(config.read_text(encoding="utf-8"))
    facts["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(config, facts)
    for path in folder.iterdir():
        if found := MACHINE_PATH.search(path.read_bytes()):
            raise RuntimeError(f"{path} holds {found.group()!r}")


def trim(path: Path) -> None:
    """Drop the empty names at the end of every node's inputs: they say the same as none."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        while node.input and not node.input[-1]:
            node.input.pop()
    path.write_bytes(model.SerializeToString())


def build_bottlenecks(name: str) -> Weights:
    """Return the weights of a bottleneck adapter."""
    modules = [f"model.layers.{i}.{place}" for i in range(2) for place in PLACES]
    weights = {}
    for module, size in zip(modules, BOTTLENECKS[name], strict=True):
        random = generator(f"{name}.{module}")
        weights[f"{module}.down"] = torch.randn(64, size, generator=random) * 0.2
        weights[f"{module}.up"] = torch.randn(size, 64, generator=random) * 0.3
    return weights


@contextlib.contextmanager
def hooked(model: nn.Module, weights: Weights) -> Iterator[nn.Module]:
    """Put a bottleneck adapter into a model."""

    def hook_of(module: str) -> torch.utils.hooks.RemovableHandle:
        down, up = weights[f"{module}.down"], weights[f"{module}.up"]
        return model.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, y: y + torch.relu(y @ down) @ up
        )

    handles = [hook_of(module) for module in sorted({k.rpartition(".")[0] for k in weights})]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def generate(model: nn.Module, prompt: torch.Tensor, name: str) -> Arrays:
    """Generate greedily, without a cache: the tokens, and the logits each came from.

    Raises:
        RuntimeError: If a token is hardly ahead of the next best, or ends the text.
    """
    ids, rows = prompt, []
    with torch.no_grad():
        for _ in range(STEPS):
            row = model(input_ids=ids, use_cache=False).logits[0, -1]
            best, second = row.topk(2).values
            token = row.argmax()
            if best - second < SMALLEST_MARGIN or token == 1:
                raise RuntimeError(f"{name}: token {int(token)}, margin {best - second:.3f}")
            rows.append(row)
            ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
    return {
        f"{name}.tokens": ids[0, prompt.shape[1] :].numpy(),
        f"{name}.logits": torch.stack(rows).numpy(),
    }


def write_lora(model: nn.Module, folder: Path) -> nn.Module:
    """Add a LoRA, save it as PEFT does, and return the adapted model."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            train(parameter, name, 0.15)
    adapted.save_pretrained(clean_folder(folder))
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["base_model_name_or_path"] = None
    facts["target_modules"] = sorted(facts["target_modules"])
    write_json(path, facts)
    return adapted


def write(folder: Path) -> None:
    """Write all files."""
    clean_folder(folder)
    model, tokenizer = build_llama(), build_tokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for name, precision in MODELS.items():
            build_onnx(Path(scratch), folder / name, precision)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = {"prompt": prompt[0].numpy(), **generate(model, prompt, "base")}
    for name in BOTTLENECKS:
        weights = build_bottlenecks(name)
        save_file(weights, folder / f"{name}.safetensors")
        with hooked(model, weights) as adapted:
            expected |= generate(adapted, prompt, name)
    expected |= generate(write_lora(model, folder / "lora"), prompt, "lora")
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    write(parser.parse_args().folder)
