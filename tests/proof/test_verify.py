"""Verification of sound models: what passes, what is reported, what comes out of the CLI."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from fetch_models import fetch
from slot_models import (
    MLP,
    MODELS,
    model_of,
    passes,
    saved,
)

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError, SlotError, UnprovableError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "after", "options"),
    [
        ("dnsmos-p808", ["mos_estimator_small_1/dense_4/MatMul_add"], {}),
        ("plcmos", ["Gemm_48", "Gemm_58"], {"bias": True}),
        ("plcmos", ["Gemm_48", "Gemm_58"], {"activation": "gelu", "baked": True}),
        ("silero-vad-ifless", ["node_linear", "node_linear_1", "node_linear_1_2"], {}),
        ("silero-vad-ifless", ["node_linear_1", "node_linear_1_2"], {"baked": True}),
    ],
)
def test_real_models_verify_from_their_files(
    name: str, after: list[str], options: dict, tmp_path: Path
) -> None:
    path = MODELS / f"{name}.onnx"
    adapted = oa.insert(oa.open_model(path), after=after, **options)
    report = passes(path, saved(adapted, tmp_path / "adapted.onnx"), strict=True)
    assert len(report.slots) == len(oa.list_slots(adapted))
    assert all(slot.error <= slot.tolerance for slot in report.slots)
    assert all(slot.effect for slot in report.slots)


@pytest.mark.parametrize(
    ("name", "after", "kind"),
    [
        (
            "minilm-l3-fp16",
            "/model/model.0/auto_model/encoder/layer.1/output/dense/MatMul",
            "float16",
        ),
        ("smart-turn", "node_linear_1", "quantised"),
    ],
)
def test_fp16_and_quantised_models_verify_among_the_roundings_of_their_base(
    name: str, after: str, kind: str, tmp_path: Path
) -> None:
    path = fetch(name)
    adapted = oa.insert(oa.open_model(path), after=after)
    report = passes(path, saved(adapted, tmp_path / "adapted.onnx"))
    off = next(check for check in report.checks if check.name == "off")
    assert off.detail.startswith(f"{kind}: ")
    assert "bit for bit" in off.detail or "the base's own roundings" in off.detail
    assert report.slots[0].ratio < 1


def test_every_check_of_a_small_model_in_numbers() -> None:
    base = model_of(MLP)
    report = passes(base, oa.insert(base, after=["first", "act"]))
    assert report.runtime == onnxruntime.__version__
    assert [slot.name for slot in report.slots] == ["first", "act"]
    for slot in report.slots:
        assert 0 < slot.error <= slot.tolerance < 1e-5
        assert 0 < slot.ratio < 1
        assert slot.bottlenecks == (1, 8, 64)
    (first, second) = (shapes["x"] for shapes in report.shapes)
    assert first != second
    assert first[1] == second[1] == 4


def test_a_model_with_fixed_shapes_needs_one_set_of_inputs() -> None:
    base = model_of(MLP.replace("[n,4]", "[3,4]"))
    report = passes(base, oa.insert(base, after="first"))
    assert report.shapes == ({"x": (3, 4)},)


def test_verification_leaves_both_models_as_they_were() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first", bottleneck=3)
    before = base.proto.SerializeToString(), adapted.proto.SerializeToString()
    passes(base, adapted)
    assert (base.proto.SerializeToString(), adapted.proto.SerializeToString()) == before


@pytest.mark.parametrize(
    "options",
    [
        {"baked": True},
        {"bottleneck": 3},
        {"activation": "gelu", "bias": True},
        {"parts": "scale"},
        {"parts": ("down", "up", "scale", "gain")},
        {"parts": ("down", "up", "norm_weight", "norm_bias")},
        {"parts": ("down", "up", "after_weight", "after_bias"), "norm_after": "term"},
        {"parts": ("down", "up", "gate", "gate_bias")},
        {"source": "act"},
    ],
)
@pytest.mark.parametrize("rank", ["n,4", "n,s,4"])
def test_every_form_of_slot_verifies(options: dict, rank: str) -> None:
    base = model_of(MLP.replace("[n,4]", f"[{rank}]"))
    passes(base, oa.insert(base, after="second", **options), strict=True)


def test_stacked_slots_and_slots_on_an_adapted_base_verify() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "first", "second"])
    passes(base, oa.insert(adapted, after="first", activation="tanh"))
    assert len(passes(adapted, oa.insert(adapted, after="act")).slots) == 4


def test_a_float64_model_has_the_bound_of_float64() -> None:
    text = MLP.replace("float[", "double[")
    base = model_of(text)
    report = passes(base, oa.insert(base, after="first", activation="gelu"))
    assert report.slots[0].error < report.slots[0].tolerance < 1e-13


def test_without_weights_only_what_needs_none_is_checked() -> None:
    base = model_of(MLP)
    report = oa.verify(base, oa.insert(base, after="first"), weights=False)
    assert [check.name for check in report.checks] == ["interface", "graph", "off", "checker"]
    assert report.passed
    assert report.slots == ()


@pytest.mark.parametrize(
    ("inputs", "message", "hint"),
    [
        ({}, "no array for input 'x'", "the model needs: x"),
        ({"x": X, "z": X}, "'z', which is no input", "the model needs: x"),
        ({"x": X.astype(np.float64)}, "'x' is float64", "astype"),
        ({"x": X[:, :3]}, "does not run", ""),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict, message: str, hint: str) -> None:
    base = model_of(MLP)
    with pytest.raises(AdaptError, match=message) as caught:
        oa.verify(base, oa.insert(base, after="first"), inputs=inputs)
    assert hint in caught.value.hint


def test_a_base_that_runs_with_no_made_up_input_asks_for_real_ones() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x) => (float[m,4] y)
    <int64[2] shape = {{-1, 7}}, float[7,4] w = {{{", ".join(["1"] * 28)}}}> {{
      r = Reshape(x, shape)  [first] y = MatMul(r, w) }}""")
    adapted = oa.insert(base, after="first")
    with pytest.raises(UnprovableError, match="none of the inputs") as caught:
        oa.verify(base, adapted)
    assert "--inputs" in caught.value.hint
    passes(base, adapted, inputs={"x": np.ones(14, np.float32)})


def test_a_model_without_slots_cannot_be_verified() -> None:
    with pytest.raises(SlotError, match="no slots") as caught:
        oa.verify(model_of(MLP), model_of(MLP))
    assert "insert" in caught.value.hint


def test_the_same_seed_gives_the_same_numbers() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first")
    assert oa.verify(base, adapted, seed=3) == oa.verify(base, adapted, seed=3)
    assert oa.verify(base, adapted, seed=3).slots != oa.verify(base, adapted, seed=4).slots


@pytest.mark.parametrize("batched", [False, True])
def test_an_empty_batch_among_the_inputs_is_proven_to_be_as_the_base_has_it(
    batched: bool,
) -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first", batched=batched)
    report = oa.verify(base, adapted, inputs=[{"x": X[:0]}, {"x": X}])
    assert report.passed
    assert report.shapes == ({"x": (0, 4)}, {"x": (3, 4)})


@pytest.mark.parametrize("batched", [False, True])
def test_an_empty_batch_alone_proves_nothing_of_slots(batched: bool) -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first", batched=batched)
    with pytest.raises(UnprovableError, match="empty batch") as caught:
        oa.verify(base, adapted, inputs={"x": X[:0]})
    assert "one row at least" in caught.value.hint
