"""Libraries that only some file forms need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from onnx_adapt.errors import AdaptError, CheckpointError


def optional_library(
    name: str, extra: str, what: str, kind: type[AdaptError] = CheckpointError
) -> Any:
    """Import a library that is not among the package's own dependencies.

    Args:
        name: The module to import.
        extra: The extra of onnx-adapt that installs it.
        what: What it reads, in words.
        kind: The error to raise.

    Raises:
        AdaptError: Of that kind, if it is not installed, with the extra to install.

    Example:
        >>> optional_library("no_such_reader", "gguf", "a GGUF file")
        Traceback (most recent call last):
        ...
        onnx_adapt.errors.CheckpointError: a GGUF file is read with no_such_reader, which is \
not installed
        hint: pip install 'onnx-adapt[gguf]'
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise kind(
            f"{what} is read with {name}, which is not installed",
            hint=f"pip install 'onnx-adapt[{extra}]'",
        ) from error
