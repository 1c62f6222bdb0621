"""Read samples from files, or from arrays in memory."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.payloads import Source
from onnx_adapt.training.data import Dataset, Group
from onnx_adapt.words import beside

DataArgument = str | os.PathLike[str] | Mapping[str, Array] | Dataset
"""Data as a caller gives it: a file, a folder of `.npy`, or arrays by name."""


def read_dataset(data: DataArgument, labels: str = "labels") -> Dataset:
    """Read samples.

    Args:
        data: A `.npz` file, a folder with one `.npy` file for each input, which stay on disk,
            or arrays by name.
        labels: The name of the labels among them.

    Raises:
        TrainingError: If it cannot be read, or the arrays do not belong together.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, Mapping):
        arrays = {k: np.asarray(v) for k, v in data.items()}
        return _dataset(arrays, labels, "the data")
    path = Path(data)
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        arrays = {file.stem: _map(file) for file in files}
        return _dataset(arrays, labels, str(path), tuple(map(Source.of, files)))
    if not path.is_file():
        raise TrainingError(f"there is no file or folder {path}", hint=beside(path))
    return _dataset(_read_npz(path), labels, str(path))


_SAVE = "save the arrays with numpy.savez(path, labels=..., **inputs)"
_UNREADABLE = (OSError, ValueError, EOFError, BadZipFile, zlib.error)


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                return {name: np.asarray(loaded[name]) for name in loaded}
    except _UNREADABLE as error:
        raise TrainingError(f"cannot read {path}: {error}", hint=_SAVE) from error
    raise TrainingError(f"{path} is a single array", hint=_SAVE)


def _map(path: Path) -> Array:
    try:
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except _UNREADABLE as error:
        raise TrainingError(
            f"cannot read {path}: {error}", hint="numpy.save writes it"
        ) from error


def _dataset(
    arrays: Mapping[str, Array], labels: str, label: str, sources: tuple[Source, ...] = ()
) -> Dataset:
    """Arrays with one shape for all samples.

    Raises:
        TrainingError: If they do not belong together.
    """
    if labels not in arrays:
        raise TrainingError(
            f"{label} has no {labels!r}; it has {', '.join(arrays) or 'nothing'}",
            hint="say what the labels are called: --labels NAME",
        )
    found = arrays[labels]
    if found.ndim == 0 or not len(found):
        raise TrainingError(f"{label} has no samples: {labels!r} is empty")
    inputs = {name: value for name, value in arrays.items() if name != labels}
    for name, value in inputs.items():
        if value.ndim and len(value) != len(found):
            raise TrainingError(
                f"{label}: {name!r} has {len(value)} samples, and {labels!r} has {len(found)}"
            )
    for name, value in arrays.items():
        if value.dtype.kind not in "fiub":
            raise TrainingError(f"{label}: {name!r} holds {value.dtype}, not numbers")
    rows = np.arange(len(found))
    return Dataset((Group(inputs, found, rows, rows),), label, sources)
