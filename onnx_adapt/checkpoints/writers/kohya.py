"""Write adapters as one file of kohya's sd-scripts, which ComfyUI and A1111 load.

The path of a module has underscores for dots behind the name of the model that it is in, and
`alpha` is the rank, because the scale is in `lora_up`:

    down_blocks.0.attn.to_q  ->  lora_unet_down_blocks_0_attn_to_q.lora_down.weight (r, in)
                                 lora_unet_down_blocks_0_attn_to_q.lora_up.weight   (out, r)
                                 lora_unet_down_blocks_0_attn_to_q.alpha            ()

DoRA has `dora_scale` `(out, 1)`, which LyCORIS and ComfyUI read as the norms of the rows.
"""

from __future__ import annotations

import re

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank, SlotEdit
from onnx_adapt.checkpoints.writers.wanted import Files, Wanted, refuse, tensor_file
from onnx_adapt.dtypes import Array

_MODELS = {
    r"lora_[a-z0-9]+[._]": "",  # the user has given the whole name with --map
    r"text_model\.": "lora_te_",
    r"(down_blocks|mid_block|up_blocks|time_embedding|conv_in|conv_out)\b": "lora_unet_",
    r"(single_)?transformer_blocks\b": "lora_unet_",
    r"(double|single)_blocks\b": "lora_unet_",
}
"""What the paths of a model's modules begin with, and what kohya puts before them."""


def write(wanted: Wanted) -> Files:
    """Write an adapter as one file; its name is the adapter's.

    Raises:
        CheckpointError: If a slot is no LoRA, or in no model that kohya's files are for.
    """
    tensors: dict[str, Array] = {}
    for item in wanted.items:
        edit = _low_rank(item)
        name = f"{_prefix(item)}{edit.module.replace('.', '_')}"
        if f"{name}.alpha" in tensors:
            raise refuse(item, f"{name!r} is also the name of another module in such a file")
        tensors |= {
            f"{name}.lora_down.weight": edit.a,
            f"{name}.lora_up.weight": edit.b,
            f"{name}.alpha": np.array(float(len(edit.a))),
        }
        if edit.magnitude is not None:
            ones = (1,) * (edit.a.ndim - 1)
            tensors[f"{name}.dora_scale"] = edit.magnitude.reshape(-1, *ones)
    file = f"{wanted.name}.safetensors"
    return {file: tensor_file(tensors, file)}


def _prefix(item: SlotEdit) -> str:
    """What stands before a module's path: the model that it is in.

    Raises:
        CheckpointError: If it is in none that kohya's files are for.
    """
    for beginning, prefix in _MODELS.items():
        if re.match(beginning, item.edit.module):
            return prefix
    raise refuse(
        item,
        f"module {item.edit.module!r} is in no UNet or text encoder, and kohya's files are "
        "for those",
        "--map OLD=lora_te2.OLD names the model that the file is for; --to peft writes all",
    )


def _low_rank(item: SlotEdit) -> LowRank:
    """The LoRA of a slot.

    Raises:
        CheckpointError: If it is anything else, or has more than LoRA of kohya.
    """
    edit = item.edit
    if not isinstance(edit, LowRank):
        raise refuse(item, "kohya's files have LoRA only")
    if item.layer == "embedding":
        raise refuse(item, "kohya's files have no LoRA on an embedding")
    odd = {
        "a gate": edit.gate is not None,
        "a bias": edit.bias is not None,
        "a scale that covers the bias of the layer": edit.scales_bias,
    }
    for part, there in odd.items():
        if there:
            raise refuse(item, f"it has {part}, which kohya's files do not")
    return edit
