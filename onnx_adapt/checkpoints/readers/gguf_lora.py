"""Read LoRA for llama.cpp: a GGUF file whose `general.type` is `adapter`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.factors import low_rank, refuse_others, sort_by_module
from onnx_adapt.checkpoints.readers.files import Files
from onnx_adapt.checkpoints.readers.gguf_file import MAGIC, TensorPlace, read_gguf_header
from onnx_adapt.checkpoints.readers.head_rows import count_heads, halves_of_pairs
from onnx_adapt.checkpoints.readers.optional import optional_library
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage, number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError, reason

_BASE = "base"
_ENDINGS = {".weight.lora_a": "lora_a", ".weight.lora_b": "lora_b"}
_BLOCK = re.compile(r"^blk\.(?P<layer>\d+)\.(?P<tensor>\w+)$")


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What Hugging Face calls the tensors of one of llama.cpp's architectures.

    Attributes:
        layer: The path of a layer, with its number as `{}`.
        tensors: The module in a layer for each tensor of a block.
        whole: The module for each tensor outside of the blocks.
        paired: Whether llama.cpp keeps the rows of query and key in pairs.
    """

    layer: str
    tensors: Mapping[str, str]
    whole: Mapping[str, str]
    paired: bool = False


_LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI3 = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_BERT = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
}
_EMBEDDING = {"token_embd": "model.embed_tokens"}
_HEAD = {**_EMBEDDING, "output": "lm_head"}

ARCHITECTURES = {
    **dict.fromkeys(
        ("llama", "granite", "olmo", "smollm3"),
        _Architecture("model.layers.{}", _LLAMA, _HEAD, True),
    ),
    **dict.fromkeys(
        ("qwen2", "qwen3", "gemma3", "olmo2", "stablelm", "exaone4", "seed_oss"),
        _Architecture("model.layers.{}", _LLAMA, _HEAD),
    ),
    **dict.fromkeys(("gemma", "gemma2"), _Architecture("model.layers.{}", _LLAMA, _EMBEDDING)),
    "phi3": _Architecture("model.layers.{}", _PHI3, _HEAD),
    "bert": _Architecture(
        "encoder.layer.{}", _BERT, {"token_embd": "embeddings.word_embeddings"}
    ),
}
"""Architectures by `general.architecture`."""


def is_gguf(files: Files) -> bool:
    """Whether files are a GGUF file, or a folder with one and no other adapter."""
    return _file(files) is not None


def _file(files: Files) -> Path | None:
    """The GGUF file among files: by its name in a folder, by its first bytes alone."""
    if not files.is_folder:
        return files.path if files.header(files.file).start[:4] == MAGIC else None
    found = [name for name in sorted(files.names) if name.endswith(".gguf")]
    if len(found) > 1:
        raise CheckpointError(
            f"{files.path} has several GGUF files: {', '.join(found)}",
            hint="give the file of the adapter, or a folder with it alone",
        )
    return files.at(found[0]) if found else None


def read_gguf(files: Files) -> Saved:
    """Read a GGUF file, and the base's config.json if it is beside it in the folder.

    Raises:
        CheckpointError: If it is damaged or no adapter, or the package gguf is missing.
    """
    path = _file(files)
    assert path is not None  # is_gguf
    library = optional_library("gguf", "gguf", str(path))
    try:
        data = memoryview(path.read_bytes())
        settings, places = read_gguf_header(data)
        tensors = {name: _dequantised(library, data, place) for name, place in places.items()}
    except (ValueError, LookupError, TypeError, OSError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is a damaged GGUF file: {reason(error)}", hint="convert the adapter again"
        ) from error
    if settings.get("general.type") != "adapter" or settings.get("adapter.type") != "lora":
        raise CheckpointError(
            f"{path} is a GGUF file of a {settings.get('general.type') or 'model'}, no LoRA",
            hint="give the file that convert_lora_to_gguf.py (llama.cpp) wrote",
        )
    return Saved(files.path, "gguf", {**settings, _BASE: files.config("config.json")}, tensors)


def _dequantised(library: Any, data: memoryview, place: TensorPlace) -> Array:
    """The numbers of a tensor of any type that the package knows, as float32."""
    kind = library.GGMLQuantizationType(place.kind)
    shape = library.quant_shape_to_byte_shape(place.shape, kind)
    raw = np.frombuffer(data[place.start : place.start + math.prod(shape)], np.uint8)
    return np.array(library.dequantize(raw.reshape(shape), kind), np.float32)


def gguf_edits(saved: Saved) -> list[Edit]:
    """Read what LoRA for llama.cpp asks for.

    Raises:
        CheckpointError: If the architecture or a tensor is not supported, or the number of
            heads is needed and not known.
    """
    config = saved.config
    kind = str(config.get("general.architecture"))
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF LoRA for the architecture {kind!r} is not supported",
            hint=f"supported are {', '.join(ARCHITECTURES)}; give the adapter that was "
            "converted to GGUF instead",
        )
    if "adapter.alora.invocation_tokens" in config:
        raise CheckpointError(
            "the adapter is on from its invocation tokens on (aLoRA), which are not read from "
            "GGUF",
            hint="give the folder of PEFT that was converted to GGUF",
        )
    modules, others = sort_by_module(saved.tensors, _ENDINGS)
    refuse_others(others, "lora_a and lora_b of a weight")
    alpha = number(config["adapter.lora.alpha"], "adapter.lora.alpha")
    edits: list[Edit] = []
    for tensor, parts in modules.items():
        with name_damage(saved, tensor):
            a, b = parts["lora_a"], parts["lora_b"]
            # llama.cpp takes 0 for a scale of 1 (llama_adapter_lora_weight::get_scale).
            scale = alpha / max(b.shape[-1], 1) if alpha else 1.0
            path = _path(tensor, kind)
            if tensor == "token_embd":
                a = a.T
            if ARCHITECTURES[kind].paired and tensor.endswith(("attn_q", "attn_k")):
                b = halves_of_pairs(b, _heads(saved, path))
            edits.append(low_rank(path, a, b, scale))
    return edits


def _path(tensor: str, kind: str) -> str:
    """Hugging Face's path of the module whose weight a tensor changes."""
    names = ARCHITECTURES[kind]
    match = _BLOCK.match(tensor)
    if match and match["tensor"] in names.tensors:
        return f"{names.layer.format(match['layer'])}.{names.tensors[match['tensor']]}"
    if tensor in names.whole:
        return names.whole[tensor]
    raise CheckpointError(
        f"GGUF LoRA of the tensor {tensor!r} is not supported for {kind!r}",
        hint=f"blk.N of {', '.join(names.tensors)} is, and {', '.join(names.whole)}",
    )


def _heads(saved: Saved, path: str) -> int:
    base = saved.config[_BASE]
    if not base:
        raise CheckpointError(
            f"llama.cpp keeps the rows of {path!r} in another order than the graph, and the "
            "GGUF file does not say how many heads it has",
            hint="put the base's config.json (num_attention_heads, num_key_value_heads) "
            "beside the GGUF file in a folder, and give the folder",
        )
    return count_heads(base, path)
