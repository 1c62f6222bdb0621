"""Weights that were saved in several files: `adapter_model-00001-of-00002.safetensors`.

An index beside them, `adapter_model.safetensors.index.json`, says which file has which tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onnx_adapt.checkpoints.readers.saved import read_state_dict
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

Shards = Mapping[str, Collection[str]]
"""The keys that each file must have, by the name of the file."""

_AGAIN = "download or save the adapter again: a part of it is missing"


def find_shards(folder: Path, names: Collection[str], whole: str) -> Shards:
    """The files that a file of weights was cut into.

    Args:
        folder: The folder.
        names: The names of its files.
        whole: What the file of weights would be called.

    Raises:
        CheckpointError: If one of them is not there, or the index is damaged.
    """
    index = f"{whole}.index.json"
    stem, _, suffix = whole.rpartition(".")
    pattern = re.compile(rf"{re.escape(stem)}-(\d+)-of-(\d+)\.{suffix}")
    cut = [match for name in names if (match := pattern.fullmatch(name))]
    if index in names:
        shards = _indexed(folder / index)
        told_by = index
    elif cut:
        digits, last = len(cut[0][1]), int(cut[0][2])
        if last > _MOST:
            raise CheckpointError(f"{folder / cut[0][0]} would be one of {last} files")
        numbers = (f"{n:0{digits}}" for n in range(1, last + 1))
        shards = {f"{stem}-{n}-of-{cut[0][2]}.{suffix}": () for n in numbers}
        told_by = cut[0][0]
    else:
        return {}
    if missing := [name for name in shards if name not in names]:
        raise CheckpointError(
            f"{folder} has {told_by}, and no {', '.join(missing[:_SHOWN])}", hint=_AGAIN
        )
    return shards


_MOST, _SHOWN = 10_000, 3


def _indexed(index: Path) -> Shards:
    """The files that an index names, with their keys."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and name and not re.search(r"[/\\]|^\.\.?$", name)
        for name in places.values()
    ):
        raise CheckpointError(
            f"{index} has no weight_map from tensors to files beside it", hint=_AGAIN
        )
    found: dict[str, list[str]] = {}
    for key, name in places.items():
        found.setdefault(name, []).append(key)
    return found


def read_shards(folder: Path, shards: Shards) -> dict[str, Array]:
    """Read the tensors of all shards.

    Raises:
        CheckpointError: If one is damaged, lacks a tensor, or has one of another as well.
    """
    tensors: dict[str, Array] = {}
    for name, keys in shards.items():
        found = read_state_dict(folder / name)
        if lacking := [key for key in keys if key not in found]:
            raise CheckpointError(
                f"{folder / name} has no {lacking[0]!r}, which the index says is in it",
                hint=_AGAIN,
            )
        if twice := tensors.keys() & found.keys():
            raise CheckpointError(f"{folder / name} has {min(twice)!r} of another file again")
        tensors |= found
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: If the file cannot be read, or is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data
