"""A checkpoint as its library saved it: configuration and tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnx_adapt.adapter.safetensors import read_tensors
from onnx_adapt.checkpoints.readers.headers import (
    is_safetensors,
    is_zip,
    no_weights,
    unreadable,
)
from onnx_adapt.checkpoints.readers.pickles import read_pickled_tensors
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError, CheckpointError
from onnx_adapt.model.payloads import Source
from onnx_adapt.model.signatures import HEAD


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What an adapter for image generation is for: several models at once.

    Attributes:
        parts: The parts of the pipeline that its modules are of, such as `unet`. Each module's
            path begins with its part; underscores in the path may stand for dots.
        base: The model that it was trained for, such as `SDXL`, or '' if that is not known.
    """

    parts: tuple[str, ...]
    base: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint as its library saved it, read into memory.

    Attributes:
        path: The folder or the file.
        library: Name of the library in `onnx_adapt.checkpoints.readers.table.READERS`.
        config: Its configuration: adapter_config.json, or what the library has instead.
        tensors: Its weights by key.
        head: Weights of a head saved beside the adapter, by key.
        head_config: The head's configuration.
        pipeline: What it is for, if it is an adapter for image generation.
    """

    path: Path
    library: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    head: Mapping[str, Array] = field(default_factory=dict)
    head_config: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Pipeline | None = None


def read_state_dict(path: Path) -> dict[str, Array]:
    """Read the tensors of a file of safetensors or of `torch.save`; its content tells which.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        Source.of(path)  # of a device there is no end
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    start = data[:HEAD]
    pickled = is_zip(start) or (path.suffix != ".safetensors" and not is_safetensors(start))
    try:
        return read_pickled_tensors(data, path) if pickled else read_tensors(data, path)
    except CheckpointError as error:
        raise no_weights(path, start, error) from error
    except AdapterError as error:
        damaged = CheckpointError(f"cannot read {path}: {error.message}")
        raise no_weights(path, start, damaged) from error


def refuse_damaged(saved: Saved) -> None:
    """Refuse a checkpoint with tensors that no training gives.

    Raises:
        CheckpointError: If a tensor is empty, or has NaN or infinity in it.
    """
    for key, value in (*saved.tensors.items(), *saved.head.items()):
        if value.shape == (0,):
            raise CheckpointError(
                f"{key!r} is empty: the checkpoint was saved under DeepSpeed ZeRO-3 or FSDP, "
                "where each process holds a part of the weights",
                hint="gather the weights before saving: deepspeed.zero.GatheredParameters, or "
                "FullyShardedDataParallel.summon_full_params",
            )
        if value.dtype.kind not in "biu" and not np.isfinite(value).all():
            raise CheckpointError(
                f"{key!r} holds NaN or infinity",
                hint="the training diverged; load an earlier one",
            )


def refuse_rank_zero(module: str, rank: int) -> None:
    """Refuse an update of a module that has rank 0.

    Raises:
        CheckpointError: If the rank is 0.
    """
    if not rank:
        raise CheckpointError(
            f"the update of module {module!r} has rank 0, so it changes nothing",
            hint="was the checkpoint saved under DeepSpeed ZeRO-3? Gather the weights before "
            "saving",
        )


def number(value: Any, name: str) -> float:
    """Read a finite number of a configuration.

    Raises:
        CheckpointError: If the value is no finite number.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
    ):
        raise CheckpointError(f"{name} is {value!r}, which is no number")
    return float(value)


_DAMAGE = (
    *(LookupError, ValueError, TypeError, AttributeError, ArithmeticError),
    StopIteration,  # `next` found no tensor of the kind a module has to have
)


@contextmanager
def name_damage(saved: Saved, module: str = "") -> Iterator[None]:
    """Turn the errors of code that reads a damaged checkpoint into one that names the damage.

    Raises:
        CheckpointError: If a tensor or setting is missing, or of a wrong kind.
    """
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGE as error:
        where = f"{saved.path}: {module!r}" if module else str(saved.path)
        if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
            raise CheckpointError(f"{where} has no {error.args[0]}") from error
        near = [key for key in saved.tensors if module and module in key]
        shown = ", ".join(f"{key} {list(saved.tensors[key].shape)}" for key in near[:4])
        raise CheckpointError(
            f"{where} is incomplete, or a setting or tensor of it is of a wrong kind"
            + (f"; it has {shown}" if shown else "")
        ) from error
