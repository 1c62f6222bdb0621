"""Read samples from files, from arrays in memory, or from an iterable of feeds."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.payloads import Source
from onnx_adapt.training.data import Dataset, Group
from onnx_adapt.training.losses import IGNORED
from onnx_adapt.training.tables import READERS, Table, is_text, read_table
from onnx_adapt.training.texts import Texts
from onnx_adapt.words import beside, count

Feeds = Mapping[str, Array]

DataArgument = str | os.PathLike[str] | Feeds | Iterable[Feeds] | Dataset
"""Data as a caller gives it: a file or folder, arrays by name, or the feeds of batches."""


def read_dataset(
    data: DataArgument,
    labels: str = "labels",
    *,
    text: Texts | None = None,
    classes: Sequence[str] = (),
) -> Dataset:
    """Read samples.

    Args:
        data: A `.npz`, `.csv`, `.jsonl` or `.parquet` file, a folder with one `.npy` file for
            each input, which stay on disk, arrays by name, or an iterable of batches.
        labels: The name of the labels among them; '' if there are none, as for a teacher.
            With texts `input_ids` means that the tokens are the labels, as for causal
            language models.
        text: How texts become inputs.
        classes: The names of the classes, where labels are texts; by default those that
            occur, in the order of the alphabet.

    Raises:
        TrainingError: If it cannot be read, or the arrays do not belong together.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, Mapping):
        arrays = {k: np.asarray(v) for k, v in data.items()}
        return _grouped([arrays], labels, "the data")
    if not isinstance(data, str | os.PathLike):
        items = [{k: np.asarray(v) for k, v in item.items()} for item in data]
        return _grouped(items, labels, "the data")
    path = Path(data)
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        arrays = {file.stem: _map(file) for file in files}
        return _grouped([arrays], labels, str(path), tuple(map(Source.of, files)))
    if not path.is_file():
        raise TrainingError(f"there is no file or folder {path}", hint=beside(path))
    if path.suffix.lower() in READERS:
        return _from_table(read_table(path), labels, str(path), text, classes)
    return _grouped([_read_npz(path)], labels, str(path))


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
        hint = "save the array with numpy.save(path, array)"
        raise TrainingError(f"cannot read {path}: {error}", hint=hint) from error


def _from_table(
    table: Table, labels: str, label: str, text: Texts | None, classes: Sequence[str]
) -> Dataset:
    """The rows of a table as samples; those of one shape become one group."""
    texts = [name for name, column in table.items() if name != labels and is_text(column)]
    if text is None and texts:
        raise TrainingError(
            f"column {texts[0]!r} of {label} holds texts",
            hint="--tokenizer tokenizer.json turns texts into inputs; else leave it out",
        )
    if text is not None:
        table = _with_tokens(table, text, texts, labels, label)
    names: tuple[str, ...] = ()
    if text is not None and labels == "input_ids":
        labels = "labels"
        table[labels] = [_without_padding(row) for row in _rows(table)]
    if labels in table and is_text(table[labels]):
        table[labels], names = _numbered(table[labels], classes, label)
    rows = [
        {name: _array(cell, name, label)[None] for name, cell in row.items()}
        for row in _rows(table)
    ]
    return _grouped(rows, labels, label, classes=names)


def _rows(table: Table) -> Iterator[dict[str, Any]]:
    for cells in zip(*table.values(), strict=True):
        yield dict(zip(table, cells, strict=True))


def _with_tokens(
    table: Table, text: Texts, texts: Sequence[str], labels: str, label: str
) -> Table:
    """A table with the tokens of its texts in place of the texts."""
    columns = text.columns or tuple(texts)
    for name in columns:
        if name not in table:
            raise TrainingError(
                f"{label} has no column {name!r}", hint=f"it has {', '.join(table)}"
            )
    if not 1 <= len(columns) <= (2 if text.columns else 1):
        raise TrainingError(
            f"{label} has {count(len(columns), 'column')} with texts: {', '.join(columns)}",
            hint="say which to read with --text COLUMN, twice for pairs",
        )
    rows = zip(*(table[name] for name in columns), strict=True)
    encoded = text.encode([[str(cell) for cell in row] for row in rows])
    kept = {k: v for k, v in table.items() if k == labels or k not in (*columns, *texts)}
    return {**kept, **{name: [row[name] for row in encoded] for name in text.inputs}}


