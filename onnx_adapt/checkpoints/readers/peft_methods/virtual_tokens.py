"""Prefix tuning, CARTRIDGE, prompt tuning and P-tuning of PEFT: tokens that are trained.

All of them save one tensor, `prompt_embeddings`: what their encoder gives for each virtual
token. PEFT computes the encoder, if there is one, when it saves.
"""

from __future__ import annotations

from onnx_adapt.checkpoints.edits import VirtualTokens
from onnx_adapt.checkpoints.readers.peft_methods.tensors import checked
from onnx_adapt.checkpoints.readers.saved import Saved, number
from onnx_adapt.errors import CheckpointError

VIRTUAL_TOKENS = {
    "CARTRIDGE": True,
    "PREFIX_TUNING": True,
    "PROMPT_TUNING": False,
    "P_TUNING": False,
}
"""By `peft_type`, whether keys and values are trained, or the embeddings of the tokens."""

_TENSOR = "prompt_embeddings"


def virtual_tokens(saved: Saved) -> VirtualTokens:
    """Read the virtual tokens of a checkpoint.

    Raises:
        CheckpointError: If it is for an encoder with a decoder, or does not fit its settings.
    """
    config, kind = saved.config, str(saved.config["peft_type"])
    if config.get("num_transformer_submodules") not in (None, 1):
        raise CheckpointError(
            f"{kind} for an encoder with a decoder is not supported: it has virtual tokens in "
            "both",
            hint="train LoRA for this model instead",
        )
    if other := [key for key in saved.tensors if key != _TENSOR]:
        raise CheckpointError(
            f"the checkpoint has {other[0]!r} beside the virtual tokens of {kind}",
            hint="save the adapter again, without modules_to_save",
        )
    count, width = (_size(config.get(name), name) for name in _SIZES[:2])
    if not VIRTUAL_TOKENS[kind]:
        rows = checked(_TENSOR, saved.tensors[_TENSOR], count, width)
        return VirtualTokens(kind, rows)
    layers, heads = (_size(config.get(name), name) for name in _SIZES[2:])
    rows = checked(_TENSOR, saved.tensors[_TENSOR], count, layers * 2 * width)
    if width % heads:
        raise CheckpointError(f"token_dim {width} cannot be cut into {heads} heads")
    # As PEFT's get_prompt: (tokens, layers * 2, heads, size) with keys before values.
    states = rows.reshape(count, layers * 2, heads, width // heads).transpose(1, 2, 0, 3)
    return VirtualTokens(kind, rows, tuple(states[:, None]))


_SIZES = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")


def _size(value: object, name: str) -> int:
    """Read a size of a configuration."""
    size = number(value, name)
    if size < 1 or size != int(size):
        raise CheckpointError(f"{name} is {value!r}, which is no size")
    return int(size)
