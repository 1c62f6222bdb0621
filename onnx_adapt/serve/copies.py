"""A folder for copies of adapter files that does not outlive its process for long."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_PREFIX = "onnx-adapt-copies-"


class Copies:
    """A folder that is this process's own, and removed when it is closed.

    A process that is killed cannot remove its folder. So each process keeps its folder
    locked: a folder that nobody locks is removed when the next one is made. What cleans
    temporary folders by age, as systemd-tmpfiles does, leaves those that are locked alone too.
    Windows has no such locks; a folder left there goes with the other temporary files.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        _sweep(root)
        # It gets the name that is swept only after it is locked.
        made = Path(tempfile.mkdtemp(prefix="onnx-adapt-new-", dir=root))
        self._lock = _locked(made)
        self.path = made.rename(root / f"{_PREFIX}{made.name.rpartition('-')[2]}")
        self._numbers = itertools.count()

    def link(self, source: Path) -> Path:
        """Give a file a second name here: it stays when the first name is removed.

        Raises:
            FileNotFoundError: If the first name is removed already.
        """
        path = self.path / f"{next(self._numbers)}-{source.name}"
        try:
            path.hardlink_to(source)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            with whole(path):
                shutil.copyfile(source, path)
        return path

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove the folders of processes that were killed."""
    if sys.platform == "win32":
        return
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # locked, another user's, or gone
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = _locked(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int | None:
    """A file descriptor that keeps a folder locked until it is closed.

    Raises:
        OSError: If another process has locked it, or it is no folder.
    """
    if sys.platform == "win32":
        return None
    opened = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        raise
    return opened


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Leave no part of a file that cannot be written to its end."""
    try:
        yield
    except OSError:
        path.unlink(missing_ok=True)
        raise
