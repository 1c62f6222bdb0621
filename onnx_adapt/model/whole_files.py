"""Write files whole or not at all: each to a temporary file, then moved into place."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path

from onnx_adapt.errors import SaveError
from onnx_adapt.model.payloads import Segment

Progress = Callable[[int, int], None]
"""Called with the number of bytes written so far and the number in all."""

FilePlan = tuple[Path, Sequence[Segment] | Path]
"""A path, and its content: bytes and ranges of other files, or the target of a link."""

_CHUNK = 1 << 26
_PIECE = 1 << 18  # fits in a processor's cache
_PAGE = 4096


def write_files(plans: Sequence[FilePlan], progress: Progress | None = None) -> None:
    """Write all files to temporary files beside their paths, then move them in order.

    Raises:
        SaveError: If anything cannot be written or replaced, or a source has changed; every
            destination is then as it was before its move, and nothing new is left.
    """
    total = sum(_length(segment) for segment in _segments(plans))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    _refuse_changed(plans)
    ready: list[tuple[Path, Path]] = []
    made: list[Path] = []
    fresh: list[Path] = []
    file = plans[0][0]
    try:
        for file, content in plans:
            _refuse_odd(file)
            _make_folder(file.parent, made)
            temporary = file.with_name(f".onnx-adapt.{secrets.token_hex(6)}.tmp")
            ready.append((temporary, file))
            _write(temporary, file, content, advance)
        _refuse_changed(plans)
        for temporary, file in ready:
            _move(temporary, file, fresh, last=file is ready[-1][1])
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(
            f"cannot write {file}: {error.strerror or error}", hint=_remedy(error)
        ) from error
    finally:
        for left in (*(temporary for temporary, _ in ready), *fresh):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only succeeds where nothing was moved into it


def _move(temporary: Path, file: Path, fresh: list[Path], *, last: bool) -> None:
    """Move a file into place, and list it in `fresh` while no other file needs it.

    If a later move fails, the files in `fresh` are removed. Data is moved first, the model
    that needs it last. A file that replaces an older one may need the data before it too.
    """
    unneeded = list(fresh)
    if last or os.path.lexists(file):
        fresh.clear()
    else:
        fresh.append(file)
    try:
        temporary.replace(file)
    except OSError:
        fresh[:] = unneeded
        raise


def _segments(plans: Sequence[FilePlan]) -> Iterator[Segment]:
    for _, content in plans:
        if not isinstance(content, Path):
            yield from content


def _length(segment: Segment) -> int:
    return len(segment) if isinstance(segment, bytes) else segment.length


def _refuse_changed(plans: Sequence[FilePlan]) -> None:
    for source in {s.source for s in _segments(plans) if not isinstance(s, bytes)}:
        if not source.is_unchanged():
            raise _changed(source.path)


def _refuse_odd(file: Path) -> None:
    """Refuse a device or pipe, which the move would replace for everyone who uses it."""
    if file.exists() and not file.is_file():
        raise SaveError(f"{file} is not a regular file", hint="choose another output path")


def _changed(source: Path) -> SaveError:
    return SaveError(f"{source} has changed since it was opened", hint="run again")


def _make_folder(folder: Path, made: list[Path]) -> None:
    """Make a folder and those around it; the new ones are appended to `made`."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        made.append(path)


def _write(
    temporary: Path,
    file: Path,
    content: Sequence[Segment] | Path,
    advance: Callable[[int], None],
) -> None:
    if isinstance(content, Path):
        temporary.symlink_to(content)
        return
    with FileIO(temporary, "xb") as out:
        for segment in content:
            _write_segment(out, segment, advance)
    if file.exists():
        temporary.chmod(stat.S_IMODE(file.stat().st_mode))


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room or write to another disk; nothing was changed"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "the folder cannot be written; choose another with -o"
    if error.errno == errno.ENAMETOOLONG:
        return "nothing was changed; choose a shorter name"
    return "nothing was changed; choose another path with -o"


def _write_segment(out: FileIO, segment: Segment, advance: Callable[[int], None]) -> None:
    if isinstance(segment, bytes):
        _write_bytes(out, memoryview(segment))
        advance(len(segment))
        return
    with _open(segment.source.path) as source:
        at, end = segment.offset, segment.offset + segment.length
        while at < end:
            copied = _copy_in_kernel(source, out, at, min(_CHUNK, end - at))
            copied = copied or _copy_piece(source, out, at, min(_PIECE, end - at))
            if not copied:
                raise _changed(segment.source.path)
            at += copied
            advance(copied)


def _open(source: Path) -> FileIO:
    try:
        return FileIO(source)
    except OSError as error:
        raise SaveError(
            f"cannot read {source}: {error.strerror}", hint="nothing was changed; run again"
        ) from error


def _copy_in_kernel(source: FileIO, out: FileIO, offset: int, count: int) -> int:
    """Copy a range within the kernel; returns 0 where that is impossible or slow.

    Ranges that are not aligned to pages are copied faster through a small buffer.
    """
    if not hasattr(os, "copy_file_range") or (offset - out.tell()) % _PAGE:
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
    _write_bytes(out, memoryview(piece))
    return len(piece)


def _write_bytes(out: FileIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]
