"""Losses agree with PyTorch's, and their gradients with differences in float64."""

from typing import Any

import numpy as np
import onnx
import pytest
from gradient_checks import evaluator, gradient_model
from onnx import helper
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.ort import failures
from onnx_adapt.training.losses import IGNORED, settings_of
from onnx_adapt.training.step_model import LABELS, add_loss

X = np.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5], [-0.75, 0.0, 1.0], [2.0, -2.0, 0.5]])
CLASSES = np.array([2, 0, IGNORED, 1])
TARGETS = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.25, 1.0, 1.0], [0.0, 0.0, 1.0]])
GROUPS = np.array([0, 1, 0, 1])
WEIGHTS = [1.0, 2.0, 0.5]

CASES: dict[str, tuple[str, dict[str, Any], Array, float]] = {
    # torch 2.13: torch.nn.functional, in float64
    "cross entropy": ("cross_entropy", {}, CLASSES, 1.6031799426102615),
    "weighted": ("cross_entropy", {"class_weights": WEIGHTS}, CLASSES, 2.5443316705351515),
    "smoothed": ("cross_entropy", {"label_smoothing": 0.1}, CLASSES, 1.6170688314991504),
    "weighted and smoothed": (
        "cross_entropy",
        {"class_weights": WEIGHTS, "label_smoothing": 0.1},
        CLASSES,
        2.5049784025045674,
    ),
    "mse": ("mse", {}, TARGETS, 1.4427083333333333),
    "mae": ("mae", {}, TARGETS, 0.9791666666666666),
    "huber": ("huber", {}, TARGETS, 0.5859375),
    "bce": ("bce", {}, TARGETS, 0.7687007704368437),
    "cosine": ("cosine", {}, TARGETS, 0.6090694668069628),
    "kl": ("kl", {"temperature": 2.0}, TARGETS, 0.6134238724549367),
    # torch.nn.functional.cross_entropy(ignore_index=1)
    "another label that does not count": (
        "cross_entropy",
        {"ignore_index": 1},
        np.array([2, 0, 1, 1]),
        0.29663158022997943,
    ),
    # torch.cdist, with the farthest row of the label and the nearest of another
    "triplet": ("triplet", {"margin": 1.0}, GROUPS, 0.6695122556930706),
    "contrastive": ("contrastive", {"temperature": 0.5}, GROUPS, 0.5708811427962917),
}


def _model(loss: str, settings: dict[str, Any], shape: tuple[int, ...]) -> onnx.ModelProto:
    """A model whose output is its input, with a loss on it."""
    x, y = (helper.make_tensor_value_info(name, 1, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = oa.Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    add_loss(model, "y", loss, settings)
    model.proto.graph.output.append(helper.make_tensor_value_info("loss", 1, []))
    return model.proto


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_pytorchs(name: str) -> None:
    loss, settings, labels, wanted = CASES[name]
    typed = labels if labels.dtype == np.int64 else labels.astype(np.float32)
    feeds = {"x": X.astype(np.float32), LABELS: typed}
    found = run(_model(loss, settings, X.shape), feeds)[1]
    assert found.shape == ()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_a_loss_agrees_with_differences(name: str) -> None:
    loss, settings, labels, _ = CASES[name]
    typed = labels if labels.dtype == np.int64 else labels.astype(np.float32)
    proto = _model(loss, settings, X.shape)
    model, _ = gradient_model(proto, ["x"])
    feeds = {"x": X.astype(np.float32), LABELS: typed}
    grad = run(model, feeds)[-1]
    np.testing.assert_allclose(grad, _differences(proto, feeds), rtol=2e-2, atol=2e-3)


def _differences(proto: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    """Central differences of the loss, by ONNX Runtime."""
    grad = np.zeros_like(feeds["x"])
    for place in np.ndindex(grad.shape):
        move = np.zeros_like(grad)
        move[place] = 1e-2
        up, down = (run(proto, {**feeds, "x": feeds["x"] + s * move})[1] for s in (1, -1))
        grad[place] = (up - down) / 2e-2
    return grad


def test_shifted_cross_entropy_holds_each_position_against_the_next_label() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    labels = np.array([[0, 1, 2, 1], [2, 0, IGNORED, 1]])
    shifted = run(
        _model("cross_entropy", {"shift": True}, logits.shape), {"x": logits, LABELS: labels}
    )
    plain = run(
        _model("cross_entropy", {}, (2, 3, 3)), {"x": logits[:, :-1], LABELS: labels[:, 1:]}
    )
    np.testing.assert_allclose(shifted[1], plain[1], rtol=1e-6)


def test_an_unknown_loss_or_setting_is_named() -> None:
    with pytest.raises(TrainingError, match="unknown loss 'hinge'"):
        settings_of("hinge", {})
    with pytest.raises(TrainingError, match="no setting 'smoothing'") as caught:
        settings_of("cross_entropy", {"smoothing": 0.1})
    assert "label_smoothing" in caught.value.hint


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a text": ("huber", {"delta": "x"}, "a number between 0 and inf"),
    "zero": ("kl", {"temperature": 0}, "a number between"),
    "too much": ("cross_entropy", {"label_smoothing": 2}, "between 0 and 1"),
    "a number for a list": ("cross_entropy", {"class_weights": 3}, "a list of numbers"),
    "texts": ("cross_entropy", {"class_weights": ["a"]}, "a list of numbers"),
    "a number for yes": ("cross_entropy", {"shift": 1}, "true or false"),
    "a fraction": ("cross_entropy", {"ignore_index": 0.5}, "an integer"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_setting_that_is_not_possible_is_refused(what: str) -> None:
    loss, settings, hint = SETTINGS[what]
    with pytest.raises(TrainingError, match="setting") as caught:
        settings_of(loss, settings)
    assert hint in caught.value.hint


@pytest.mark.parametrize("loss", ["cross_entropy", "contrastive", "triplet"])
def test_a_batch_in_which_nothing_counts_does_no_harm(loss: str) -> None:
    labels = np.full(4, IGNORED) if loss == "cross_entropy" else np.arange(4)
    settings = settings_of(loss, {})
    model, _ = gradient_model(_model(loss, settings, X.shape), ["x"])
    found, grad = run(model, {"x": X.astype(np.float32), LABELS: labels})[1:]
    assert found == 0
    assert not grad.any()


def test_labels_of_another_shape_are_not_repeated() -> None:
    model = _model("mse", {}, ("n", "k"))  # type: ignore[arg-type]
    with pytest.raises(failures(), match="Reshape"):
        run(model, {"x": X.astype(np.float32), LABELS: np.zeros((4, 1), np.float32)})


def test_the_reference_evaluates_losses_too() -> None:
    """An evaluator that is not ONNX Runtime gives the same number."""
    proto = _model("mse", {}, X.shape)
    feeds = {"x": X.astype(np.float32), LABELS: TARGETS.astype(np.float32)}
    np.testing.assert_allclose(evaluator(proto).run(["loss"], feeds)[0], 1.4427083, rtol=1e-6)
