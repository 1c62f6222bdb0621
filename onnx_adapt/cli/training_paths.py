"""The files of a training: what can be said of their paths before it begins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from onnx_adapt.cli.outputs import refuse_to_replace
from onnx_adapt.errors import SaveError

_READ = ("data", "validation", "start_from", "tokenizer", "teacher")
"""Options that name files which are read."""

_WRITTEN = {"checkpoint": "--checkpoint", "log": "--log", "model_path": "--model-output"}
"""Options that name files which are written."""


def check_paths(model: str, output: str, given: Mapping[str, Any]) -> None:
    """Refuse paths that could not be written at the end of a long training.

    Args:
        model: The model.
        output: The adapter file to write.
        given: The options of the command.

    Raises:
        SaveError: If a file that is read would be replaced, or a folder cannot be written.
        AdapterError: If the suffix of the adapter file is unknown.
    """
    from onnx_adapt.adapter.files import format_of

    format_of(Path(output))
    written = {"-o": Path(output)}
    written |= {name: Path(given[key]) for key, name in _WRITTEN.items() if given[key]}
    read = [model, *(given[key] for key in _READ if given[key])]
    for name, path in written.items():
        twice = [
            other for other, item in written.items() if item.absolute() == path.absolute()
        ]
        if len(twice) > 1:
            raise click.UsageError(f"{' and '.join(twice)} are one file, {path}")
        refuse_to_replace(path, *read)
        _require_writable(name, path)


def _require_writable(name: str, path: Path) -> None:
    folder = next((item for item in path.absolute().parents if item.exists()), path)
    log_folder = name == _WRITTEN["log"] and not path.suffix  # events for TensorBoard
    if (
        (path.is_dir() and not log_folder)
        or not folder.is_dir()
        or not os.access(folder, os.W_OK)
    ):
        raise SaveError(f"{path} cannot be written", hint=f"choose another path with {name}")
