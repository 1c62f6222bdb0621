"""Write cases of PEFT's methods that act on a sequence: aLoRA, prefixes and prompts.

To ``tests/cases/sequences/``, in the environment of ``make_peft_cases.py``. From the root of
the repository::

    PYTHONHASHSEED=0 /tmp/peft/bin/python tools/make_sequence_cases.py

What is written there::

    past.onnx               a Llama with random weights and its past as inputs
    past.npz                rows of tokens, and what PyTorch computes from them
    <case>/adapter/         the adapter, as PEFT saved it
    <case>/answers.npz      rows of tokens, and what PyTorch computes with the adapter on

PyTorch runs whole sequences without a cache, so a session that decodes token by token is
held against numbers that were made in another way. ``generated`` is how many of the tokens
PEFT's ``generate`` has added. With transformers 5.24, which renamed ``past_key_values``,
``generate`` of PEFT 0.21.2 drops prefixes and repeats prompts; this script refuses that.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
from case_making import (
    DEFAULT_FOLDER,
    Base,
    clean_folder,
    generator,
    make,
    strip_metadata,
    train,
)
from make_peft_cases import BASES, lora
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

FOLDER = DEFAULT_FOLDER / "sequences"
STEPS = 4
INVOCATION = [7, 8]
LAYERS = 2
VOCABULARY = 40


def build_past() -> nn.Module:
    """Return a small Llama with fewer heads of keys than of queries."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    )


class WithPast(nn.Module):
    """A model whose past is an input, and an output.

    Attributes:
        model: The model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap ``model``."""
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return the logits, and keys and values ``[batch, heads, length, size]``."""
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return result.logits, [(layer.keys, layer.values) for layer in cache.layers]


def export_past(model: nn.Module, path: Path) -> None:
    """Export a model with its past, as onnxruntime-genai and optimum name it."""
    free = torch.export.Dim.DYNAMIC
    length, rows, sequence = 4, 2, 3
    past = [tuple(torch.randn(rows, 2, length, 4) for _ in "kv") for _ in range(LAYERS)]
    ids = torch.zeros(rows, sequence, dtype=torch.long)
    mask = torch.ones(rows, length + sequence, dtype=torch.long)
    positions = torch.arange(length, length + sequence).expand(rows, -1)
    states = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    text, state = {0: free, 1: free}, {0: free, 2: free}
    torch.onnx.export(
        WithPast(model).eval(),
        (ids, mask, positions, past),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=(text, text, text, [(state, state)] * LAYERS),
        input_names=[
            *("input_ids", "attention_mask", "position_ids"),
            *(f"past_key_values.{name}" for name in states),
        ],
        output_names=["logits", *(f"present.{name}" for name in states)],
        verbose=False,
    )
    strip_metadata(path)


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter to train and save.

    Attributes:
        base: Name of a base of ``make_peft_cases.py``, or ``past``.
        config: Makes the configuration of PEFT.
        virtual: How many positions PEFT puts in front of the logits.
        generates: Whether tokens are added by ``generate``.
    """

    base: str
    config: Callable[[], peft.PeftConfig]
    virtual: int = 0
    generates: bool = True


BASE_PAST = Base(build_past, lambda *_: {}, {}, {})
CASES = {
    "alora_llama": Case(
        "llama_dynamo",
        lambda: lora(
            *("q_proj", "v_proj", "down_proj"),
            alora_invocation_tokens=INVOCATION,
            task_type="CAUSAL_LM",
        ),
        generates=False,
    ),
    "alora_gpt2": Case(
        "gpt2_torchscript",
        lambda: lora(
            *("c_attn", "c_fc"),
            fan_in_fan_out=True,
            alora_invocation_tokens=INVOCATION,
            task_type="CAUSAL_LM",
        ),
        generates=False,
    ),
    "alora_past": Case(
        "past",
        lambda: lora(
            *("q_proj", "v_proj", "o_proj"),
            alora_invocation_tokens=INVOCATION,
            task_type="CAUSAL_LM",
        ),
    ),
    "prefix": Case(
        "past", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ),
    "prefix_projection": Case(
        "past",
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=2,
            task_type="CAUSAL_LM",
            prefix_projection=True,
            encoder_hidden_size=8,
        ),
    ),
    "cartridge": Case(
        "past", lambda: peft.CartridgeConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    ),
    "prompt": Case(
        "past",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        virtual=3,
    ),
    "p_tuning": Case(
        "past",
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=2, task_type="CAUSAL_LM", encoder_hidden_size=8
        ),
        virtual=2,
    ),
}


def rows_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask: the invocation twice, not at all, at the start and cut off.

    Rows that ``generate`` goes on with have no padding. The others have it on the right.
    """
    ids = torch.tensor(
        [
            [1, 7, 8, 3, 7, 8, 5],
            [2, 3, 7, 5, 8, 6, 9],
            [7, 8, 1, 2, 3, 4, 11],
            [4, 7, 8, 7, 1, 2, 7],
        ]
    )
    mask = torch.ones_like(ids)
    if not case.generates:
        mask[2, 5:] = 0
    return ids, mask


def train_all(name: str, adapted: peft.PeftModel) -> None:
    """Give every parameter of the adapter a random value."""
    for path, parameter in adapted.named_parameters():
        if "lora_" in path or "prompt_encoder" in path:
            train(parameter, f"{name}:{path}", 0.5)


def make_case(name: str, case: Case) -> None:
    """Train and save one adapter, and write what PEFT computes with it.

    Raises:
        RuntimeError: If PEFT generates other tokens than it computes for the whole sequence.
    """
    folder = clean_folder(FOLDER / name)
    model = make(BASE_PAST if case.base == "past" else BASES[case.base])
    adapted = peft.get_peft_model(model, case.config()).eval()
    train_all(name, adapted)
    ids, mask = rows_of(case)
    with torch.no_grad():
        if case.generates:
            longer = adapted.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                pad_token_id=0,
            )
            ids, mask = longer, torch.ones_like(longer)
        logits = adapted(input_ids=ids, attention_mask=mask).logits[:, case.virtual :]
    if case.generates:
        chosen = logits[:, -STEPS - 1 : -1].argmax(-1)
        if not bool((chosen == ids[:, -STEPS:]).all()):
            raise RuntimeError(f"{name}: generate chose other tokens than the whole run")
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    np.savez_compressed(
        folder / "answers.npz",
        input_ids=ids.numpy(),
        attention_mask=mask.numpy(),
        logits=logits.numpy(),
        generated=np.array(STEPS if case.generates else 0),
    )


def main() -> None:
    """Write the base and all cases."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    model = make(BASE_PAST)
    export_past(model, FOLDER / "past.onnx")
    ids = torch.randint(0, VOCABULARY, (3, 6), generator=generator("past"))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    np.savez_compressed(FOLDER / "past.npz", input_ids=ids.numpy(), logits=logits.numpy())
    for name, case in CASES.items():
        make_case(name, case)


if __name__ == "__main__":
    main()
