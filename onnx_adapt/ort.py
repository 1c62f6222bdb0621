"""The one door to ONNX Runtime: its import, its providers, starting and running a session.

No other module builds an InferenceSession or calls its `run`. Nothing here imports ONNX.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from onnx_adapt.errors import RunError, UnprovableError


def onnxruntime() -> Any:
    """Import ONNX Runtime.

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
    """The exceptions that ONNX Runtime raises; they have no base class in common."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [value for value in vars(state).values() if isinstance(value, type)]
    return (RuntimeError, ValueError, *(kind for kind in kinds if issubclass(kind, Exception)))


def threads() -> int:
    """How many threads a session should have; 0 leaves it to ONNX Runtime.

    ONNX Runtime starts one for each core of the machine. Where a process may use fewer, as
    with `taskset`, they wait for each other: a step of training with two threads on one core
    took 1.3 times the time on the processor.
    """
    allowed = getattr(os, "sched_getaffinity", None)
    own = len(allowed(0)) if allowed is not None else 0
    return own if own < (os.cpu_count() or 1) else 0


EXACT_PRODUCTS = "session.x64quantprecision"
"""The entry of a session's options by which sums of 8-bit products never saturate."""


def start_exactly(start: Callable[[Any], Any]) -> tuple[Any, bool]:
    """Start a session that is exact about integers on every processor, where there is one.

    `proof/processor.py` says what ONNX Runtime does by default. ONNX Runtime 1.32 makes some
    models of int8 matrices into ones that it has no kernels for; they run by default then.

    Args:
        start: Starts the session with the SessionOptions that it is given.

    Returns:
        The session, and whether it is told to be exact.
    """
    options = onnxruntime().SessionOptions()
    options.add_session_config_entry(EXACT_PRODUCTS, "1")
    try:
        return start(options), True
    except RunError:
        return start(onnxruntime().SessionOptions()), False


_SUFFIX = "ExecutionProvider"


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider: what runs a model's nodes, such as the CPU or a GPU.

    Attributes:
        name: ONNX Runtime's name, such as `CUDAExecutionProvider`.
        options: Its options as pairs of texts, such as `("device_id", "1")`.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()


Providers = tuple[Provider, ...]
"""Providers in order of preference. ONNX Runtime runs on the CPU what none of them takes."""

CPU: Providers = (Provider(f"CPU{_SUFFIX}"),)

ProviderChoice = str | tuple[str, Mapping[str, Any]]
"""One provider as a caller writes it: `cuda`, `cuda:device_id=1`, or `("cuda", {...})`."""


def read_providers(given: ProviderChoice | Iterable[ProviderChoice] | None) -> Providers:
    """Read which execution providers are meant; the CPU where none is given.

    Args:
        given: One provider or several in order of preference. A name is ONNX Runtime's own
            or its start in any case: `cuda` means `CUDAExecutionProvider`.

    Raises:
        RunError: If this build of ONNX Runtime does not have one of them.

    Example:
        >>> read_providers("cpu")[0].name
        'CPUExecutionProvider'
    """
    if given is None:
        return CPU
    if isinstance(given, str):
        given = [given]
    elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
        given = [(given[0], given[1])]
    return tuple(_read_provider(item) for item in given) or CPU


def _read_provider(given: ProviderChoice) -> Provider:
    name, options = _split(given) if isinstance(given, str) else given
    present = onnxruntime().get_available_providers()
    wanted = name.lower().removesuffix(_SUFFIX.lower())
    for known in present:
        if known.removesuffix(_SUFFIX).lower() == wanted:
            pairs = ((str(key), str(value)) for key, value in options.items())
            return Provider(known, tuple(pairs))
    raise RunError(
        f"ONNX Runtime {runtime_version()} has no execution provider {name!r} here",
        hint=f"this build has {', '.join(present)}; another provider needs another build, "
        "such as the package onnxruntime-gpu for CUDA",
    )


def _split(text: str) -> tuple[str, dict[str, str]]:
    """The name and the options in `cuda:device_id=1,use_tf32=0`.

    Raises:
        RunError: If an option has no value.
    """
    name, _, rest = text.partition(":")
    options = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise RunError(
                f"{item!r} is not an option of a provider",
                hint="write NAME:key=value,key=value, such as cuda:device_id=1",
            )
        options[key] = value
    return name, options


