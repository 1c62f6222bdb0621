"""An adapter as ONNX Runtime takes it, with everything that must stay alive for its runs."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.files import load_adapter, read_adapter
from onnx_adapt.dtypes import DTYPES, ELEM_TYPES, Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.formats import FORMATS
from onnx_adapt.ort import failures, onnxruntime, shortened

Stamp = tuple[int, int, int]
"""The version of a file: its inode, size, and time of change in nanoseconds."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """What a session has loaded under one name.

    Attributes:
        name: The name to run it by.
        path: The file it came from, or None.
        bytes: The number of bytes of its weights.
        last_used: When a run last asked for it, in seconds since the epoch.
    """

    name: str
    path: Path | None
    bytes: int
    last_used: float


@dataclass(slots=True, eq=False)
class OrtAdapter:
    """An adapter in memory, ready for any number of runs.

    ONNX Runtime keeps no reference to a LoraAdapter or to the arrays behind an OrtValue, and
    a run without them silently gives the base's outputs. This object keeps them alive.

    Attributes:
        path: The file, or None for an adapter made in memory.
        stamp: The version of that file that was read.
        size: The number of bytes of all weights.
        names: The model inputs that it feeds.
        options: Run options with the adapter active, or None if ONNX Runtime did not map
            its file.
        last_used: When a run last asked for it (`time.time()`).
        rest: Weights by input name that keep the slots off for which it has none.
        invocation_tokens: The tokens that switch it on, or none.
        initial_state: The first past that it is, by input name, or nothing.
    """

    path: Path | None
    stamp: Stamp
    size: int
    names: frozenset[str]
    options: Any
    last_used: float
    _lora: Any
    _adapter: Adapter | None
    rest: Mapping[str, Any] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()
    initial_state: Mapping[str, Array] = field(default_factory=dict)
    _values: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        """The weights; those of a mapped file are read when they are first needed.

        Raises:
            AdapterError: If that file was replaced.
        """
        if self._adapter is None:
            assert self.path is not None
            adapter = load_adapter(self.path)
            if stamp_of(self.path) != self.stamp:
                raise AdapterError(
                    f"{self.path} was replaced since it was loaded",
                    hint="call `reload` to use the new one",
                )
            self._adapter = adapter
        return self._adapter

    @property
    def values(self) -> Mapping[str, Any]:
        """Every weight as an OrtValue over the same memory, by input name."""
        if not self._values:
            feeds = self.adapter.feeds()
            values = {name: as_ort_value(array) for name, array in feeds.items()}
            self._values = {**values, **self.rest}
        return self._values

    def described(self, name: str) -> LoadedAdapter:
        """What the session says of it under a name."""
        return LoadedAdapter(name, self.path, self.size, self.last_used)

    @property
    def replaced(self) -> bool:
        """Whether its file was replaced since it was read."""
        return self.path is not None and stamp_of(self.path) != self.stamp

    def refuse_overwritten(self) -> None:
        """Refuse a mapped file that was written into: its weights in memory changed too.

        If the file was cut short, even reading the weights would end the process.

        Raises:
            AdapterError: If something was written into the file.
        """
        if self.options is None or self.path is None:
            return
        now = stamp_of(self.path)
        if now != self.stamp and now[0] == self.stamp[0]:
            raise AdapterError(
                f"{self.path} was written into while it was mapped into memory",
                hint="write adapters to another file and move it there, then call `reload`",
            )


def as_ort_value(array: Array) -> Any:
    """An OrtValue on an array's own memory; bfloat16 included, which numpy lacks."""
    kind = onnxruntime().OrtValue
    if array.dtype == DTYPES["bfloat16"]:
        bits, number = array.view(np.uint16), ELEM_TYPES["bfloat16"]
        return kind.ortvalue_from_numpy_with_onnx_type(bits, number)
    return kind.ortvalue_from_numpy(array)


def read(source: Adapter | str | os.PathLike[str]) -> tuple[Adapter, OrtAdapter]:
    """Read an adapter from a file, or take one that is in memory.

    ONNX Runtime maps a file of a `mapped` format into memory itself.

    Returns:
        The weights, to be checked, and the adapter for runs. It does not keep the weights
        of a mapped file: ONNX Runtime has them.

    Raises:
        AdapterError: If the file is missing, damaged or of another kind.
    """
    if isinstance(source, Adapter):
        return source, _loaded(source, None, (0, 0, 0))
    path = Path(source).absolute()  # for a reload, when the working directory may differ
    while True:  # again if the file is replaced while it is read
        stamp = stamp_of(path)
        row = FORMATS.get(path.suffix)
        if row and row.mapped:
            adapter, (lora, options) = _mapped(path), _activated(path)
        else:
            adapter, lora, options = load_adapter(path), None, None
        if stamp_of(path) == stamp:
            return adapter, _loaded(adapter, path, stamp, lora, options)


def _mapped(path: Path) -> Adapter:
    """Read an adapter as views of its mapped file, only to check it."""
    if not path.is_file():  # to open a pipe would block
        return load_adapter(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # missing or empty, which `load_adapter` tells apart
        return load_adapter(path)
    return read_adapter(data, path)  # type: ignore[arg-type]


def _loaded(
    adapter: Adapter, path: Path | None, stamp: Stamp, lora: Any = None, options: Any = None
) -> OrtAdapter:
    feeds = adapter.feeds()
    size = adapter.size
    kept = None if lora else adapter
    return OrtAdapter(
        path,
        stamp,
        size,
        frozenset(feeds),
        options,
        time.time(),
        lora,
        kept,
        invocation_tokens=adapter.invocation_tokens,
        initial_state=adapter.initial_state,
    )


def in_memory(adapter: Adapter, read_before: OrtAdapter) -> OrtAdapter:
    """The part of an adapter that one file of a model takes, with the file it came from."""
    return _loaded(adapter, read_before.path, read_before.stamp)


def stamp_of(path: Path) -> Stamp:
    """The version of a file; zeros if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _activated(path: Path) -> tuple[Any, Any]:
    """Load a file as ONNX Runtime's own adapter, and make run options with it active."""
    ort = onnxruntime()
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    try:
        adapter.Load(str(path))
    except failures() as error:
        raise AdapterError(
            f"ONNX Runtime cannot load {path}: {shortened(error)}",
            hint="write it again with onnx-adapt",
        ) from error
    options.add_active_adapter(adapter)
    return adapter, options
