"""Numbers in, truth out: what PyTorch computes with an adapter on a module.

The product's own proofs compare a slot with its formula wherever it stands. Here the answer
comes from the model before it was exported, so that a slot on another axis, before the bias
or on the wrong tensor is seen. `tools/make_truths.py` made the files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError, AdaptError

TRUTHS = Path(__file__).parent.parent / "truths"

RIGHT = {
    "group_norm": "between",
    "group_norm_any_size": "between",
    "group_norm_dynamo": "between",
    "shuffle": "between",
    "shuffle_any_size": "between",
    "shuffle_dynamo": "between",
    "pixel_shuffle": "between",
    "channels_last": "between",
    "channels_last_dynamo": "between",
    "channels_last_inside": "between.dense",
    "patches": "flat",
    "patches_any_size": "flat",
    "flat_picture": "hidden",
    "near_zero": "fc2",
    "stale_batch": "between",
    "stale_classes": "fc2",
    "unsorted": "fc1",
}
"""Cases, and the PyTorch module whose output the adapter reads and moves."""

LOW_RANK = {"bias_gelu_lora": "fc1", "skip_norm_lora": "dense"}
"""LoRA of a Linear whose bias is inside the next operator: it is at home before the bias."""

FUSED = {"bias_gelu": "fc1", "skip_norm": "dense"}
"""A bottleneck reads what the Linear gives with its bias; here no tensor holds that."""


def case(name: str) -> tuple[oa.Model, dict[str, np.ndarray]]:
    """The model of a case, and the numbers that go with it."""
    with np.load(TRUTHS / f"{name}.npz") as stored:
        return oa.open_model(TRUTHS / f"{name}.onnx"), dict(stored)


def answer(
    base: oa.Model, adapted: oa.Model, numbers: dict[str, np.ndarray], *, rows: int = 3
) -> np.ndarray:
    """What ONNX Runtime gives with the case's weights, made for the model by hand."""
    (slot,) = oa.list_slots(adapted)
    weights = {slot.name: {part: numbers[part] for part in ("down", "up")}}
    adapter = oa.make_adapter(adapted, "mine", weights)
    feed = next(value.name for value in base.proto.graph.input)
    return run(adapted, {feed: numbers["x"][:rows], **adapter.feeds()})[0]


def assert_near(got: np.ndarray, want: np.ndarray, numbers: dict[str, np.ndarray]) -> None:
    """Equal but for float32: far closer than the adapter moves the output."""
    moved = np.abs(numbers["adapted"] - numbers["base"]).max()
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * moved)


@pytest.mark.parametrize("name", RIGHT)
def test_an_adapter_behind_a_module_computes_what_pytorch_computes(name: str) -> None:
    base, numbers = case(name)
    adapted = oa.insert(base, after=RIGHT[name])
    got = answer(base, adapted, numbers)
    assert_near(got, numbers["adapted"], numbers)
    feed = {next(value.name for value in base.proto.graph.input): numbers["x"]}
    assert_near(run(adapted, feed)[0], numbers["base"], numbers)
    oa.verify(base, adapted, inputs=feed).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto


@pytest.mark.parametrize("name", RIGHT)
def test_rows_of_a_batch_with_adapters_of_their_own_compute_what_pytorch_computes(
    name: str,
) -> None:
    base, numbers = case(name)
    adapted = oa.insert(base, after=RIGHT[name], batched=True)
    (slot,) = oa.list_slots(adapted)
    weights = {slot.name: {part: numbers[part] for part in ("down", "up")}}
    adapter = oa.make_adapter(adapted, "mine", weights)
    feed = next(value.name for value in base.proto.graph.input)
    with oa.AdapterSession(adapted, {"mine": adapter}) as session:
        found = session.run({feed: numbers["x"]}, adapter=["mine", None, "mine"])
    mixed = np.stack([numbers[key][i] for i, key in enumerate(("adapted", "base", "adapted"))])
    assert_near(next(iter(found.values())), mixed, numbers)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["flat_picture", "stale_batch", "unsorted", "near_zero"])
def test_no_rows_give_no_rows(name: str, batched: bool) -> None:
    base, numbers = case(name)
    adapted = oa.insert(base, after=RIGHT[name], batched=batched)
    got = answer(base, adapted, numbers, rows=0)
    assert got.shape == numbers["adapted"][:0].shape


