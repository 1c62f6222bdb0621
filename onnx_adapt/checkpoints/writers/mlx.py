"""Write adapters as MLX-LM loads them: LoRA and DoRA.

Source: `load_adapters` and `linear_to_lora_layers` of mlx_lm 0.32. Of a module it loads
`lora_a` `(in, r)`, `lora_b` `(r, out)` and DoRA's `m` `(out,)`; the rank and the scale are
the same for all modules, and `num_layers=-1` is all layers.
"""

from __future__ import annotations

import re

from onnx_adapt.checkpoints.edits import LowRank, SlotEdit
from onnx_adapt.checkpoints.writers.wanted import (
    Files,
    Wanted,
    config_file,
    padded_rank,
    refuse,
    tensor_file,
)
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_FILE = "adapters.safetensors"
_IN_LAYERS = re.compile(r"^.*?\.layers\.\d+\.(.+)$")


def write(wanted: Wanted) -> Files:
    """Write an adapter as the folder that MLX-LM loads.

    Raises:
        CheckpointError: If MLX-LM has no layer that computes one of its slots.
    """
    found = [(item, _low_rank(item)) for item in wanted.items]
    dora = [edit.magnitude is not None for _, edit in found]
    if any(dora) and not all(dora):
        one, other = found[dora.index(True)][0], found[dora.index(False)][0]
        raise CheckpointError(
            f"slot {one.slot!r} is DoRA and slot {other.slot!r} is not; an adapter of MLX-LM "
            "is DoRA in all its modules"
        )
    rank = max(len(edit.a) for _, edit in found)
    tensors: dict[str, Array] = {}
    keys: dict[str, None] = {}
    for _, edit in found:
        a, b = padded_rank(edit, rank)
        tensors |= {f"{edit.module}.lora_a": a.T, f"{edit.module}.lora_b": b.T}
        if edit.magnitude is not None:
            tensors[f"{edit.module}.m"] = edit.magnitude
        inside = _IN_LAYERS.match(edit.module)
        keys[inside[1] if inside else edit.module] = None
    config = {
        "fine_tune_type": "dora" if any(dora) else "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    return {"adapter_config.json": config_file(config), _FILE: tensor_file(tensors, _FILE)}


def _low_rank(item: SlotEdit) -> LowRank:
    """The LoRA of a slot.

    Raises:
        CheckpointError: If it is anything else, or has more than MLX-LM's.
    """
    edit = item.edit
    if not isinstance(edit, LowRank):
        raise refuse(item, "MLX-LM has LoRA and DoRA only")
    if item.layer == "conv":
        raise refuse(item, "MLX-LM has no LoRA on a convolution", "--to peft writes it")
    odd = {
        "a gate": edit.gate is not None,
        "a bias": edit.bias is not None,
        "a scale that covers the bias of the layer": edit.scales_bias,
    }
    for part, there in odd.items():
        if there:
            raise refuse(item, f"it has {part}, which MLX-LM's LoRA does not")
    return edit
