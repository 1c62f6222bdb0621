"""The path that a caller means, where a function takes nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_adapt.errors import ArgumentError


def as_path(given: object, what: str) -> Path:
    """The path that is given.

    Args:
        given: A text, or an object that stands for a path.
        what: What is to be at the path, for the message.

    Raises:
        ArgumentError: If it is of another kind, such as a model in the place of its path.

    Example:
        >>> as_path("trained", "a checkpoint").name
        'trained'
    """
    if isinstance(given, str | os.PathLike):
        return Path(given)
    raise ArgumentError(
        f"{type(given).__name__} is no path of {what}",
        hint="are two arguments swapped? a function's help has their order",
    )
