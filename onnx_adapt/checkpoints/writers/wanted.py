"""What is to be written for a library, and the files that it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_adapt.adapter.safetensors import write_tensors
from onnx_adapt.checkpoints.edits import (
    KEEP,
    Bottleneck,
    Coupling,
    Edit,
    LowRank,
    Replacement,
    Scaling,
    SlotEdit,
)
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Wanted:
    """An adapter that is to be written for a library.

    Attributes:
        name: What it is called.
        items: What its slots ask for; the scale of LoRA is in B, and is 1.
        modules: The paths of the modules of the graph.
        invocation_tokens: The tokens that switch it on (aLoRA), or none.
    """

    name: str
    items: Sequence[SlotEdit]
    modules: Sequence[str] = ()
    invocation_tokens: tuple[int, ...] = ()


Files = dict[str, bytes]
"""The content of each file by its name."""

_CALLED: dict[type, str] = {
    LowRank: "LoRA",
    Scaling: "a scale (IA3)",
    Bottleneck: "a bottleneck",
    Coupling: "an invertible adapter",
    Replacement: "a trained weight of the base",
}


def called(edit: Edit) -> str:
    """What to call an edit in a message."""
    return _CALLED[type(edit)]


def refuse(item: SlotEdit, reason: str, hint: str = KEEP) -> CheckpointError:
    """The error for a slot that a library cannot express."""
    return CheckpointError(f"slot {item.slot!r} is {called(item.edit)}: {reason}", hint=hint)


def tensor_file(tensors: Mapping[str, Array], name: str) -> bytes:
    """Encode tensors as a safetensors file in float32, as PyTorch's tools read it.

    Raises:
        CheckpointError: If a value passes what float32 holds.
    """
    narrow = {}
    for key, value in tensors.items():
        with np.errstate(over="ignore"):
            narrow[key] = np.ascontiguousarray(value, np.float32)
        if not np.isfinite(narrow[key]).all():
            raise CheckpointError(f"{key!r} holds NaN, infinity or what passes float32")
    return write_tensors(narrow, Path(name), {"format": "pt"})


def config_file(config: Mapping[str, Any]) -> bytes:
    """Encode a configuration as JSON."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def padded_rank(edit: LowRank, rank: int) -> tuple[Array, Array]:
    """A and B of a rank, with zeros for what is beyond their own."""
    more = rank - len(edit.a)
    a = np.pad(edit.a, [(0, more), *[(0, 0)] * (edit.a.ndim - 1)])
    b = np.pad(edit.b, [(0, 0), (0, more), *[(0, 0)] * (edit.b.ndim - 2)])
    return a, b
