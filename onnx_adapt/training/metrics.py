"""Metrics of predictions, by which the best weights are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.training.losses import IGNORED


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that says how good predictions are.

    Attributes:
        compute: From outputs `(samples, ...)` and labels to the number.
        larger_is_better: Whether more is better.
    """

    compute: Callable[[Array, Array], float]
    larger_is_better: bool = True


def accuracy(outputs: Array, labels: Array) -> float:
    """The share of labels that the largest output names."""
    counts = labels != IGNORED
    return float((outputs.argmax(-1) == labels)[counts].mean()) if counts.any() else 0.0


def f1(outputs: Array, labels: Array) -> float:
    """The mean over the classes of the harmonic mean of precision and recall."""
    counts = labels != IGNORED
    found, wanted = outputs.argmax(-1)[counts], labels[counts]
    scores = []
    for label in np.unique(wanted):
        both = float(((found == label) & (wanted == label)).sum())
        either = float((found == label).sum() + (wanted == label).sum())
        scores.append(2 * both / either)
    return float(np.mean(scores)) if scores else 0.0


def recall_at_one(outputs: Array, labels: Array) -> float:
    """The share of rows whose most alike other row has the same label, by the cosine."""
    rows = outputs.reshape(len(outputs), -1)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    likeness = rows @ rows.T
    np.fill_diagonal(likeness, -np.inf)
    return float((labels[likeness.argmax(1)] == labels).mean())


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy),
    "f1": Metric(f1),
    "recall": Metric(recall_at_one),
}
"""The metrics by name; `loss` is always there as well."""


def read_metric(name: str) -> Metric | None:
    """The metric of a name; None for the loss itself.

    Raises:
        TrainingError: If there is none.
    """
    if name == "loss":
        return None
    if name not in METRICS:
        raise TrainingError(
            f"unknown metric {name!r}", hint=f"one of loss, {', '.join(METRICS)}"
        )
    return METRICS[name]
