"""Trained checkpoints against PyTorch's own outputs: every case, every way to run it."""

from pathlib import Path

import numpy as np
import pytest
from trained_cases import CASES, REFUSED, SUPPORTED, Case, run

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_checkpoint_gives_what_pytorch_gives(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    model = tmp_path / "adapted.onnx"
    oa.save_model(oa.insert(base, checkpoint=checkpoint), model)
    feeds = case.inputs()

    plain = oa.save_adapter(checkpoint.adapter, tmp_path / "a.safetensors")
    fed = run(model, {**feeds, **oa.load_adapter(plain).feeds()})
    assert case.distance(fed) < case.tolerance

    runtimes = oa.save_adapter(checkpoint.adapter, tmp_path / "a.onnx_adapter")
    assert case.distance(run(model, feeds, runtimes)) < case.tolerance

    off = run(model, feeds)
    for output, value in run(case.base, feeds).items():
        np.testing.assert_allclose(off[output], value, rtol=0, atol=case.tolerance)
    assert case.distance(off) > 10 * case.tolerance, "the case does not tell on from off"

    _comes_back(model, case, tmp_path)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_baked_checkpoint_gives_what_pytorch_gives(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    model = tmp_path / "baked.onnx"
    oa.save_model(oa.insert(base, checkpoint=checkpoint, baked=True), model)
    assert case.distance(run(model, case.inputs())) < case.tolerance
    inputs = [value.name for value in oa.open_model(model).proto.graph.input]
    assert inputs == [value.name for value in base.proto.graph.input]
    _comes_back(model, case, tmp_path)


def _comes_back(model: Path, case: Case, folder: Path) -> None:
    oa.save_model(oa.remove(oa.open_model(model)), folder / "removed.onnx")
    assert (folder / "removed.onnx").read_bytes() == case.base.read_bytes()


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_is_not_supported_is_refused_with_a_reason(name: str) -> None:
    case = CASES[name]
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(case.adapter, oa.open_model(case.base))
    assert len(caught.value.message) > 20


@pytest.mark.parametrize(
    "name",
    ["ah_bert_seq_bn", "ah_bert_post_add", "ah_bert_ln_after_residual", "ah_gpt2_lora",
     "ah_bert_double_seq_bn_inv_ts", "peft_convnet_lora", "peft_bert_lora_embedding",
     "peft_bert_dora", "peft_repeated_lora_ts"],
)  # fmt: skip
def test_the_slots_of_a_checkpoint_verify(name: str) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    adapted = oa.insert(base, checkpoint=oa.load_checkpoint(case.adapter, base))
    report = oa.verify(base, adapted, inputs=case.inputs())
    assert report.passed, [c for c in report.checks if not c.passed]
    assert all(slot.error is not None for slot in report.slots)


def test_every_row_of_the_promise_has_a_case() -> None:
    assert len(SUPPORTED) > 90
    assert len(REFUSED) > 15
