"""The adapter that a caller means: an `Adapter`, or the path of an adapter file."""

from __future__ import annotations

import os

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.files import load_adapter
from onnx_adapt.errors import ArgumentError

AdapterLike = Adapter | str | os.PathLike[str]
"""What every function takes where it asks for an adapter."""


def as_adapter(given: AdapterLike) -> Adapter:
    """The adapter that is given; a path is loaded.

    Raises:
        ArgumentError: If it is of another kind.
        AdapterError: If it is the path of no adapter file.

    Example:
        >>> as_adapter(Adapter("fr", {})).name
        'fr'
    """
    if isinstance(given, Adapter):
        return given
    if isinstance(given, str | os.PathLike):
        return load_adapter(given)
    kind = type(given).__name__
    inside = isinstance(getattr(given, "adapter", None), Adapter)
    raise ArgumentError(
        f"{kind} is no adapter",
        hint=f"give the `adapter` of the {kind}"
        if inside
        else "give the path of an adapter file, or an Adapter (`oa.make_adapter` makes one)",
    )
