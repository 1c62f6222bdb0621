"""A folder for copies of adapter files that does not outlive its process for long."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_PREFIX = "onnx-adapt-copies-"
_LOCK = "lock"


class Copies:
    """A folder that is this process's own, and removed when it is closed.

    A process that is killed cannot remove its folder. So each folder has a file that its
    process keeps locked: a folder that nobody locks is removed when the next one is made.
    Windows has no such locks; a folder left there goes with the other temporary files.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        _sweep(root)
        # It gets the name that is swept only after it is locked.
        made = Path(tempfile.mkdtemp(prefix="onnx-adapt-new-", dir=root))
        self._lock = (made / _LOCK).open("wb")
        if sys.platform != "win32":
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.rename(root / f"{_PREFIX}{made.name.rpartition('-')[2]}")
        self._numbers = itertools.count()

    def put(self, file_name: str, data: bytes) -> Path:
        """Write a file under a name that no file here had before."""
        path = self._fresh(file_name)
        path.write_bytes(data)
        return path

    def link(self, source: Path) -> Path:
        """Give a file a second name here: it stays when the first name is removed.

        Raises:
            FileNotFoundError: If the first name is removed already.
        """
        path = self._fresh(source.name)
        try:
            path.hardlink_to(source)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(source, path)
        return path

    def _fresh(self, file_name: str) -> Path:
        return self.path / f"{next(self._numbers)}-{file_name}"

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove the folders of processes that were killed."""
    if sys.platform == "win32":
        return
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # locked, another user's, or gone
            if folder.lstat().st_uid != os.getuid():
                continue
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            lock = os.open(folder / _LOCK, flags)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
