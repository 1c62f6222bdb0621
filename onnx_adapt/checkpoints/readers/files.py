"""What is at the path of a checkpoint: one file, or the files of a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx_adapt.checkpoints.readers.headers import Header, read_header
from onnx_adapt.checkpoints.readers.saved import read_state_dict
from onnx_adapt.checkpoints.readers.shards import find_shards, read_json, read_shards
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.words import beside

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class Files:
    """What is at the path of a checkpoint; contents are read when they are asked for.

    Attributes:
        path: The folder or the file.
        names: The names of the files in the folder, or of the file itself.
    """

    path: Path
    names: frozenset[str]
    _headers: dict[str, Header] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_folder(self) -> bool:
        """Whether the path is a folder."""
        return self.path.is_dir()

    @property
    def file(self) -> str:
        """The name of the file, if the path is one; '' for a folder."""
        return "" if self.is_folder else self.path.name

    def at(self, name: str) -> Path:
        """The path of one of the files."""
        return self.path / name if self.is_folder else self.path

    def first(self, names: tuple[str, ...]) -> Path | None:
        """The first of some files that is there."""
        return next((self.at(name) for name in names if name in self.names), None)

    def header(self, name: str) -> Header:
        """What one of the files says of its tensors; it is looked at once, and not read.

        Raises:
            CheckpointError: If it cannot be read.
        """
        if name not in self._headers:
            self._headers[name] = read_header(self.at(name))
        return self._headers[name]

    def config(self, name: str = CONFIG) -> Mapping[str, Any]:
        """A JSON file of a folder; empty if it is not there.

        Raises:
            CheckpointError: If it cannot be read, or is no JSON object.
        """
        return read_json(self.at(name)) if name in self.names and self.is_folder else {}

    def tensors(self, names: tuple[str, ...], hint: str) -> dict[str, Array]:
        """The tensors of the first of some files that is there, whole or in shards, by key.

        Raises:
            CheckpointError: If none is there, or it cannot be read.
        """
        for name in names:
            if name in self.names:
                return read_state_dict(self.at(name))
            if shards := find_shards(self.path, self.names, name):
                return read_shards(self.path, shards)
        raise CheckpointError(f"{self.path} has none of {', '.join(names)}", hint=hint)


def find_files(path: Path, expected: str) -> Files:
    """Look at what is at a path.

    Args:
        path: A folder or a file.
        expected: What the user is to give, for a hint.

    Raises:
        CheckpointError: If nothing is there.
    """
    if path.is_dir():
        home = _adapted_module(path)
        return Files(home, frozenset(item.name for item in home.iterdir() if item.is_file()))
    if path.exists():
        return Files(path, frozenset({path.name}))
    raise CheckpointError(
        f"there is no file or folder {path}", hint=f"{beside(path)}; {expected}"
    )


_MODULES = "modules.json"


def _adapted_module(folder: Path) -> Path:
    """The folder with the adapter: in sentence-transformers it can be that of a module.

    `modules.json` lists the modules of such a model, each with its folder, `""` or
    `"0_Transformer"`.
    """
    if (folder / CONFIG).is_file() or not (folder / _MODULES).is_file():
        return folder
    try:
        modules = json.loads((folder / _MODULES).read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in modules]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return folder  # another library's file of this name
    inside = {item.name: item for item in folder.iterdir() if item.is_dir()}
    homes = [inside[path] for path in paths if path in inside]
    return next((home for home in homes if (home / CONFIG).is_file()), folder)