def start_session(
    model: str | bytes, options: Any, providers: Providers, *, label: str, hint: str
) -> Any:
    """Start an InferenceSession on a model that runs on these providers.

    Args:
        model: The path of a model, or its bytes.
        options: ONNX Runtime's SessionOptions, or None.
        providers: Where to run it, in order of preference.
        label: What errors call the model.
        hint: What to do if ONNX Runtime cannot load it.

    Raises:
        RunError: If ONNX Runtime refuses the model, or one of the providers does not start:
            then the session would silently run on the CPU.
        UnprovableError: If ONNX Runtime is not installed.
    """
    ort = onnxruntime()
    chosen = [(item.name, dict(item.options)) for item in providers]
    try:
        session = ort.InferenceSession(model, options, providers=chosen, enable_fallback=0)
    except failures() as error:
        raise RunError(
            f"ONNX Runtime {ort.__version__} cannot load {label}: {shortened(error)}",
            hint=hint,
        ) from error
    running = session.get_providers()
    for item in providers:
        if item.name not in running:
            raise RunError(
                f"{item.name} does not start: {label} would run on {', '.join(running)}",
                hint="install the driver and the libraries that this provider needs",
            )
    return session


def runs_on_cpu(session: Any) -> bool:
    """Whether no other execution provider comes before the CPU in a session."""
    return bool(session.get_providers()[0] == CPU[0].name)


def run_session(
    session: Any,
    outputs: Sequence[str],
    feeds: Mapping[str, Any],
    *,
    label: str,
    run_options: Any = None,
) -> list[Any]:
    """Run a session once; the values of the outputs, in order.

    Raises:
        RunError: If ONNX Runtime refuses the inputs or fails.
    """
    try:
        return list(session.run(list(outputs), dict(feeds), run_options))
    except failures() as error:
        raise _refused(session, feeds, label, error) from error


def run_ort_values(
    session: Any, outputs: Sequence[str], feeds: Mapping[str, Any], *, label: str
) -> list[Any]:
    """Run a session once with OrtValues as inputs and outputs.

    Raises:
        RunError: If ONNX Runtime refuses the inputs or fails.
    """
    try:
        return list(session.run_with_ort_values(list(outputs), dict(feeds)))
    except failures() as error:
        raise _refused(session, feeds, label, error) from error


def _refused(session: Any, feeds: Mapping[str, Any], label: str, error: Exception) -> RunError:
    asked = {item.name: item.shape for item in session.get_inputs()}
    optional = {item.name for item in session.get_overridable_initializers()}
    reason = shortened(error)
    if unknown := [name for name in feeds if name not in {*asked, *optional}]:
        reason = f"it has no input {unknown[0]!r}"
    elif missing := [name for name in asked if name not in feeds]:
        reason = f"its input {missing[0]!r} is not fed"
    wanted = ", ".join(f"{name} {shape}" for name, shape in asked.items())
    return RunError(
        f"{label} does not run: {reason}",
        hint=f"do the inputs fit? The model asks for {shortened(wanted)}",
    )


def shortened(error: object) -> str:
    """A message on one line, cut after 400 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."


_SLOT_WARNING = re.compile(
    rb"Initializer (.*) appears in graph inputs and will not be treated as constant"
    rb"|Removing initializer '(.*)'\. It is not used by any node"
)
_redirected = threading.Lock()
_stderr: list[int] = []
"""The file descriptor of the real stderr while it is redirected."""


@contextlib.contextmanager
def without_slot_warnings() -> Iterator[set[str]]:
    """Hide the warnings that ONNX Runtime prints about the weights of slots.

    It warns of initializers that are also inputs, and of initializers that a filled or
    baked adapter replaces. Both are meant here.

    ONNX Runtime writes to the file descriptor of stderr and has no filter by message. Its
    severity level would silence every other warning about the model as well. So stderr is
    redirected to a file for a while, and everything else in it is written out at the end.

    Yields:
        A set for the names of these weights; the caller fills it as they become known. If
        the block raises an error, all warnings of these two kinds are hidden.
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
    """A file in memory; a full pipe would block, as ONNX Runtime holds the interpreter."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


def _is_about(line: bytes, names: set[str] | None) -> bool:
    """Whether a line is a warning about one of these weights, or about any if None."""
    found = _SLOT_WARNING.search(line)
    if found is None:
        return False
    return names is None or (found[1] or found[2]).decode(errors="replace") in names


def _restore_after_fork() -> None:
    """Give a forked child its stderr back; no thread of its own would release the lock."""
    global _redirected
    _redirected = threading.Lock()
    if _stderr:
        os.dup2(_stderr[0], 2)
        _stderr.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_after_fork)
