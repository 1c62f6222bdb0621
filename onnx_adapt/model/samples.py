"""Samples of bulk data: cheap at any size, different for another fine-tune."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from onnx_adapt.model.payloads import LARGE

_WINDOWS, _WINDOW = 8, LARGE // 8


def sample_bytes(data: bytes) -> bytes:
    """Sample data: all of it up to 4 KB, else eight evenly spaced windows of 512 bytes."""
    return b"".join(data[at : at + count] for at, count in _windows(len(data)))


def sample_file(file: BinaryIO, offset: int, length: int) -> bytes:
    """Sample a range of a file.

    Raises:
        OSError: If it cannot be read.
    """
    pieces = []
    for at, count in _windows(length):
        file.seek(offset + at)
        pieces.append(file.read(count))
    return b"".join(pieces)


def _windows(length: int) -> Iterator[tuple[int, int]]:
    if length <= LARGE:
        yield 0, length
        return
    for i in range(_WINDOWS):
        yield (length - _WINDOW) * i // (_WINDOWS - 1), _WINDOW
