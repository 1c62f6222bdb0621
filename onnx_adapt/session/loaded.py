"""An adapter as ONNX Runtime takes it: loaded, with everything it refers to held."""

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
"""What changes when a file is replaced: inode, size, time of change in nanoseconds."""


@dataclass(slots=True, eq=False)
class Loaded:
    """An adapter in memory, ready for any number of runs.

    ONNX Runtime holds no reference to a LoraAdapter, nor to the arrays behind a value: a
    run that has lost them gives the base's outputs. They live as long as this object.

    Attributes:
        path: The file, or None for an adapter made in memory.
        stamp: Of that file when it was read.
        size: Bytes of all weights.
        names: The model inputs it feeds.
        options: Run options with the adapter active, if ONNX Runtime mapped the file.
        last_used: When a run last asked for it (`time.time()`).
        rest: Weights that keep the slots it does not cover off, by input name.
    """

    path: Path | None
    stamp: Stamp
    size: int
    names: frozenset[str]
    options: Any
    last_used: float
    _held: Any
    _adapter: Adapter | None
    rest: Mapping[str, Any] = field(default_factory=dict)
    _values: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        """The weights; of a file that ONNX Runtime mapped they are read when asked for.

        Raises:
            AdapterError: If that file is another one by now.
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

    @property
    def replaced(self) -> bool:
        """Whether its file is another one by now."""
        return self.path is not None and stamp_of(self.path) != self.stamp

    def refuse_overwritten(self) -> None:
        """Refuse a mapped file into which something was written: its weights changed too.

        Of one that was cut short even reading would end the process.

        Raises:
            AdapterError: If it was.
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


def read(source: Adapter | str | os.PathLike[str]) -> tuple[Adapter, Loaded]:
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
    path = Path(source).absolute()  # the working directory may change until it is reloaded
    while True:  # until what was read is what stays: files may be replaced meanwhile
        stamp = stamp_of(path)
        row = FORMATS.get(path.suffix)
        if row and row.mapped:
            adapter, (held, options) = _mapped(path), _activated(path)
        else:
            adapter, held, options = load_adapter(path), None, None
        if stamp_of(path) == stamp:
            return adapter, _loaded(adapter, path, stamp, held, options)


def _mapped(path: Path) -> Adapter:
    """An adapter as views of its file, which they hold open: to be checked and let go of."""
    if not path.is_file():  # a pipe would be waited for
        return load_adapter(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # missing, or empty: reading it tells which
        return load_adapter(path)
    return read_adapter(data, path)  # type: ignore[arg-type]


def _loaded(
    adapter: Adapter, path: Path | None, stamp: Stamp, held: Any = None, options: Any = None
) -> Loaded:
    feeds = adapter.feeds()
    size = sum(array.nbytes for array in feeds.values())
    kept = None if held else adapter
    return Loaded(path, stamp, size, frozenset(feeds), options, time.time(), held, kept)


def stamp_of(path: Path) -> Stamp:
    """Tells one version of a file from the next; zeros if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _activated(path: Path) -> tuple[Any, Any]:
    """ONNX Runtime's own adapter on a file, and run options in which it is active."""
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
