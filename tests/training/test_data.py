"""Samples are split, shuffled and batched by a seed, and files that change are noticed."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from onnx_adapt.errors import TrainingError
from onnx_adapt.training.data import Dataset, Order, split
from onnx_adapt.training.reading import read_dataset


def _data(labels: list[int]) -> Dataset:
    return read_dataset({"x": np.arange(len(labels))[:, None], "labels": np.array(labels)})


def _numbers(data: Dataset, order: Order, epoch: int = 0) -> list[list[int]]:
    return [data.read(*item).numbers.tolist() for item in order.plan(data, epoch)]


def test_each_sample_is_in_one_batch_of_an_epoch_and_another_epoch_has_another_order() -> None:
    data = _data([0] * 10)
    one, two = (_numbers(data, Order(4), epoch) for epoch in (0, 1))
    assert sorted(chain(*one)) == sorted(chain(*two)) == list(range(10))
    assert sorted(map(len, one)) == [2, 4, 4]
    assert one != two
    assert one == _numbers(data, Order(4), 0)
    assert _numbers(data, Order(4, seed=1)) != one


def test_samples_of_a_label_stay_together_where_they_are_compared() -> None:
    data = _data([0, 1, 2, 3, 0, 1, 2, 3, 0])
    for batch in _numbers(data, Order(4, paired=True)):
        labels = [number % 4 for number in batch]
        assert len(batch) == 1 or all(labels.count(label) >= 2 for label in labels)
    kept, held = split(data, 0.5, 0, paired=True)
    for part in (kept, held):
        labels = [int(n) % 4 for g in part.groups for n in g.numbers[g.rows]]
        assert len(labels) >= 4
        assert sum(labels.count(label) == 1 for label in labels) <= 1


def test_a_split_takes_each_sample_once() -> None:
    kept, held = split(_data([0] * 10), 0.3, 0)
    assert (kept.size, held.size) == (7, 3)
    numbers = [g.numbers[g.rows] for part in (kept, held) for g in part.groups]
    assert sorted(np.concatenate(numbers)) == list(range(10))


def test_a_folder_stays_on_disk_and_is_read_batch_by_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(12.0).reshape(6, 2))
    np.save(tmp_path / "labels.npy", np.arange(6))
    data = read_dataset(tmp_path)
    assert isinstance(data.groups[0].inputs["x"], np.memmap)
    kept, _ = split(data, 0.5, 0)
    assert isinstance(kept.groups[0].inputs["x"], np.memmap)
    batch = kept.first(2)
    np.testing.assert_array_equal(batch.inputs["x"][:, 0], 2 * batch.numbers)


def test_a_file_that_changes_under_the_run_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((6, 2)))
    np.save(tmp_path / "labels.npy", np.arange(6))
    data = read_dataset(tmp_path)
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    with pytest.raises(TrainingError, match=r"x\.npy has changed"):
        data.first(2)
