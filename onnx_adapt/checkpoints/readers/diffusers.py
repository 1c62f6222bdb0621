"""Read LoRA of diffusers: `pytorch_lora_weights.safetensors`, of all of its versions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

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
from onnx_adapt.checkpoints.readers.kohya import base_of
from onnx_adapt.checkpoints.readers.lycoris.table import module_edits
from onnx_adapt.checkpoints.readers.peft import peft_edits
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.saved import (
    Pipeline,
    Saved,
    name_damage,
    read_state_dict,
)
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_METADATA = "lora_adapter_metadata"


def is_diffusers(files: Files) -> bool:
    """Whether a file is a LoRA of diffusers, or a folder has one."""
    if files.first(WEIGHTS) is not None:
        return True
    if not files.file:
        return False
    header = files.header(files.file)
    return _METADATA in header.metadata or any(map(_is_own, header.shapes))


def _is_own(key: str) -> bool:
    """Whether a key begins with a part of a pipeline, dots and all, and is LoRA's."""
    known = tensor_of(key)
    if known is None or known[1] not in ("lora_down", "lora_up") or ".lora_down" in key:
        return False
    dotted = not key.startswith(("lora_", "lycoris_")) and "diffusion_model." not in key
    return dotted and (has_prefix(known[0]) or _BEFORE_PEFT.search(key) is not None)


_BEFORE_PEFT = re.compile(r"[._]lora\.(down|up)\.|\.lora_linear_layer\.")
"""What only diffusers wrote, before it used PEFT; then the part could be missing."""


def read_diffusers(files: Files) -> Saved:
    """Read such a file, and the settings in its metadata."""
    path = files.first(WEIGHTS) or files.path
    header = files.header(path.name)
    tensors = read_state_dict(path)
    modules = [_module(known[0]) for key in tensors if (known := tensor_of(key))]
    pipeline = Pipeline(parts_in(modules), base_of(header.metadata, tensors))
    settings = _settings(header.metadata.get(_METADATA, "{}"))
    return Saved(files.path, "diffusers", settings, tensors, pipeline=pipeline)


def _settings(text: str) -> dict[str, Any]:
    """The settings in a file's metadata: PEFT's, each after the part of the pipeline."""
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"its metadata has {_METADATA} that is no JSON: {error}"
        ) from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"its metadata has {_METADATA} that is no JSON object")
    return settings


def _module(path: str) -> tuple[str, str]:
    """Part and module of a path; before parts were written, all was of the U-Net."""
    part, module = module_of(path)
    return part or "unet", module


def diffusers_edits(saved: Saved) -> list[Edit]:
    """Read what such a file asks for.

    Raises:
        CheckpointError: If a tensor is of no known kind, or of a wrong shape.
    """
    known: dict[str, dict[str, Array]] = {}
    edits: list[Edit] = []
    for (part, module), tensors in sort_tensors(saved.tensors).items():
        part = part or "unet"
        config = _of_part(saved.config, part)
        if config and "alpha" not in tensors:
            known.setdefault(part, {}).update(_as_peft(module, tensors))
            continue
        path = path_of(part, module)
        with name_damage(saved, path):
            edits += module_edits(ModuleTensors(path, tensors, {}))
    for part, tensors in known.items():
        edits += _with_settings(saved, part, _of_part(saved.config, part), tensors)
    return edits


def _of_part(settings: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The settings of one part, without its name."""
    begin = f"{part}."
    return {k.removeprefix(begin): v for k, v in settings.items() if k.startswith(begin)}


_PEFT_NAMES = {
    "lora_down": "lora_A.weight",
    "lora_up": "lora_B.weight",
    "lora_up.bias": "lora_B.bias",
    "dora_scale": "lora_magnitude_vector",
}


def _as_peft(module: str, tensors: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    for name, value in tensors.items():
        yield f"base_model.model.{module}.{_PEFT_NAMES.get(name, name)}", value


def _with_settings(
    saved: Saved, part: str, config: Mapping[str, Any], tensors: Mapping[str, Array]
) -> Iterator[Edit]:
    """What PEFT's tensors of one part ask for, by PEFT's settings for it."""
    inner = Saved(saved.path, "peft", {"peft_type": "LORA", **config}, tensors)
    for edit in peft_edits(inner):
        yield replace(edit, module=path_of(part, edit.module))
