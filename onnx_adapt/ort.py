"""The door to ONNX Runtime: its import, its exceptions, its words, its warnings."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Any

from onnx_adapt.errors import UnprovableError


def onnxruntime() -> Any:
    """The module.

    Raises:
        UnprovableError: If it is not installed.
    """
    try:
        import onnxruntime as module
    except ImportError as error:
        raise UnprovableError(
            "ONNX Runtime is not installed",
            hint="pip install 'onnx-adapt[cpu]', or skip the proof with --no-verify",
        ) from error
    return module


def runtime_version() -> str:
    """The version of ONNX Runtime."""
    return str(onnxruntime().__version__)


def failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its exceptions have no class of their own in common."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [value for value in vars(state).values() if isinstance(value, type)]
    return (RuntimeError, ValueError, *(kind for kind in kinds if issubclass(kind, Exception)))


def shortened(error: object) -> str:
    """A message on one line, and not without end."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."


_SLOT_WARNING = re.compile(
    rb"Initializer (.*) appears in graph inputs and will not be treated as constant"
    rb"|Removing initializer '(.*)'\. It is not used by any node"
)
_redirected = threading.Lock()
_stderr: list[int] = []
"""Where stderr really goes while it is redirected."""


@contextlib.contextmanager
def without_slot_warnings() -> Iterator[set[str]]:
    """Let everything on stderr through but the warnings ONNX Runtime has for some weights.

    These are inputs with a default, and what a filled or baked adapter replaces.

    It writes to the file descriptor and has no filter, only a severity, which would
    silence every other warning about the model as well. What others write meanwhile
    comes out when the session stands.

    Yields:
        The names of these weights, to be filled while they become known. Where that fails
        for an error, none of these warnings comes through.
    """
    unwanted: set[str] = set()
    with _redirected, contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(_scratch())
            stderr = os.dup(2)
        except OSError:  # it is closed, or there is no room: no redirection then
            yield unwanted
            return
        _stderr.append(stderr)
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield unwanted
            failed = False
        finally:
            os.dup2(stderr, 2)
            _stderr.clear()
            held.seek(0)
            lines = [
                line for line in held if not _is_about(line, None if failed else unwanted)
            ]
            with contextlib.suppress(OSError), os.fdopen(stderr, "wb") as out:
                out.writelines(lines)


def _scratch() -> IO[bytes]:
    """A file that never blocks: a pipe would, with ONNX Runtime holding the interpreter."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


def _is_about(line: bytes, names: set[str] | None) -> bool:
    """Whether a line is the warning about one of these weights, or about any."""
    found = _SLOT_WARNING.search(line)
    if found is None:
        return False
    return names is None or (found[1] or found[2]).decode(errors="replace") in names


def _restore_after_fork() -> None:
    """A child of fork has its own stderr, and no thread that would let go of the lock."""
    global _redirected
    _redirected = threading.Lock()
    if _stderr:
        os.dup2(_stderr[0], 2)
        _stderr.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_after_fork)
