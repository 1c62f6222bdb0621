"""What is at the path of a checkpoint: one file, or the files of a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx_adapt.checkpoints.readers.headers import Header, read_header
from onnx_adapt.checkpoints.readers.saved import read_state_dict
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
        """The tensors of the first of some files that is there, by key.

        Raises:
            CheckpointError: If none is there, or it cannot be read.
        """
        file = self.first(names)
        if file is None:
            raise CheckpointError(f"{self.path} has none of {', '.join(names)}", hint=hint)
        return read_state_dict(file)


def find_files(path: Path, expected: str) -> Files:
    """Look at what is at a path.

    Args:
        path: A folder or a file.
        expected: What the user is to give, for a hint.

    Raises:
        CheckpointError: If nothing is there.
    """
    if path.is_dir():
        return Files(path, frozenset(item.name for item in path.iterdir() if item.is_file()))
    if path.exists():
        return Files(path, frozenset({path.name}))
    raise CheckpointError(
        f"there is no file or folder {path}", hint=f"{beside(path)}; {expected}"
    )


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