@pytest.mark.parametrize("name", FUSED)
def test_a_bottleneck_goes_behind_a_bias_that_was_fused(name: str) -> None:
    base, numbers = case(name)
    adapted = oa.insert(base, after=FUSED[name])
    assert_near(answer(base, adapted, numbers), numbers["adapted"], numbers)
    oa.verify(base, adapted, inputs={"x": numbers["x"]}).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_lora_of_a_linear_with_its_bias_elsewhere_computes_what_pytorch_computes(
    name: str,
) -> None:
    """`x W + x A B` needs no bias, so that it goes on the product itself."""
    base, numbers = case(name)
    product = next(
        node.output[0]
        for node in base.proto.graph.node
        if node.op_type == "MatMul" and f"/{LOW_RANK[name]}/" in node.name
    )
    adapted = oa.insert(base, after=product, source="x", activation="identity")
    assert_near(answer(base, adapted, numbers), numbers["adapted"], numbers)
    oa.verify(base, adapted, inputs={"x": numbers["x"]}).raise_for_mismatch()


@pytest.mark.parametrize("name", ["group_norm", "flat_picture", "near_zero"])
def test_weights_as_pytorch_lays_them_out_are_told_apart_from_right_ones(name: str) -> None:
    """`Linear.weight` is `(out, in)`: the transpose of what a slot takes."""
    base, numbers = case(name)
    adapted = oa.insert(base, after=RIGHT[name])
    turned = {"down": numbers["down"].T, "up": numbers["up"].T}
    (slot,) = oa.list_slots(adapted)
    with pytest.raises(AdapterError, match="transposed"):
        oa.make_adapter(adapted, "mine", {slot.name: turned})


def test_an_adapter_made_for_one_base_goes_into_no_other() -> None:
    base, numbers = case("unsorted")
    other = oa.insert(case("quantised")[0], after="fc1")
    adapted = oa.insert(base, after="fc1")
    (slot,) = oa.list_slots(adapted)
    weights = {slot.name: {part: numbers[part] for part in ("down", "up")}}
    adapter = oa.make_adapter(adapted, "mine", weights)
    with oa.AdapterSession(other) as session, pytest.raises(AdaptError, match="base"):
        session.load("mine", adapter)


def test_an_output_near_zero_that_is_wrong_is_still_seen() -> None:
    """One weight off by as much as a slot must not be is no rounding."""
    base, numbers = case("near_zero")
    adapted = oa.insert(base, after="fc1")
    wrong = oa.Model(type(base.proto).FromString(adapted.proto.SerializeToString()))
    weights = [t for t in wrong.proto.graph.initializer if t.name == "fc2.weight"]
    assert weights, "the export calls the weight by its name"
    values = np.frombuffer(weights[0].raw_data, np.float32).copy()
    values[0] *= 1 + 1e-5
    weights[0].raw_data = values.tobytes()
    report = oa.verify(base, wrong, inputs={"x": numbers["x"]})
    assert not report.passed


def test_what_an_adapter_drives_out_of_a_calibrated_range_is_said() -> None:
    """Ranges of eight bits that were calibrated without the adapter clip what it makes."""
    base, numbers = case("quantised")
    adapted = oa.insert(base, after="fc1")
    (slot,) = oa.list_slots(adapted)
    weights = {slot.name: {part: numbers[part] for part in ("down", "up")}}
    adapter = oa.make_adapter(adapted, "mine", weights)
    moved = np.abs(numbers["adapted"] - numbers["base"]).max()
    clipped = run(adapted, {"x": numbers["x"], **adapter.feeds()})[0]
    assert np.abs(clipped - numbers["adapted"]).max() > moved / 4
    report = oa.verify(base, adapted, inputs={"x": numbers["x"]}, adapter=adapter)
    assert "saturat" in str(report)
    widened = oa.calibrate(oa.insert(base, after="fc1"), adapter, {"x": numbers["x"]})
    right = run(widened, {"x": numbers["x"], **adapter.feeds()})[0]
    assert np.abs(right - numbers["adapted"]).max() < moved / 20
    assert oa.remove(widened).proto == base.proto
