"""Read the single files of sd-scripts (kohya), LyCORIS, A1111 and ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.files import Files
from onnx_adapt.checkpoints.readers.image_keys import (
    has_prefix,
    module_of,
    parts_in,
    path_of,
    sort_tensors,
    tensor_of,
)
from onnx_adapt.checkpoints.readers.lycoris.table import module_edits
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.saved import (
    Pipeline,
    Saved,
    name_damage,
    read_state_dict,
)

_OWN = {
    *("lora_mid", "hada_w1_a", "lokr_w1", "lokr_w1_a", "oft_blocks", "diff", "w_norm"),
}
"""Tensors that tell these files, whatever their keys begin with."""


def is_kohya(files: Files) -> bool:
    """Whether a file has keys as sd-scripts, LyCORIS and ComfyUI write them."""
    if not files.file:
        return False
    keys = files.header(files.file).shapes
    return any(_is_own(key) for key in keys)


def _is_own(key: str) -> bool:
    known = tensor_of(key)
    if known is None or known[1] == "weight" or key.startswith("base_model."):
        return False  # a base's own weight; or PEFT's, which says nothing without its config
    return has_prefix(known[0]) or known[1] in _OWN or ".lora_down" in key


def read_kohya(files: Files) -> Saved:
    """Read such a file."""
    metadata = files.header(files.file).metadata
    tensors = read_state_dict(files.path)
    modules = {module_of(known[0]) for key in tensors if (known := tensor_of(key))}
    pipeline = Pipeline(parts_in(sorted(modules)), base_of(metadata, tensors))
    return Saved(files.path, "kohya", {}, tensors, pipeline=pipeline)


def kohya_edits(saved: Saved) -> list[Edit]:
    """Read what such a file asks for.

    Raises:
        CheckpointError: If a tensor is of no known kind, or of a wrong shape.
    """
    edits: list[Edit] = []
    for (part, module), tensors in sort_tensors(saved.tensors).items():
        path = path_of(part, module)
        with name_damage(saved, path):
            edits += module_edits(ModuleTensors(path, tensors, {}))
    return edits


_BASES = (
    (r"sdxl|stable-diffusion-xl|lora_te2_|_label_emb_|unet_input_blocks", "SDXL"),
    (r"sd3|stable-diffusion-3|joint_blocks", "Stable Diffusion 3"),
    (r"flux|double_blocks|single_transformer_blocks", "Flux"),
    (r"wan2|wan_", "Wan"),
    (r"sd_v2|stable-diffusion-v2", "Stable Diffusion 2"),
    (
        r"sd_v1|stable-diffusion-v1|lora_te_text_model|lora_unet_down_blocks",
        "Stable Diffusion",
    ),
)
"""What metadata or keys have of each base model, and what the base is called."""


def base_of(metadata: Mapping[str, str], keys: Iterable[str]) -> str:
    """The base model that a file was trained for, or ''."""
    names = ("ss_base_model_version", "modelspec.architecture")
    written = " ".join(metadata.get(name, "") for name in names)
    for text in (written, " ".join(keys)):
        for pattern, base in _BASES:
            if re.search(pattern, text):
                return base
    return ""
