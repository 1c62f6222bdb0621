"""Metrics of predictions, by which the best weights are chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that says how good predictions are; more is better.

    Attributes:
        keep: What is kept of the outputs `(rows, ...)` of each batch.
        compute: From all that was kept, and the labels, to the number.
    """

    keep: Callable[[Array], Array]
    compute: Callable[[Array, Array], float]


def _classes(outputs: Array) -> Array:
    """The class that the largest output names, `(rows, ...)`."""
    return np.asarray(outputs.argmax(-1))


def _directions(outputs: Array) -> Array:
    """Each row as a vector of length 1, `(rows, width)`."""
    rows = outputs.reshape(len(outputs), -1).astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-12))


def accuracy(found: Array, labels: Array) -> float:
    """The share of labels that were found."""
    return float((found == labels).mean()) if labels.size else 0.0


def f1(found: Array, labels: Array) -> float:
    """The mean over the classes of the harmonic mean of precision and recall."""
    scores = []
    for label in np.union1d(labels, found):
        both = float(((found == label) & (labels == label)).sum())
        either = float((found == label).sum() + (labels == label).sum())
        scores.append(2 * both / either)
    return float(np.mean(scores)) if scores else 0.0


def recall(rows: Array, labels: Array, *, among: int) -> float:
    """The share of rows that have one of their label among the rows most like them.

    Rows whose label no other row has do not count.
    """
    found, counted = 0, 0
    for i, row in enumerate(rows):
        likeness = rows @ row
        likeness[i] = -np.inf
        same = labels == labels[i]
        if same.sum() < 2:
            continue
        nearest = np.argsort(-likeness, kind="stable")[:among]
        found += bool(same[nearest].any())
        counted += 1
    return found / counted if counted else 0.0


def read_metric(name: str) -> Metric | None:
    """The metric of a name; None for the loss itself.

    Raises:
        TrainingError: If there is none.
    """
    if name == "loss":
        return None
    if name in ("accuracy", "f1"):
        return Metric(_classes, accuracy if name == "accuracy" else f1)
    if at := re.fullmatch(r"recall@([1-9]\d{0,5})", name):
        return Metric(_directions, partial(recall, among=int(at[1])))
    raise TrainingError(f"unknown metric {name!r}", hint=f"one of {', '.join(NAMES)}")


NAMES = ("loss", "accuracy", "f1", "recall@K")
"""The metrics by name, as people are told of them."""


def require_labels(name: str, *, classes: bool, groups: bool) -> None:
    """Refuse a metric that says nothing of the labels of a loss.

    Args:
        name: The metric.
        classes: Whether the labels are classes of the output.
        groups: Whether each row has one integer as its label.

    Raises:
        TrainingError: If there is no such metric, or it needs other labels.
    """
    metric = read_metric(name)
    fits = groups if name.startswith("recall") else classes
    if metric is not None and not fits:
        wanted = "one integer for each sample" if name.startswith("recall") else "classes"
        raise TrainingError(
            f"metric {name!r} needs labels that are {wanted}; those of this loss are not",
            hint="choose by the loss itself",
        )
