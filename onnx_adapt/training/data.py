"""The data of a training: arrays by input, with labels; read, split, shuffled and batched."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.words import beside

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples, one for each place on the first axis of the arrays.

    Attributes:
        inputs: The model's inputs by name, `(samples, ...)`; a number alone is for all.
        labels: The labels, `(samples, ...)`.
        label: What the samples are called in messages, such as their file.
    """

    inputs: Mapping[str, Array]
    labels: Array
    label: str = "the data"

    @property
    def size(self) -> int:
        """How many samples there are."""
        return len(self.labels)

    def take(self, places: Array) -> Dataset:
        """Some of the samples."""
        inputs = {k: v[places] if v.ndim else v for k, v in self.inputs.items()}
        return Dataset(inputs, self.labels[places], self.label)

    def feeds(self, labels: str) -> Feeds:
        """All samples as what is fed to a step model, with the labels under a name."""
        arrays = {**self.inputs, labels: self.labels}
        return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


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
        return _dataset({k: np.asarray(v) for k, v in data.items()}, labels, "the data")
    path = Path(data)
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        arrays = {file.stem: _load(file, mmap_mode="r") for file in files}
        return _dataset(arrays, labels, str(path))
    if not path.is_file():
        raise TrainingError(f"there is no file or folder {path}", hint=beside(path))
    loaded = _load(path)
    if isinstance(loaded, np.ndarray):
        raise TrainingError(f"{path} is a single array", hint=_SAVE)
    return _dataset(dict(loaded), labels, str(path))


_SAVE = "save the arrays with numpy.savez(path, labels=..., **inputs)"


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> Any:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TrainingError(f"cannot read {path}: {error}", hint=_SAVE) from error


def _dataset(arrays: Mapping[str, Array], labels: str, label: str) -> Dataset:
    """Check that arrays belong together."""
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
    return Dataset(inputs, found, label)


def split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Take a random share of the samples away for validation.

    Returns:
        The samples to train with, and those to validate with.
    """
    order = np.random.default_rng((seed, 0)).permutation(data.size)
    count = round(data.size * share)
    return data.take(np.sort(order[count:])), data.take(np.sort(order[:count]))


def batches(data: Dataset, size: int, seed: int, epoch: int) -> Iterator[Dataset]:
    """The samples of one epoch in a random order, batch by batch; the last may be smaller.

    The order depends on the seed and the epoch alone, so a resumed run sees the same.
    """
    order = np.random.default_rng((seed, 1, epoch)).permutation(data.size)
    for start in range(0, len(order), size):
        yield data.take(order[start : start + size])


def in_order(data: Dataset, size: int) -> Iterator[Dataset]:
    """The samples as they come, batch by batch."""
    for start in range(0, data.size, size):
        yield data.take(np.arange(start, min(start + size, data.size)))
