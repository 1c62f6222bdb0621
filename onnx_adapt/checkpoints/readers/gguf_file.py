"""Read a GGUF file: its settings, and where its tensors are; every length is checked first.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: a magic
number, the settings, a description of each tensor, and the data of each at its offset.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor of a GGUF file is, and what it is.

    Attributes:
        shape: Its shape; GGUF has the axes in the other order.
        kind: The number of its type in `GGMLQuantizationType`.
        start: Where its data begins in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(slots=True)
class _Cursor:
    """A place in a file that moves on with what is read."""

    data: memoryview
    at: int = 0

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        end = self.at + size
        if end > len(self.data):
            raise ValueError("it ends before what it describes")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, letter: str) -> Any:
        """The next number, of a type of `struct`."""
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        """The next text."""
        return str(self.take(self.number("Q")), "utf-8")

    def value(self) -> Any:
        """The next value of a setting; None for an array, which is only skipped."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(count):  # each takes eight bytes at least
                self.take(self.number("Q"))
        else:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        return None


def read_gguf_header(data: memoryview) -> tuple[dict[str, Any], dict[str, TensorPlace]]:
    """Read the settings of a GGUF file by name, and the places of its tensors.

    Raises:
        ValueError: If the file is damaged.
        LookupError: If it has a value of an unknown type.
    """
    cursor = _Cursor(data)
    if cursor.take(4) != MAGIC or cursor.number("I") not in _VERSIONS:
        raise ValueError("it is no GGUF file of version 2 or 3")
    tensors, settings = cursor.number("Q"), cursor.number("Q")
    found = {cursor.text(): cursor.value() for _ in range(settings)}
    infos = [_described(cursor) for _ in range(tensors)]
    step = found.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"its tensors are aligned to {step!r}")
    begin = -(-cursor.at // step) * step
    return found, {
        name: TensorPlace(shape, kind, begin + offset) for name, shape, kind, offset in infos
    }


def _described(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """The next tensor's name, shape, type and offset."""
    name, axes = cursor.text(), cursor.number("I")
    if axes > _MOST_AXES:
        raise ValueError(f"{name!r} has {axes} axes")
    shape = tuple(reversed([int(cursor.number("Q")) for _ in range(axes)]))
    if math.prod(shape) > 8 * len(cursor.data):  # no type has less than a bit for a number
        raise ValueError(f"{name!r} is larger than the file")
    return name, shape, cursor.number("I"), cursor.number("Q")
