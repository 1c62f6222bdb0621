"""Write adapters as AdapterHub's `adapters` loads them: bottlenecks, LoRA, DoRA and IA3."""

from __future__ import annotations

from typing import Any

from onnx_adapt.checkpoints.edits import (
    Bottleneck,
    Coupling,
    LowRank,
    Replacement,
    Scaling,
    SlotEdit,
)
from onnx_adapt.checkpoints.writers.adapterhub_bottlenecks import write_bottlenecks
from onnx_adapt.checkpoints.writers.adapterhub_lora import write_lora
from onnx_adapt.checkpoints.writers.adapterhub_models import ModelKind, model_kind
from onnx_adapt.checkpoints.writers.wanted import (
    Files,
    Wanted,
    called,
    config_file,
    refuse,
    tensor_file,
)
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_FILE = "adapter.safetensors"
_HEAD = "model_head.safetensors"
_VERSION = "adapters.1.3.0"
"""The release whose form is written; those before 1.1 ignored alpha."""


def write(wanted: Wanted) -> Files:
    """Write an adapter as the folder that AdapterHub loads.

    A trained head is written without a head_config.json, so that the library loads it into
    any model class that has its modules.

    Raises:
        CheckpointError: If AdapterHub has nothing that computes one of the slots.
    """
    kind = model_kind(wanted)
    layers = [i for i in wanted.items if isinstance(i.edit, Bottleneck | Coupling)]
    products = [i for i in wanted.items if isinstance(i.edit, LowRank | Scaling)]
    head = [i for i in wanted.items if isinstance(i.edit, Replacement)]
    if layers and products:
        one, other = layers[0], products[0]
        raise CheckpointError(
            f"slot {one.slot!r} is {called(one.edit)} and slot {other.slot!r} is "
            f"{called(other.edit)}; an adapter of AdapterHub is saved with one of them",
            hint="train them as two adapters, and stack these",
        )
    if not layers and not products:
        raise CheckpointError(
            "the adapter has only trained weights of the base, and AdapterHub saves none "
            "without an adapter",
            hint="--to peft writes them if there is LoRA as well",
        )
    made = write_bottlenecks if layers else write_lora
    tensors, config, hidden = made(layers or products, kind, wanted.name)
    files = {
        "adapter_config.json": config_file(_config(wanted, kind, config, hidden)),
        _FILE: tensor_file(tensors, _FILE),
    }
    if head:
        files[_HEAD] = tensor_file(_head(head, kind), _HEAD)
    return files


def _config(
    wanted: Wanted, kind: ModelKind, config: dict[str, Any], hidden: int
) -> dict[str, Any]:
    return {
        "config": config,
        "hidden_size": hidden,
        "model_class": "",
        "model_name": "",
        "model_type": kind.name,
        "name": wanted.name,
        "version": _VERSION,
    }


def _head(items: list[SlotEdit], kind: ModelKind) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for item in items:
        edit = item.edit
        assert isinstance(edit, Replacement)
        if kind.is_inside(edit.module):
            raise refuse(item, "AdapterHub saves trained weights of a head only")
        tensors[f"{edit.module}.{edit.parameter}"] = edit.value
    return tensors
