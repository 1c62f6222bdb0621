"""LoRA, rsLoRA, DoRA and IA3 of PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, LowRank, Scaling
from onnx_adapt.checkpoints.readers.peft_methods.lora_variants import variant_of
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.peft_methods.tokens import TOKEN_ROWS, token_edits
from onnx_adapt.checkpoints.readers.peft_settings import is_match, scale_of
from onnx_adapt.errors import CheckpointError

_SETTINGS = {"use_dora": "a lora_magnitude_vector", "lora_bias": "a lora_B.bias"}


def lora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LoRA, rsLoRA and DoRA, and the variants of LoRA that a setting turns on."""
    module, parts, config = found.module, found.parts, found.config
    if TOKEN_ROWS in parts:
        yield from token_edits(found)
        return
    names = ("lora_A", "lora_B")
    if "lora_embedding_A" in parts:
        names = ("lora_embedding_A", "lora_embedding_B")
    if any(name not in parts for name in names):
        raise CheckpointError(f"module {module!r} has {', '.join(parts)}, not {names}")
    a, b = (parts[name] for name in names)
    magnitude = parts.get("lora_magnitude_vector")
    bias = parts.get("lora_B.bias")
    for setting, part in (("use_dora", magnitude), ("lora_bias", bias)):
        if config.get(setting) and (part is None or part.size != b.shape[0]):
            shown = "none" if part is None else list(part.shape)
            raise CheckpointError(
                f"module {module!r}: {setting} is set, which needs {_SETTINGS[setting]} of "
                f"{b.shape[0]} numbers; the checkpoint has {shown}"
            )
    scale = scale_of(module, a.shape[0], config)
    edit = LowRank(
        module,
        a.astype(np.float64),
        b.astype(np.float64),
        scale,
        bias=bias,
        magnitude=None if magnitude is None else magnitude.reshape(-1),
        norm_scale=scale,
    )
    yield variant_of(edit, found)


def ia3_edits(found: ModuleTensors) -> Iterator[Edit]:
    """IA3: the input or the output of a module is multiplied by a vector."""
    module, parts, config = found.module, found.parts, found.config
    vector = parts["ia3_l"]
    if vector.ndim < 2 or vector.size != max(vector.shape):
        raise CheckpointError(
            f"module {module!r}: ia3_l has shape {list(vector.shape)}, which is neither "
            "(1, in) nor (out, 1)"
        )
    on_input = vector.shape[0] == 1  # (1, in) scales the input, (out, 1) the output
    if vector.size == 1 or vector.ndim > 2:  # of convolutions both are (1, n, 1, ...)
        on_input = _is_feedforward(module, config.get("feedforward_modules") or [])
    yield Scaling(module, vector.reshape(-1), on_input)


def _is_feedforward(module: str, named: Any) -> bool:
    """Whether PEFT scales a module's input: by the end of its name, or by a pattern."""
    if isinstance(named, str):
        return is_match(named, named, module, "feedforward_modules")
    return any(module.endswith(name) for name in named)
