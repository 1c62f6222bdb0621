"""Recognise AdapterHub's AdapterFusion (`save_adapter_fusion`), which no slot computes."""

from __future__ import annotations

import re

from onnx_adapt.checkpoints.readers.files import Files
from onnx_adapt.errors import CheckpointError

_CONFIG = "adapter_fusion_config.json"
_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
_LAYER = re.compile(r"^(.*)\.adapter_fusion_layer\.")


def refuse_fusion(files: Files) -> None:
    """Refuse a folder with an AdapterFusion, and say of which adapters it is.

    Raises:
        CheckpointError: If it is one, or its files are damaged.
    """
    if _CONFIG not in files.names:
        return
    config = files.config(_CONFIG)
    names = config.get("adapter_names") or str(config.get("name") or "").split(",")
    tensors = files.tensors(_WEIGHTS, "give the folder that save_adapter_fusion wrote")
    places = {match[1] for key in tensors if (match := _LAYER.match(key))}
    raise CheckpointError(
        f"{files.path} is an AdapterFusion of {', '.join(map(str, names))} at {len(places)} "
        "places: it is attention over the outputs of several adapters at each of them, with a "
        "query from the layer, and no slot computes it",
        hint="insert one of the adapters, or blend them with fixed weights",
    )
