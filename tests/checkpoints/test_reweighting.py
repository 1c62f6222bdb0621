"""Weights that are computed from the base's own: replaced, or a slot of the difference."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from adapter_models import B2, W1, W2, peft_folder, saved_model
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.checkpoints.edits import Edit, Reweight, Weighed
from onnx_adapt.checkpoints.readers.peft_methods import table
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

RNG = np.random.default_rng(8)
X = RNG.standard_normal((2, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def _mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that multiplies the weight, and the bias if it is told so, by a matrix."""

    def edits(found: ModuleTensors) -> Iterator[Edit]:
        left = found.parts["left_l"].astype(np.float64)

        def compute(weight: Array, bias: Array | None) -> Weighed:
            turned = np.tensordot(left, weight, axes=1)
            shift = found.config.get("shift", 0)
            if shift:
                return turned, (0 if bias is None else left @ bias) + np.full(len(left), shift)
            return turned, bias

        yield Reweight(found.module, compute, found.config.get("bound"))

    monkeypatch.setitem(table.METHODS, "TURNED", table.Method(("left_l",), edits))


def _folder(path: Path, config: dict, **left: Array) -> Path:
    tensors = {
        f"base_model.model.{module}.left_l": value.astype(np.float32)
        for module, value in left.items()
    }
    return peft_folder(path, tensors, peft_type="TURNED", **config)


def _expected(left: Array, shift: float = 0) -> Array:
    """What fc2 gives if it is turned, from the float32 numbers that PyTorch would have."""
    hidden = np.maximum(X @ W1.T, 0)
    return np.asarray(hidden @ (left @ W2).T + (left @ B2 + shift if shift else B2))


FULL = RNG.standard_normal((4, 4)).astype(np.float32)
ONE = np.eye(4, dtype=np.float32) + np.outer([1, -2, 0.5, 3], [1, 2, 0, 1])


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize(
    ("left", "config", "slots", "replaced"),
    [
        (FULL, {}, 0, ["base.fc2.weight"]),
        (FULL, {"shift": 3.0}, 0, ["base.fc2.bias", "base.fc2.weight"]),
        (ONE, {"bound": 1}, 1, []),
        (ONE, {"bound": 1, "shift": 3.0}, 1, []),
        (ONE, {"bound": 2}, 0, ["base.fc2.weight"]),  # above a third of 4
        (FULL, {"bound": 1}, 0, ["base.fc2.weight"]),  # the bound does not hold
    ],
)
def test_a_reweighted_layer_is_replaced_or_a_slot_whichever_is_smaller(
    left: Array, config: dict, slots: int, replaced: list[str], baked: bool, tmp_path: Path
) -> None:
    folder = _folder(tmp_path / "a", config, fc2=left)
    base = oa.open_model(saved_model(tmp_path / "m.onnx"))
    checkpoint = oa.load_checkpoint(folder, base)
    assert len(checkpoint.slots) == slots
    assert sorted(checkpoint.adapter.replaced) == replaced
    adapted = oa.insert_checkpoint(base, checkpoint, baked=baked)
    report = oa.verify(base, adapted, adapter=checkpoint.adapter)
    assert report.passed, [check for check in report.checks if not check.passed]
    feeds = {"x": X, **({} if baked else checkpoint.adapter.feeds())}
    expected = _expected(left, config.get("shift", 0))
    np.testing.assert_allclose(run(adapted, feeds)[0], expected, rtol=1e-5, atol=1e-4)
    again = oa.save_model(oa.remove(adapted), tmp_path / "again.onnx").path
    assert again.read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_a_layer_without_a_bias_gets_the_new_one_from_a_slot(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", {"shift": 3.0}, fc1=FULL)
    base = oa.open_model(saved_model(tmp_path / "m.onnx"))
    checkpoint = oa.load_checkpoint(folder, base)
    assert list(checkpoint.adapter.replaced) == ["base.fc1.weight"]
    assert [slot.name for slot in checkpoint.slots] == ["fc1"]
    found = run(oa.insert_checkpoint(base, checkpoint), {"x": X, **checkpoint.adapter.feeds()})
    expected = np.maximum(X @ (FULL @ W1).T + 3, 0) @ W2.T + B2
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-4)


def test_a_second_adapter_of_the_method_fits_the_same_model(tmp_path: Path) -> None:
    base = oa.open_model(saved_model(tmp_path / "m.onnx"))
    first = _folder(tmp_path / "a", {}, fc2=FULL)
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(first, base))
    other = RNG.standard_normal((4, 4)).astype(np.float32)
    adapter = oa.convert(_folder(tmp_path / "b", {}, fc2=other), adapted)
    found = run(adapted, {"x": X, **adapter.feeds()})[0]
    np.testing.assert_allclose(found, _expected(other), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (np.ones((5, 4)), r"trained weight is \[5, 4\]"),
        (np.eye(5), "does not fit the base's weight"),
        (np.full((4, 4), np.nan), "NaN or infinity"),
        (np.diag([3e38, 3e38, 3e38, 3e38]), "NaN or infinity"),
    ],
)
def test_what_gives_no_weight_for_the_layer_is_refused(
    left: Array, words: str, tmp_path: Path
) -> None:
    folder = _folder(tmp_path / "a", {}, fc2=left)
    base = oa.open_model(saved_model(tmp_path / "m.onnx"))
    with pytest.raises(CheckpointError, match=words):
        oa.load_checkpoint(folder, base)