def _without_padding(row: Mapping[str, Array]) -> Array:
    """The tokens of a text as labels: what attention does not see does not count."""
    seen = row.get("attention_mask", np.ones_like(row["input_ids"]))
    return np.where(seen, row["input_ids"], IGNORED)


def _numbered(
    column: Sequence[Any], classes: Sequence[str], label: str
) -> tuple[list[int], tuple[str, ...]]:
    """The numbers of classes that are given by name, and the names."""
    texts = [str(cell) for cell in column]
    names = tuple(classes) or tuple(sorted(set(texts)))
    numbers = {name: number for number, name in enumerate(names)}
    for row, cell in enumerate(texts):
        if cell not in numbers:
            raise TrainingError(
                f"sample {row} of {label} is of class {cell!r}",
                hint=f"the classes are {', '.join(names)}",
            )
    return [numbers[cell] for cell in texts], names


def _array(cell: Any, name: str, label: str) -> Array:
    try:
        return np.asarray(cell)
    except ValueError as error:
        raise TrainingError(
            f"{name!r} of {label} holds lists of different lengths in one sample"
        ) from error


def _grouped(
    items: Sequence[Feeds],
    labels: str,
    label: str,
    sources: tuple[Source, ...] = (),
    classes: tuple[str, ...] = (),
) -> Dataset:
    """Batches of samples as one dataset, those of one shape in one group.

    Raises:
        TrainingError: If the arrays do not belong together.
    """
    if not items:
        raise TrainingError(f"{label} has no samples")
    by_shape: dict[tuple[object, ...], list[tuple[Feeds, Array]]] = {}
    if not labels:
        items, labels = [_unlabelled(item) for item in items], _NO_LABELS
    at = 0
    for item in items:
        _check(item, labels, label)
        if sorted(item) != sorted(items[0]):
            raise TrainingError(
                f"the samples of {label} have different inputs: {', '.join(items[0])}, and "
                f"{', '.join(item)}"
            )
        numbers = np.arange(at, at + len(item[labels]))
        at += len(numbers)
        by_shape.setdefault(_shape_of(item), []).append((item, numbers))
    groups = tuple(_group(found, labels) for found in by_shape.values())
    return Dataset(groups, label, sources, classes)


_NO_LABELS = "labels"


def _unlabelled(item: Feeds) -> Feeds:
    """The same with labels that mean nothing."""
    rows = max((len(value) for value in item.values() if value.ndim), default=0)
    return {**item, _NO_LABELS: np.zeros(rows)}


def _shape_of(item: Feeds) -> tuple[object, ...]:
    """What samples of one group have in common: the shapes, and numbers that are for all."""
    return tuple(
        (name, value.shape[1:] if value.ndim else value.item())
        for name, value in sorted(item.items())
    )


def _group(found: Sequence[tuple[Feeds, Array]], labels: str) -> Group:
    first, numbers = found[0]
    if len(found) > 1:
        numbers = np.concatenate([each for _, each in found])
        first = {
            name: np.concatenate([item[name] for item, _ in found]) if value.ndim else value
            for name, value in first.items()
        }
    inputs = {name: value for name, value in first.items() if name != labels}
    return Group(inputs, first[labels], numbers, np.arange(len(numbers)))


def _check(arrays: Feeds, labels: str, label: str) -> None:
    """Refuse arrays that do not belong together."""
    if labels not in arrays:
        raise TrainingError(
            f"{label} has no {labels!r}; it has {', '.join(arrays) or 'nothing'}",
            hint="say what the labels are called: --labels NAME",
        )
    found = arrays[labels]
    if found.ndim == 0 or not len(found):
        raise TrainingError(f"{label} has no samples: {labels!r} is empty")
    for name, value in arrays.items():
        if value.ndim and len(value) != len(found):
            raise TrainingError(
                f"{label}: {name!r} has {len(value)} samples, and {labels!r} has {len(found)}"
            )
        if value.dtype.kind not in "fiub":
            raise TrainingError(f"{label}: {name!r} holds {value.dtype}, not numbers")
