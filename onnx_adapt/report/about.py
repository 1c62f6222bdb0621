"""What a report is of: its files, the inputs it ran with, and how it can be repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from onnx_adapt.graph.index import read_type
from onnx_adapt.model.file import Model, files_of
from onnx_adapt.model.fingerprint import fingerprint


@dataclass(frozen=True, slots=True)
class FileSize:
    """One model that the report is of.

    Attributes:
        name: Its file name, or what it is called if it has no file.
        size: Bytes of the file and of the data files beside it; 0 if it has no file.
    """

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class About:
    """What a report is of.

    Attributes:
        date: When it was made, in UTC.
        command: The command that made it, or ''.
        files: The base and the adapted model.
        fingerprint: The fingerprint of the base, as adapters record it.
        inputs: For each set of inputs the shape of each, with the model's own names of axes.
    """

    date: str
    command: str
    files: tuple[FileSize, ...]
    fingerprint: str
    inputs: tuple[dict[str, str], ...]


def about(
    base: Model,
    adapted: Model,
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    command: str = "",
) -> About:
    """Gather what a report is of.

    Args:
        base: The base.
        adapted: The model with slots.
        shapes: The shapes of each set of inputs.
        command: The command that makes the report.
    """
    return About(
        datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command,
        tuple(FileSize(model.label, _size(model)) for model in (base, adapted)),
        fingerprint(base),
        tuple(_named(base, item) for item in shapes),
    )


def _size(model: Model) -> int:
    """Bytes of a model's files; weights that a thin model borrows count too."""
    return sum({path.resolve(): path.stat().st_size for path in files_of(model)}.values())


def _named(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Shapes with the names of open axes: `[batch = 2, sequence = 9]`."""
    known = {value.name: read_type(value).shape or () for value in model.proto.graph.input}
    found = {}
    for name, shape in shapes.items():
        dims = known.get(name, ())
        if len(dims) != len(shape):
            dims = shape
        axes = [
            f"{dim} = {size}" if isinstance(dim, str) else str(size)
            for dim, size in zip(dims, shape, strict=True)
        ]
        found[name] = f"[{', '.join(axes)}]"
    return found
