"""Where the bytes of a large tensor are, and the token that stands for them in a graph.

In an opened model a large tensor holds a short token in `raw_data`, and the token's number is
the place of a `Payload` in `Model.payloads`: a file, an offset and a length.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LARGE = 4096
"""Tensor data of at least this many bytes stays in its file."""

RAW_DATA = 9
PLAIN_BYTES = {RAW_DATA: 1, 4: 4, 10: 8}
"""TensorProto fields whose packed form is the tensor's little-endian bytes (`raw_data`,
`float_data`, `double_data`), and the size of one item."""

# Random, so that no file can contain it: a token is trusted because we wrote it.
_MAGIC = os.urandom(16)


@dataclass(frozen=True, slots=True)
class Source:
    """A file as it was when it was scanned."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Source:
        """Record the size and time of `path` now.

        Raises:
            OSError: If it is not there or not a regular file.
        """
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return cls(path, status.st_size, status.st_mtime_ns)

    def is_unchanged(self) -> bool:
        """Whether the file still has the recorded size and time."""
        try:
            return Source.of(self.path) == self
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Payload:
    """Where the bytes of one tensor are.

    Attributes:
        source: The file.
        offset: Offset of the first byte in it.
        length: Number of bytes.
        number: The TensorProto field the bytes belong in (`raw_data` is 9).
    """

    source: Source
    offset: int
    length: int
    number: int = RAW_DATA


def token(index: int) -> bytes:
    """The stand-in for payload `index`, to be put into a tensor's `raw_data`."""
    return _MAGIC + index.to_bytes(8, "little")


def token_index(raw_data: bytes) -> int | None:
    """The payload a tensor's `raw_data` stands for, or None if it is the data itself."""
    if len(raw_data) == len(_MAGIC) + 8 and raw_data.startswith(_MAGIC):
        return int.from_bytes(raw_data[len(_MAGIC) :], "little")
    return None


def tokens_in(data: bytes) -> Iterator[int]:
    """The offset of every token in serialised bytes."""
    at = data.find(_MAGIC)
    while at >= 0:
        yield at
        at = data.find(_MAGIC, at + len(_MAGIC))


Segment = bytes | Payload
"""A piece of a file to be written: bytes, or a range of another file."""
