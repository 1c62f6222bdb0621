"""The table of checkpoint readers: how to recognise each library's folder, and to read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.adapterhub import adapterhub_edits
from onnx_adapt.checkpoints.readers.folder import Folder, name_damage, read_state_dict
from onnx_adapt.checkpoints.readers.peft import peft_edits
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.words import beside

_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Reader:
    """How the checkpoints of one library are recognised and read.

    Attributes:
        label: What the library is called in messages.
        recognises: Whether an `adapter_config.json` is this library's.
        mark: What only this library writes there, in words.
        saver: The function that writes such a folder.
        weights: Names of the file with the weights; the first that is there counts.
        edits: What a folder asks for.
        head: Names of the file with a head that was saved beside the adapter.
        head_config: Name of the file with the head's configuration.
    """

    label: str
    recognises: Callable[[Mapping[str, Any]], bool]
    mark: str
    saver: str
    weights: tuple[str, ...]
    edits: Callable[[Folder], list[Edit]]
    head: tuple[str, ...] = ()
    head_config: str = ""


def _has_settings(config: Mapping[str, Any]) -> bool:
    settings = config.get("config")
    return isinstance(settings, dict) and bool(settings)


READERS: dict[str, Reader] = {
    "peft": Reader(
        label="PEFT",
        recognises=lambda config: "peft_type" in config,
        mark="`peft_type`",
        saver="save_pretrained",
        weights=("adapter_model.safetensors", "adapter_model.bin"),
        edits=peft_edits,
    ),
    "adapterhub": Reader(
        label="AdapterHub",
        recognises=_has_settings,
        mark="a `config` with settings",
        saver="save_adapter",
        weights=("adapter.safetensors", "pytorch_adapter.bin"),
        edits=adapterhub_edits,
        head=("model_head.safetensors", "pytorch_model_head.bin"),
        head_config="head_config.json",
    ),
}
"""Every library whose checkpoints can be read; the first that recognises a folder reads it."""


def read_edits(folder: Folder) -> list[Edit]:
    """Read what a checkpoint asks for.

    Raises:
        CheckpointError: If the method or a setting is not supported, or files are damaged.
    """
    with name_damage(folder):
        return READERS[folder.library].edits(folder)


def read_folder(path: Path) -> Folder:
    """Read a checkpoint folder.

    Raises:
        CheckpointError: If it is not one, or its files are damaged.
    """
    _require_config(path)
    config = _read_json(path / _CONFIG)
    library = next((name for name, row in READERS.items() if row.recognises(config)), "")
    if not library:
        labels, marks = ([getattr(r, c) for r in READERS.values()] for c in ("label", "mark"))
        raise CheckpointError(
            f"{path / _CONFIG} is of neither {' nor '.join(labels)}",
            hint=f"it has neither {' nor '.join(marks)}",
        )
    reader = READERS[library]
    has_head = any((path / name).is_file() for name in reader.head)
    has_head_config = reader.head_config and (path / reader.head_config).is_file()
    return Folder(
        path,
        library,
        config,
        _read_first(path, reader.weights),
        _read_first(path, reader.head) if has_head else {},
        _read_json(path / reader.head_config) if has_head_config else {},
    )


def _require_config(path: Path) -> None:
    """Check that a path is a folder with a configuration in it."""
    if path.is_file():
        hint = (
            f"give its folder, {path.parent}" if (path.parent / _CONFIG).is_file() else _BARE
        )
        raise CheckpointError(f"{path} is a file, no folder", hint=hint)
    if not path.is_dir():
        raise CheckpointError(
            f"there is no folder {path}", hint=f"{beside(path)}; {_expected()}"
        )
    if not (path / _CONFIG).is_file():
        inside = sorted(item.parent.name for item in path.glob(f"*/{_CONFIG}"))
        weights = (name for row in READERS.values() for name in row.weights)
        bare = any((path / name).is_file() for name in weights)
        hint = f"one of its folders? {', '.join(inside)}" if inside else _expected()
        raise CheckpointError(f"{path} has no {_CONFIG}", hint=_BARE if bare else hint)


_BARE = (
    f"weights alone do not say rank, scale and method: put the {_CONFIG} that was saved with "
    "them beside them, and give the folder"
)


def _expected() -> str:
    savers = " or ".join(f"{row.saver} ({row.label})" for row in READERS.values())
    return f"give the folder that {savers} wrote"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def _read_first(folder: Path, names: tuple[str, ...]) -> dict[str, Array]:
    for name in names:
        if (folder / name).is_file():
            return read_state_dict(folder / name)
    raise CheckpointError(f"{folder} has none of {', '.join(names)}", hint=_expected())
