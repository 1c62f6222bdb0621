"""The data of a training: samples in groups of one shape; split, shuffled and batched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.payloads import Source

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that are fed together.

    Attributes:
        inputs: The model's inputs by name, `(samples, ...)`; a number alone is for all.
        labels: The labels, `(samples, ...)`.
        numbers: Which samples of the data they are, from 0.
        label: What the data is called in messages, such as its file.
    """

    inputs: Mapping[str, Array]
    labels: Array
    numbers: Array
    label: str = "the data"

    @property
    def size(self) -> int:
        """How many samples there are."""
        return len(self.labels)

    @property
    def name(self) -> str:
        """The batch in messages: its data, and which samples of it."""
        shown = ", ".join(map(str, self.numbers[:_SHOWN]))
        more = f" and {self.size - _SHOWN} more" if self.size > _SHOWN else ""
        return f"samples {shown}{more} of {self.label}"

    def take(self, rows: Array) -> Batch:
        """Some of the samples, by their places in the batch."""
        inputs = {k: v[rows] if v.ndim else v for k, v in self.inputs.items()}
        return Batch(inputs, self.labels[rows], self.numbers[rows], self.label)

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in smaller ones, in order; the last may be smaller still."""
        for start in range(0, self.size, size):
            yield self.take(np.arange(start, min(start + size, self.size)))

    def feeds(self, labels: str) -> Feeds:
        """All samples as what is fed to a step model, with the labels under a name."""
        arrays = {**self.inputs, labels: self.labels}
        return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


_SHOWN = 8
"""How many samples of a batch are named in messages."""


@dataclass(frozen=True, slots=True)
class Group:
    """Samples whose arrays have one shape.

    Attributes:
        inputs: The model's inputs by name, `(rows, ...)`; a number alone is for all.
        labels: The labels, `(rows, ...)`.
        numbers: Which samples of the data the rows are, `(rows,)`.
        rows: The rows that count, `(samples,)`; the others were held back.
    """

    inputs: Mapping[str, Array]
    labels: Array
    numbers: Array
    rows: Array


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples, those of one shape in one group. Nothing is read before it is needed.

    Attributes:
        groups: The groups.
        label: What the data is called in messages, such as its file.
        sources: Files that stay on disk while the data is used.
        classes: The names of the classes, if the labels were texts.
    """

    groups: tuple[Group, ...]
    label: str = "the data"
    sources: tuple[Source, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many samples there are."""
        return sum(len(group.rows) for group in self.groups)

    def take(self, numbers: Array) -> Dataset:
        """Some of the samples, by their numbers."""
        groups = (
            replace(group, rows=group.rows[np.isin(group.numbers[group.rows], numbers)])
            for group in self.groups
        )
        return replace(self, groups=tuple(g for g in groups if len(g.rows)))

    def first(self, count: int) -> Batch:
        """The first samples of the largest group, as one batch."""
        largest = max(self.groups, key=lambda group: len(group.rows))
        return self.read(largest, largest.rows[:count])

    def read(self, group: Group, rows: Array) -> Batch:
        """Some rows of a group.

        Raises:
            TrainingError: If a file of the data has changed.
        """
        for source in self.sources:
            if not source.is_unchanged():
                raise TrainingError(
                    f"{source.path} has changed while it was used",
                    hint="train from the start on data that stays as it is",
                )
        whole = Batch(group.inputs, group.labels, group.numbers, self.label)
        return whole.take(rows)


@dataclass(frozen=True, slots=True)
class Order:
    """In what order samples are taken.

    Attributes:
        size: Samples in one batch.
        seed: Seed of the order.
        paired: Whether samples of one label stay side by side, two and two, as losses that
            compare them need it.
        whole: Whether samples that do not fill a batch are left out of an epoch.
    """

    size: int
    seed: int = 0
    paired: bool = False
    whole: bool = False

    def plan(self, data: Dataset, epoch: int) -> list[tuple[Group, Array]]:
        """The batches of one epoch: a group, and the rows of it.

        The order depends on the seed and the epoch alone, so a resumed run sees the same.

        Raises:
            TrainingError: If there is no batch.
        """
        rng = np.random.default_rng((self.seed, 1, epoch))
        found: list[tuple[Group, Array]] = []
        for group in data.groups:
            order, _ = _shuffled(group, rng, self.paired)
            pieces = [order[at : at + self.size] for at in range(0, len(order), self.size)]
            found += [(group, p) for p in pieces if len(p) == self.size or not self.whole]
        if not found:
            raise TrainingError(
                f"{data.label} has {data.size} samples, fewer than one batch of {self.size}"
            )
        return [found[place] for place in rng.permutation(len(found))]


def _shuffled(group: Group, rng: np.random.Generator, paired: bool) -> tuple[Array, Array]:
    """The rows of a group in a random order, and how many are in each of its units.

    Samples of a unit stay together: one, or two of one label. An example: with the labels
    `a b a b a` the order may be `4 0 3 1 2`, and the units are of 2, 2 and 1.
    """
    rows = rng.permutation(group.rows)
    if not paired:
        return rows, np.ones(len(rows), np.int64)
    labels = group.labels[rows].reshape(len(rows), -1)
    by_label = rows[np.lexsort(labels.T[::-1])]  # it keeps the random order within a label
    _, counts = np.unique(labels, axis=0, return_counts=True)
    units = []
    for same in np.split(by_label, np.cumsum(counts)[:-1]):
        units += [same[at : at + 2] for at in range(0, len(same), 2)]
    shuffled = [units[place] for place in rng.permutation(len(units))]
    shuffled.sort(key=len, reverse=True)  # single ones last, so that no pair is cut
    return np.concatenate(shuffled), np.array([len(unit) for unit in shuffled])


def split(
    data: Dataset, share: float, seed: int, *, paired: bool = False
) -> tuple[Dataset, Dataset]:
    """Take a random share of the samples away for validation.

    Returns:
        The samples to train with, and those to validate with.
    """
    rng = np.random.default_rng((seed, 0))
    held = [np.zeros(0, np.int64)]
    for group in data.groups:
        rows, sizes = _shuffled(group, rng, paired)
        count = int(sizes[: round(len(sizes) * share)].sum())
        held.append(group.numbers[rows[:count]])
    apart = np.concatenate(held)
    everything = np.concatenate([group.numbers[group.rows] for group in data.groups])
    return data.take(np.setdiff1d(everything, apart)), data.take(apart)


def in_order(data: Dataset, size: int) -> Iterator[Batch]:
    """The samples as they come, batch by batch; each batch has one shape."""
    for group in data.groups:
        for start in range(0, len(group.rows), size):
            yield data.read(group, group.rows[start : start + size])
