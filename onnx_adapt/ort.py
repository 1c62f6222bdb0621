"""The door to ONNX Runtime: its import, its exceptions, its words, its warnings."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

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


_SLOT_WARNING = b"appears in graph inputs and will not be treated as constant"
_redirected = threading.Lock()


@contextlib.contextmanager
def without_slot_warnings() -> Iterator[None]:
    """Let everything on stderr through but the warning ONNX Runtime has for each slot weight.

    It writes to the file descriptor and has no filter, only a severity, which would
    silence every other warning about the model as well. What others write meanwhile
    comes out when the session stands.
    """
    with _redirected, tempfile.TemporaryFile() as held:
        try:
            stderr = os.dup(2)
        except OSError:  # closed: nobody is listening
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            held.seek(0)
            lines = [line for line in held if _SLOT_WARNING not in line]
            with contextlib.suppress(OSError), os.fdopen(stderr, "wb") as out:
                out.writelines(lines)
