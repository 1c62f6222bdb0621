"""Metrics give the numbers that scikit-learn and a count by hand give."""

import numpy as np
import pytest

from onnx_adapt.errors import TrainingError
from onnx_adapt.training.metrics import read_metric, require_labels

OUTPUTS = np.eye(3)[[0, 1, 1, 2, 2, 0]] + 0.1
LABELS = np.array([0, 1, 2, 2, 1, 0])


def _score(name: str, outputs: np.ndarray, labels: np.ndarray) -> float:
    metric = read_metric(name)
    assert metric is not None
    return metric.compute(metric.keep(outputs), labels)


def test_accuracy_and_f1() -> None:
    assert _score("accuracy", OUTPUTS, LABELS) == pytest.approx(4 / 6)
    # sklearn.metrics.f1_score(average="macro"): 1, 1/2 and 1/2
    assert _score("f1", OUTPUTS, LABELS) == pytest.approx(2 / 3)


def test_a_class_that_is_only_predicted_counts_in_f1() -> None:
    # sklearn: class 0 is found for one of its two rows, class 2 never right
    assert _score("f1", np.eye(3)[[0, 2]], np.array([0, 0])) == pytest.approx((2 / 3 + 0) / 2)


def test_recall_counts_rows_with_one_of_their_label_near() -> None:
    angles = np.array([0.0, 0.1, 0.25, 1.5, 1.55])
    rows = np.stack([np.cos(angles), np.sin(angles)], 1) * np.arange(1, 6)[:, None]
    labels = np.array([0, 1, 0, 1, 2])  # no other row has label 2, so the last does not count
    # nearest: 1, 0, 1, 4; second nearest: 2, 2, 0, 2
    assert _score("recall@1", rows, labels) == 0
    assert _score("recall@2", rows, labels) == pytest.approx(2 / 4)
    assert _score("recall@3", rows, labels) == pytest.approx(4 / 4)


@pytest.mark.parametrize("name", ["recall", "recall@0", "recall@x", "bleu"])
def test_an_unknown_metric_is_refused(name: str) -> None:
    with pytest.raises(TrainingError, match="unknown metric") as caught:
        read_metric(name)
    assert "recall@K" in caught.value.hint


def test_a_metric_that_says_nothing_of_the_labels_is_refused() -> None:
    with pytest.raises(TrainingError, match="needs labels that are classes"):
        require_labels("accuracy", classes=False, groups=True)
    require_labels("recall@5", classes=False, groups=True)
