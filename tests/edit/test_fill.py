"""Adapters into models and out of them: fill, bake and extract."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from adapter_models import (
    B2,
    W1,
    W2,
    adapted,
    bumped,
    lora,
    lora_on,
    peft_folder,
    saved_model,
    trained,
    two_layers,
    weights,
)
from slot_models import passes, run, session

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
FORMATS = ["safetensors", "onnx_adapter", "npz"]


def _bytes(model: oa.Model, path: Path) -> bytes:
    oa.save_model(model, path)
    return path.read_bytes()


def test_a_filled_adapter_is_on_when_nothing_is_fed_and_can_still_be_swapped() -> None:
    model = adapted()
    first = oa.make_adapter(model, "a", {"fc1": weights(3), "fc2": weights(2, seed=1)})
    second = oa.make_adapter(
        model, "b", {"fc1": weights(7, seed=2), "fc2": weights(1, seed=3)}
    )
    filled = oa.fill(model, first)
    np.testing.assert_allclose(run(filled, {"x": X})[0], bumped(X, first), 1e-4, 1e-4)
    fed = run(filled, {"x": X, **second.feeds()})[0]
    np.testing.assert_allclose(fed, bumped(X, second), 1e-4, 1e-4)
    again = oa.fill(filled, second)
    np.testing.assert_allclose(run(again, {"x": X})[0], bumped(X, second), 1e-4, 1e-4)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("baked", [False, True])
def test_extract_is_the_inverse_of_fill_byte_for_byte(
    suffix: str, baked: bool, tmp_path: Path
) -> None:
    base, checkpoint = trained(tmp_path)
    adapter = checkpoint.adapter
    filled = oa.fill(oa.insert_checkpoint(base, checkpoint), adapter)
    model = tmp_path / "filled.onnx"
    oa.save_model(oa.bake(filled) if baked else filled, model)
    found = oa.extract(oa.open_model(model), name=adapter.name)
    first = oa.save_adapter(adapter, tmp_path / f"a.{suffix}")
    second = oa.save_adapter(found, tmp_path / f"b.{suffix}")
    assert second.read_bytes() == first.read_bytes()
    assert found.fingerprint == adapter.fingerprint


def test_large_weights_are_filled_extracted_and_removed_through_files(tmp_path: Path) -> None:
    base = oa.open_model(saved_model(tmp_path / "base.onnx"))
    model = oa.insert(base, after=["fc1", "fc2"])
    adapter = oa.make_adapter(model, "a", {"fc1": weights(9000), "fc2": weights(7000, seed=1)})
    oa.save_model(oa.fill(model, adapter), tmp_path / "filled.onnx")
    filled = oa.open_model(tmp_path / "filled.onnx")
    for name, value in oa.extract(filled).feeds().items():
        np.testing.assert_array_equal(value, adapter.feeds()[name])
    oa.save_model(oa.bake(filled), tmp_path / "baked.onnx")
    baked = oa.open_model(tmp_path / "baked.onnx")
    for name in ("filled", "baked"):
        (value,) = session(tmp_path / f"{name}.onnx").run(None, {"x": X})
        np.testing.assert_allclose(value, bumped(X, adapter), 1e-4, 1e-2)
    small = oa.make_adapter(model, "b", {"fc1": weights(1), "fc2": weights(2)})
    oa.save_model(oa.fill(filled, small), tmp_path / "small.onnx")
    for result in (filled, baked, oa.open_model(tmp_path / "small.onnx")):
        removed = _bytes(oa.remove(result), tmp_path / "removed.onnx")
        assert removed == (tmp_path / "base.onnx").read_bytes()


def test_an_extracted_adapter_is_called_like_the_model_unless_told(tmp_path: Path) -> None:
    values = {"fc1": weights(), "fc2": weights()}
    filled = oa.fill(adapted(), oa.make_adapter(adapted(), "x", values))
    oa.save_model(filled, tmp_path / "french.onnx")
    model = oa.open_model(tmp_path / "french.onnx")
    assert oa.extract(model).name == "french"
    assert oa.extract(model, name="fr").name == "fr"


def test_trained_weights_of_the_base_are_on_once_filled_and_off_before(
    tmp_path: Path,
) -> None:
    base, checkpoint = trained(tmp_path)
    model = oa.insert_checkpoint(base, checkpoint)
    plain = np.maximum(X @ W1.T, 0) @ W2.T + B2
    np.testing.assert_allclose(run(model, {"x": X})[0], plain, 1e-5, 1e-5)
    h = X @ W1.T + X @ lora()["base_model.model.fc1.lora_A.weight"].T @ (
        2 * lora()["base_model.model.fc1.lora_B.weight"].T
    )
    wanted = np.maximum(h, 0) @ (-2 * W2).T + B2 + 1
    fed = run(model, {"x": X, **checkpoint.adapter.feeds()})[0]
    np.testing.assert_allclose(fed, wanted, 1e-4, 1e-4)
    filled = oa.fill(model, checkpoint.adapter)
    for result in (
        filled,
        oa.bake(filled),
        oa.insert_checkpoint(base, checkpoint, baked=True),
    ):
        np.testing.assert_allclose(run(result, {"x": X})[0], wanted, 1e-4, 1e-4)


@pytest.mark.parametrize("how", ["at once", "over another"])
def test_the_last_filling_is_the_one_that_is_on(how: str, tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)
    model, first = oa.insert_checkpoint(base, checkpoint), checkpoint.adapter
    last = replace(first, replaced={k: 3 * v for k, v in first.replaced.items()})
    once = oa.fill(model, first) if how == "over another" else model
    filled = oa.fill(once, last)
    tensors = lora(modules=["fc1"])
    wanted = lora_on(X, tensors, w2=-6 * W2) - B2 + 3 * (B2 + 1)
    np.testing.assert_allclose(run(filled, {"x": X})[0], wanted, 1e-4, 1e-4)
    assert oa.extract(filled, name="last").replaced.keys() == last.replaced.keys()
    for name, value in oa.extract(filled, name="last").replaced.items():
        np.testing.assert_array_equal(value, last.replaced[name])
    passes(base, filled, inputs={"x": X})


CHANGES: dict[str, Callable[[oa.Model, oa.Adapter], oa.Model]] = {
    "filled": oa.fill,
    "filled twice": lambda m, a: oa.fill(oa.fill(m, a), replace(a, name="again")),
    "filled with others": lambda m, a: oa.fill(
        oa.fill(m, a), replace(a, replaced={k: v * 3 for k, v in a.replaced.items()})
    ),
    "filled in part": lambda m, a: oa.fill(
        oa.fill(m, a),
        replace(a, weights={}, replaced={"base.fc2.bias": B2 * 7}),
        allow_partial=True,
    ),
    "baked": lambda m, a: oa.bake(oa.fill(m, a)),
    "filled after baking": lambda m, a: oa.fill(oa.bake(oa.fill(m, a)), a),
    "baked twice": lambda m, a: oa.bake(oa.bake(oa.fill(m, a))),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("saved_between", [False, True])
def test_remove_gives_the_base_byte_for_byte(
    how: str, saved_between: bool, tmp_path: Path
) -> None:
    base, checkpoint = trained(tmp_path)
    result = CHANGES[how](oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    onnx.checker.check_model(result.proto, full_check=True)
    if saved_between:
        oa.save_model(result, tmp_path / "changed.onnx")
        result = oa.open_model(tmp_path / "changed.onnx")
    removed = _bytes(oa.remove(result), tmp_path / "removed.onnx")
    assert removed == (tmp_path / "base.onnx").read_bytes()


def test_a_weight_that_two_layers_share_is_replaced_for_one_alone(tmp_path: Path) -> None:
    base = oa.open_model(saved_model(tmp_path / "base.onnx", two_layers(tied=True)))
    tensors = {**lora(modules=["fc1"]), "base_model.model.fc2.weight": -3 * W1}
    checkpoint = oa.load_checkpoint(peft_folder(tmp_path / "fr", tensors), base)
    model = oa.insert_checkpoint(base, checkpoint)
    h = np.maximum(X @ W1.T, 0)
    np.testing.assert_allclose(run(model, {"x": X})[0], h @ W1.T + B2, 1e-4, 1e-4)
    only = checkpoint.adapter.replaced
    fed = run(model, {"x": X, **only})[0]
    np.testing.assert_allclose(fed, h @ (-3 * W1).T + B2, 1e-4, 1e-4)
    filled = oa.fill(model, checkpoint.adapter)
    passes(base, filled, inputs={"x": X})
    removed = _bytes(oa.remove(filled), tmp_path / "removed.onnx")
    assert removed == (tmp_path / "base.onnx").read_bytes()


def test_baking_takes_the_inputs_away_and_nothing_else(
    tmp_path: Path,
) -> None:
    base, checkpoint = trained(tmp_path)
    filled = oa.fill(oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    baked = oa.bake(filled)
    assert session(filled.proto).get_overridable_initializers()
    assert not session(baked.proto).get_overridable_initializers()
    assert [value.name for value in baked.proto.graph.input] == ["x"]
    assert not any(slot.swappable for slot in oa.list_slots(baked))
    assert [slot.bottleneck for slot in oa.list_slots(baked)] == [2]
    np.testing.assert_array_equal(run(baked, {"x": X})[0], run(filled, {"x": X})[0])


@pytest.mark.parametrize("action", [oa.bake, oa.extract])
def test_empty_slots_are_neither_baked_nor_extracted(action: Callable[..., object]) -> None:
    with pytest.raises(AdapterError, match=r"slot 'fc1' of .* is empty") as caught:
        action(adapted())
    assert "fill it" in caught.value.hint
    part = oa.make_adapter(adapted(), "a", {"fc1": weights()})
    half = oa.fill(adapted(), part, allow_partial=True)
    with pytest.raises(AdapterError, match=r"slot 'fc2' of .* is empty"):
        action(half)


def test_a_slot_that_has_its_size_without_an_adapter_is_never_empty() -> None:
    scales = oa.insert(oa.Model(two_layers()), after="fc1", parts="scale")
    np.testing.assert_array_equal(oa.extract(scales).weights["fc1"]["scale"], np.ones(4))
    np.testing.assert_array_equal(run(oa.bake(scales), {"x": X})[0], run(scales, {"x": X})[0])
    base = oa.open_model("models/dnsmos-p808.onnx")
    fixed = oa.insert(base, after="conv2d_5", bottleneck=1)
    shapes = {"down": (1, 32, 1, 1), "up": (32, 1, 1, 1)}
    zeros = {part: np.zeros(shape, np.float32) for part, shape in shapes.items()}
    found = oa.extract(oa.fill(fixed, oa.make_adapter(fixed, "zeros", {"conv2d_5": zeros})))
    assert not any(value.any() for value in found.weights["conv2d_5"].values())


def test_a_lora_that_was_filled_computes_what_peft_computes(tmp_path: Path) -> None:
    base = oa.open_model(saved_model(tmp_path / "base.onnx"))
    checkpoint = oa.load_checkpoint(peft_folder(tmp_path / "fr", lora()), base)
    filled = oa.fill(oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    np.testing.assert_allclose(run(filled, {"x": X})[0], lora_on(X, lora()), 1e-4, 1e-4)


def test_a_channel_slot_without_an_adapter_is_one_channel_of_zeros_and_empty() -> None:
    """ONNX Runtime before 1.32 leaves what a Conv of no channels gives uninitialised."""
    base = oa.open_model("models/dnsmos-p808.onnx")
    model = oa.insert(base, after="conv2d_5")
    (slot,) = oa.list_slots(model)
    stored = {t.name: tuple(t.dims) for t in model.proto.graph.initializer}
    assert stored[slot.weight("down")] == (1, 32, 1, 1)
    assert stored[slot.weight("up")] == (32, 1, 1, 1)
    with pytest.raises(AdapterError, match="is empty"):
        oa.extract(model)
    with pytest.raises(AdapterError, match="is empty"):
        oa.bake(model)


def test_a_baked_checkpoint_has_the_bottleneck_it_was_trained_with(tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)
    (slot,) = oa.list_slots(oa.insert_checkpoint(base, checkpoint, baked=True))
    assert (slot.swappable, slot.bottleneck) == (False, 2)


def test_an_adapter_of_scales_is_put_in_for_good_without_a_bottleneck(tmp_path: Path) -> None:
    base = oa.open_model(saved_model(tmp_path / "base.onnx"))
    scale = np.array([[2], [-1], [0.5], [3]], np.float32)
    folder = peft_folder(
        tmp_path / "fr",
        {"base_model.model.fc1.ia3_l": scale},
        peft_type="IA3",
        target_modules=["fc1"],
        feedforward_modules=[],
    )
    model = oa.insert_checkpoint(base, oa.load_checkpoint(folder, base), baked=True)
    assert [slot.bottleneck for slot in oa.list_slots(model)] == [0]
    wanted = np.maximum(X @ W1.T * scale.T, 0) @ W2.T + B2
    np.testing.assert_allclose(run(model, {"x": X})[0], wanted, 1e-5, 1e-5)
