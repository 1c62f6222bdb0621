"""Write files whole or not at all: beside their place first, then moved there."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

from onnx_adapt.errors import SaveError
from onnx_adapt.payloads import Segment

Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""

FilePlan = tuple[Path, Sequence[Segment]]
"""A destination and what goes there: bytes and ranges of other files."""

_CHUNK = 1 << 26
_PIECE = 1 << 20


def write_files(plans: Sequence[FilePlan], progress: Progress | None = None) -> None:
    """Write all files beside their places, then move them there in order.

    Raises:
        SaveError: If anything cannot be written; every destination is then as it was
            before its move, and no temporary file is left.
    """
    total = sum(_length(segment) for _, segments in plans for segment in segments)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    ready: list[tuple[Path, Path]] = []
    try:
        for file, segments in plans:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name[:80]}.{secrets.token_hex(6)}.tmp")
            ready.append((temporary, file))
            with FileIO(temporary, "xb") as out:
                for segment in segments:
                    _write_segment(out, segment, advance)
            if file.exists():
                temporary.chmod(stat.S_IMODE(file.stat().st_mode))
        for temporary, file in ready:
            temporary.replace(file)
    except OSError as error:
        raise SaveError(
            f"cannot write {plans[-1][0]}: {error.strerror or error}", hint=_remedy(error)
        ) from error
    finally:
        for temporary, _ in ready:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _length(segment: Segment) -> int:
    return len(segment) if isinstance(segment, bytes) else segment.length


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room or write to another disk; nothing was changed"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "the folder cannot be written; choose another with -o"
    return "nothing was changed; choose another path with -o"


def _write_segment(out: FileIO, segment: Segment, advance: Callable[[int], None]) -> None:
    if isinstance(segment, bytes):
        _write_bytes(out, memoryview(segment))
        advance(len(segment))
        return
    with FileIO(segment.source.path) as source:
        at, end = segment.offset, segment.offset + segment.length
        while at < end:
            copied = _copy_in_kernel(source, out, at, min(_CHUNK, end - at))
            if not copied:
                copied = _copy_piece(source, out, at, min(_PIECE, end - at))
            at += copied
            advance(copied)


def _copy_in_kernel(source: FileIO, out: FileIO, offset: int, count: int) -> int:
    """Copy without passing through this process; 0 where that is not to be had."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source.fileno(), out.fileno(), count, offset)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            return 0
        raise


def _copy_piece(source: FileIO, out: FileIO, offset: int, count: int) -> int:
    source.seek(offset)
    piece = source.read(count)
    if not piece:
        raise OSError(errno.EIO, f"{source.name} became shorter")
    _write_bytes(out, memoryview(piece))
    return len(piece)


def _write_bytes(out: FileIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]
