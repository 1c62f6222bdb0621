"""Read adapters in torchtune's own form; what it saves for PEFT is PEFT's form."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.by_keys import file_by_keys, tensors_by_keys
from onnx_adapt.checkpoints.readers.factors import low_rank, refuse_others, sort_by_module
from onnx_adapt.checkpoints.readers.files import PEFT_WEIGHTS, Files
from onnx_adapt.checkpoints.readers.head_rows import count_heads, halves_of_pairs
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage, number
from onnx_adapt.errors import CheckpointError

BASE = "base"
"""The key of the base's config.json in the configuration of what was read."""

_ENDINGS = {".lora_a.weight": "lora_a", ".lora_b.weight": "lora_b", ".magnitude": "magnitude"}
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
"""torchtune's modules in a layer and Hugging Face's (torchtune/models/convert_weights.py)."""

_PAIRED = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}
"""Whether torchtune keeps the rows of query and key in pairs, by the base's `model_type`."""

_LAYER = re.compile(r"^layers\.(?P<layer>\d+)\.(?P<module>.+)$")
_OWN_KEY = re.compile(r"^layers\.\d+\.(attn|mlp)\.\w+\.lora_a\.weight$")


def _fits(keys: Collection[str]) -> bool:
    return any(_OWN_KEY.match(key) for key in keys)


def is_torchtune(files: Files) -> bool:
    """Whether files are torchtune's own form; beside PEFT's weights it is a copy of them."""
    return not files.first(PEFT_WEIGHTS) and file_by_keys(files, _fits) != ""


def read_torchtune(files: Files) -> Saved:
    """Read an adapter that torchtune saved, with what its folder says of it and its base.

    Raises:
        CheckpointError: If a file is damaged.
    """
    config = {**files.config(), BASE: files.config("config.json")}
    return Saved(files.path, "torchtune", config, tensors_by_keys(files, _fits))


def torchtune_edits(saved: Saved) -> list[Edit]:
    """Read what an adapter in torchtune's own form asks for.

    Raises:
        CheckpointError: If its configuration does not say alpha, or the base's does not say
            what order the rows of its queries and keys are in.
    """
    modules, others = sort_by_module(saved.tensors, _ENDINGS)
    refuse_others(others, "lora_a, lora_b and magnitude of a module")
    alpha = _alpha(saved)
    edits: list[Edit] = []
    for module, parts in modules.items():
        with name_damage(saved, module):
            path, a = _path(module), parts["lora_a"]
            b, magnitude = parts["lora_b"], parts.get("magnitude")
            if path.endswith(("q_proj", "k_proj")) and (heads := _paired_heads(saved, path)):
                b = halves_of_pairs(b, heads)
                magnitude = None if magnitude is None else halves_of_pairs(magnitude, heads)
            edits.append(low_rank(path, a, b, alpha / max(len(a), 1), magnitude=magnitude))
    return edits


def _alpha(saved: Saved) -> float:
    if "lora_alpha" not in saved.config:
        raise CheckpointError(
            f"{saved.path} has no lora_alpha: torchtune's weights alone do not say the scale",
            hint="put the adapter_config.json that torchtune wrote beside them, or one with "
            '{"lora_alpha": 16}, and give the folder',
        )
    return number(saved.config["lora_alpha"], "lora_alpha")


def _path(module: str) -> str:
    """Hugging Face's path of one of torchtune's modules."""
    if module == "output":
        return "lm_head"
    match = _LAYER.match(module)
    if match is None or match["module"] not in _MODULES:
        raise CheckpointError(
            f"torchtune's module {module!r} is not supported",
            hint="modules of language models are: layers.N.attn and layers.N.mlp, output",
        )
    return f"model.layers.{match['layer']}.{_MODULES[match['module']]}"


def _paired_heads(saved: Saved, path: str) -> int:
    """The number of heads whose rows are in pairs; 0 if they are in Hugging Face's order."""
    base: Mapping[str, Any] = saved.config.get(BASE) or {}
    kind = base.get("model_type")
    if kind is None:
        raise CheckpointError(
            f"torchtune keeps the rows of {path!r} in another order than the graph, and the "
            "number of its heads is not known",
            hint="put the base's config.json (num_attention_heads, num_key_value_heads, "
            "model_type) beside the adapter; torchtune copies it there",
        )
    if kind not in _PAIRED:
        raise CheckpointError(
            f"torchtune's own form of an adapter for model_type {kind!r} is not supported",
            hint=f"supported are {', '.join(_PAIRED)}",
        )
    return count_heads(base, path) if _PAIRED[kind] else 0
