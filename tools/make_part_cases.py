"""Write ``tests/parts/``: parts of tiny models, exported alone, and adapters of the wholes.

For every model a LoRA is trained of each part, with the names of the whole model, as PEFT
saves it; and each part is exported from its own root, so that its graph does not name it.
The tests need neither torch nor peft. What is written::

    <model>.<part>.onnx     the part, with random weights, exported alone
    <model>.<part>.npz      ``input.<name>``, ``base`` and, for each adapter of the model,
                            ``adapter.<part>``: what PyTorch computes with it
    <model>.<part>.adapter  the LoRA of one part
    whisper.safetensors     the weights of a whole model, for mapping by value

The environment is that of ``make_peft_cases.py``; then, from the root of the repository::

    PYTHONHASHSEED=0 /tmp/peft/bin/python tools/make_part_cases.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from case_making import clean_folder, generator, train
from export_fixtures import Tensors, strip_stack_traces
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "parts"
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
STACKS = {
    "d_model": 16,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
}
WORDS = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MEANT = {"tokens": "input_ids", "image": "pixel_values", "x": "input_features"}
"""Inputs that are not called as transformers calls them, so that they tell nothing."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        path: Where it is in the model.
        inputs: Makes its inputs.
        exporter: ``ts`` or ``dynamo``.
        targets: The Linears to adapt, as a pattern of paths.
    """

    path: str
    inputs: Tensors
    targets: str = r".*(q_proj|v_proj)"
    exporter: str = "ts"


def ids(name: str = "input_ids") -> Tensors:
    """Token ids and their mask."""
    tokens = torch.randint(3, 20, (2, 5), generator=generator(name))
    return {name: tokens, "attention_mask": torch.ones_like(tokens)}


def floats(name: str, *shape: int) -> Tensors:
    """Random numbers."""
    return {name: torch.randn(shape, generator=generator(name))}


def whisper() -> nn.Module:
    """Return a Whisper."""
    config = tf.WhisperConfig(
        **STACKS,
        **WORDS,
        num_mel_bins=8,
        max_source_positions=6,
        max_target_positions=8,
        decoder_start_token_id=1,
    )
    return tf.WhisperForConditionalGeneration(config)


def t5() -> nn.Module:
    """Return a T5."""
    config = tf.T5Config(
        vocab_size=20,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return tf.T5ForConditionalGeneration(config)


def clip() -> nn.Module:
    """Return a CLIP whose two towers have layers of one size."""
    config = tf.CLIPConfig(
        text_config={**SMALL, **WORDS, "intermediate_size": 16, "max_position_embeddings": 8},
        vision_config={**SMALL, "intermediate_size": 16, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    return tf.CLIPModel(config)


def llava() -> nn.Module:
    """Return a LLaVA: a CLIP tower and a Llama with layers of one size."""
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            **SMALL, intermediate_size=16, image_size=8, patch_size=4
        ),
        text_config=tf.LlamaConfig(**SMALL, **WORDS, intermediate_size=16),
    )
    return tf.LlavaForConditionalGeneration(config)


MODELS: Mapping[str, tuple[nn.Module, Mapping[str, Part]]] = {
    "whisper": (
        whisper,
        {
            "encoder": Part("model.encoder", floats("x", 2, 8, 12)),
            "encoder_dynamo": Part("model.encoder", floats("x", 2, 8, 12), exporter="dynamo"),
            "decoder": Part(
                "model.decoder",
                ids("tokens") | floats("encoder_hidden_states", 2, 6, 16),
                r".*self_attn\.(q_proj|v_proj)",
            ),
        },
    ),
    "t5": (
        t5,
        {
            "encoder": Part("encoder", ids("tokens"), r".*SelfAttention\.(q|v)"),
            "decoder": Part(
                "decoder",
                ids("tokens") | floats("encoder_hidden_states", 2, 6, 16),
                r".*SelfAttention\.(q|v)",
            ),
        },
    ),
    "clip": (
        clip,
        {
            "vision": Part("vision_model", floats("pixel_values", 2, 3, 8, 8)),
            "text": Part("text_model", ids()),
        },
    ),
    "llava": (
        llava,
        {
            "vision": Part("model.vision_tower", floats("image", 2, 3, 8, 8)),
            "language": Part("model.language_model", ids()),
        },
    ),
}


class Alone(nn.Module):
    """A part that takes its inputs in order and returns one tensor.

    The exporters name what is in a module by its attributes, so this one has the part's.
    """

    def __new__(cls, part: nn.Module, names: list[str]) -> nn.Module:
        """Return ``part`` with another ``forward``."""
        own = part.forward

        def forward(*values: torch.Tensor) -> torch.Tensor:
            given = dict(zip((MEANT.get(name, name) for name in names), values, strict=True))
            extra = {"use_cache": False} if "input_ids" in given else {}
            return own(**given, **extra, return_dict=True)[0]

        part.forward = forward
        return part


def compute(part: nn.Module, inputs: Tensors) -> np.ndarray:
    """Return what a part made ``Alone`` gives."""
    with torch.no_grad():
        return part(*inputs.values()).numpy()


def export(model: nn.Module, part: Part, path: Path) -> None:
    """Export a part from its root, without paths of this machine in it."""
    import onnx

    module = Alone(model.get_submodule(part.path), list(part.inputs))
    torch.onnx.export(
        module,
        tuple(part.inputs.values()),
        path,
        dynamo=part.exporter == "dynamo",
        input_names=list(part.inputs),
        output_names=["y"],
        **({"external_data": False, "verbose": False} if part.exporter == "dynamo" else {}),
    )
    proto = onnx.load(path)
    strip_stack_traces(proto)
    onnx.save(proto, path)


def build(make: nn.Module) -> nn.Module:
    """Return a model with random weights, the same every time."""
    torch.manual_seed(0)
    model = make().eval()
    for name, tensor in model.named_parameters():
        train(tensor, name, 0.3)
    return model


def adapted(model: nn.Module, part: Part) -> nn.Module:
    """Return a model with a LoRA of one part."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=f"{part.path}\\.{part.targets}")
    wrapped = get_peft_model(model, config).eval()
    for name, tensor in wrapped.named_parameters():
        if "lora_" in name:
            train(tensor, name, 0.5)
    return wrapped


def main() -> None:
    """Write everything."""
    clean_folder(FOLDER)
    for label, (make, parts) in MODELS.items():
        arrays = {}
        for name, part in parts.items():
            model = build(make)
            export(model, part, FOLDER / f"{label}.{name}.onnx")
            inputs = {f"input.{key}": value.numpy() for key, value in part.inputs.items()}
            arrays[name] = {
                **inputs,
                "base": compute(model.get_submodule(part.path), part.inputs),
            }
            for other, its in parts.items():
                if "dynamo" in other:
                    continue
                whole = adapted(build(make), its)
                if name == other:
                    whole.save_pretrained(FOLDER / f"{label}.{name}.adapter")
                    (FOLDER / f"{label}.{name}.adapter" / "README.md").unlink()
                alone = Alone(
                    whole.get_base_model().get_submodule(part.path), list(part.inputs)
                )
                arrays[name][f"adapter.{other}"] = compute(alone, part.inputs)
            np.savez_compressed(FOLDER / f"{label}.{name}.npz", **arrays[name])
    weights = {k: v.contiguous().clone() for k, v in build(whisper).state_dict().items()}
    save_file(weights, FOLDER / "whisper.safetensors")


if __name__ == "__main__":
    main()
