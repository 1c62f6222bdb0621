"""Read LoRA that KerasHub saved with `save_lora_weights`: a file `*.lora.h5`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.factors import low_rank
from onnx_adapt.checkpoints.readers.files import CONFIG, Files
from onnx_adapt.checkpoints.readers.optional import optional_library
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import CheckpointError, reason

_A, _B = "lora_kernel_a", "lora_kernel_b"
_EXPANSION = 64
"""A tensor may take this many times the file's size: HDF5 can leave out what is zero."""


def is_keras_hub(files: Files) -> bool:
    """Whether files are a LoRA of KerasHub, which keeps it in a file of this name."""
    return _file(files) is not None


def _file(files: Files) -> Path | None:
    found = [name for name in sorted(files.names) if name.endswith(".lora.h5")]
    if len(found) > 1:
        raise CheckpointError(
            f"{files.path} has several files of LoRA: {', '.join(found)}",
            hint="give a folder with one of them",
        )
    return files.at(found[0]) if found else None


def read_keras_hub(files: Files) -> Saved:
    """Read a file of LoRA, and the names of its layers beside it.

    Raises:
        CheckpointError: If the file is damaged, or h5py is not installed.
    """
    path = _file(files)
    assert path is not None  # is_keras_hub
    h5py = optional_library("h5py", "keras", str(path))
    tensors: dict[str, Array] = {}
    largest = _EXPANSION * path.stat().st_size
    try:
        with h5py.File(path, "r") as file:
            for layer in file["lora"]:
                for part in (_A, _B):
                    key = f"lora/{layer}/vars/{part}"
                    if layer != "vars" and key in file:
                        tensors[f"{layer}.{part}"] = _values(h5py, file[key], largest)
    except (OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is a damaged file of LoRA: {reason(error)}",
            hint="save it again with Keras",
        ) from error
    return Saved(files.path, "keras_hub", files.config(), tensors)


def _values(h5py: Any, dataset: Any, largest: int) -> Array:
    """The values of a dataset; Keras keeps bfloat16 as two raw bytes for each number."""
    if not isinstance(dataset, h5py.Dataset) or dataset.external:
        raise ValueError(f"{dataset.name} is no tensor of this file")
    if math.prod(dataset.shape) * dataset.dtype.itemsize > largest:
        raise ValueError(f"{dataset.name} is far larger than the file: {dataset.shape}")
    values = np.asarray(dataset[()])
    return values.view(DTYPES["bfloat16"]) if values.dtype.kind == "V" else values


def keras_hub_edits(saved: Saved) -> list[Edit]:
    """Read what LoRA of KerasHub asks for; its scale is 1 (`Backbone.enable_lora`).

    Raises:
        CheckpointError: If the configuration does not name the layers.
    """
    numbers = list(dict.fromkeys(key.partition(".")[0] for key in saved.tensors))
    if not numbers:
        raise CheckpointError(f"{saved.path} has no LoRA in it")
    modules = saved.config.get("modules")
    named: Mapping[str, Any] = modules if isinstance(modules, dict) else {}
    if missing := [number for number in numbers if not isinstance(named.get(number), str)]:
        raise CheckpointError(
            f"{saved.path} calls its layers {', '.join(missing[:4])}, ...: KerasHub saves "
            "their numbers alone",
            hint=f"put a file {CONFIG} beside it that gives the module of each in PyTorch, "
            f'{{"modules": {{"{missing[0]}": "model.layers.0.self_attn.q_proj", ...}}}}, and '
            "give the folder; docs/checkpoints.md has the lines that list the layers",
        )
    edits: list[Edit] = []
    for number in numbers:
        with name_damage(saved, number):
            a, b = (saved.tensors[f"{number}.{part}"] for part in (_A, _B))
            edits.append(low_rank(named[number], *_factors(a, b), 1.0))
    return edits


# The kernel of an EinsumDense has three axes, and LoRA's `a` has all but the last of them. An
# output projection (heads, size, width) reads all heads, so `a` (heads, size, r) is one matrix
# over heads * size inputs. A query (width, heads, size) has an `a` (width, heads, r) with
# columns for each head, and `b` (r, size) in common. With two heads of rank 1 and b = [p, q]
# the query's update is of rank 2:
#
#     A = [a of head 0, a of head 1]     B = p 0      (out = heads * size rows)
#                                            q 0
#                                            0 p
#                                            0 q
#
# The width is larger than the number of heads and than their size, which tells the two apart.


def _factors(a: Array, b: Array) -> tuple[Array, Array]:
    """A `(r, in)` and B `(out, r)` of a kernel's factors, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if a.ndim == 2:
        return a.T, b.T
    if a.ndim != 3 or b.ndim != 2 or a.shape[2] != len(b):
        raise CheckpointError(f"the factors have shapes {list(a.shape)} and {list(b.shape)}")
    if b.shape[1] > a.shape[0]:
        return a.reshape(-1, a.shape[2]).T, b.T
    return a.reshape(len(a), -1).T, np.kron(np.eye(a.shape[1]), b.T)
