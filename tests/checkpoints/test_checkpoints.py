"""Trained checkpoints against PyTorch's own outputs: every case, every way to run it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from trained_cases import CASES, REFUSED, SUPPORTED, Case, run

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.errors import CheckpointError


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_checkpoint_gives_what_pytorch_gives(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    model = tmp_path / "adapted.onnx"
    oa.save_model(oa.insert_checkpoint(base, checkpoint), model)
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
    oa.save_model(oa.insert_checkpoint(base, checkpoint, baked=True), model)
    assert case.distance(run(model, case.inputs())) < case.tolerance
    inputs = [value.name for value in oa.open_model(model).proto.graph.input]
    assert inputs == [value.name for value in base.proto.graph.input]
    _comes_back(model, case, tmp_path)


def _comes_back(model: Path, case: Case, folder: Path) -> None:
    oa.save_model(oa.remove(oa.open_model(model)), folder / "removed.onnx")
    assert (folder / "removed.onnx").read_bytes() == case.base.read_bytes()


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_is_not_supported_is_refused_with_the_case_s_reason(name: str) -> None:
    case = CASES[name]
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(case.adapter, oa.open_model(case.base))
    assert case.facts["reason"] in caught.value.message


@pytest.mark.parametrize(
    "name",
    ["ah_bert_seq_bn", "ah_bert_post_add", "ah_bert_ln_after_residual", "ah_gpt2_lora",
     "ah_bert_double_seq_bn_inv_ts", "peft_convnet_lora", "peft_bert_lora_embedding",
     "peft_bert_dora", "peft_repeated_lora_ts", "ah_bert_opset14_seq_bn",
     "ah_bert_opset14_flags", "peft_gpt2_token_indices_ts"],
)  # fmt: skip
def test_the_slots_of_a_checkpoint_verify(name: str) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(case.adapter, base))
    report = oa.verify(base, adapted, inputs=case.inputs())
    assert report.passed, [c for c in report.checks if not c.passed]
    assert all(slot.error is not None for slot in report.slots)
    assert damages(adapted) == []


def test_every_row_of_the_promise_has_a_case() -> None:
    assert len(SUPPORTED) > 90
    assert len(REFUSED) > 15


@pytest.mark.parametrize(
    "name", ["peft_bert_lora_default_ts", "peft_bert_lora_bias_all", "ah_bert_seq_bn"]
)
def test_the_proof_of_insertion_passes_where_weights_of_the_base_become_inputs(
    name: str,
) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(case.adapter, base))
    names = [value.name for value in adapted.proto.graph.input]
    assert len(set(names)) == len(names)
    report = oa.verify(base, adapted, weights=False)
    assert report.passed, [c for c in report.checks if not c.passed]


def test_the_same_checkpoint_gives_the_same_slots_in_the_same_order(tmp_path: Path) -> None:
    case = CASES["peft_bert_lora_all_linear"]
    code = (
        "import sys, hashlib, onnx_adapt as oa\n"
        "base = oa.open_model(sys.argv[1])\n"
        "made = oa.insert_checkpoint(base, oa.load_checkpoint(sys.argv[2], base))\n"
        "oa.save_model(made, sys.argv[3])\n"
        "print(hashlib.sha256(open(sys.argv[3], 'rb').read()).hexdigest())"
    )
    found = {
        subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                str(case.base),
                str(case.adapter),
                str(tmp_path / seed),
            ],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("peft_bert_dora", {"lora_alpha": None}),
        ("peft_bert_dora", {"lora_alpha": float("nan")}),
        ("peft_bert_dora", {"use_rslora": "no"}),
        ("peft_bert_dora", {"alpha_pattern": {"[": 3}}),
        ("peft_bert_dora", {"alpha_pattern": [1]}),
        ("peft_bert_dora", {"r": 3}),
        ("ah_bert_seq_bn", {"config": None}),
        ("ah_bert_seq_bn", {"config": {}}),
        ("ah_bert_seq_bn", {"config": {"original_ln_before": True}}),
        ("ah_bert_lora", {"config": {"architecture": "lora", "r": 4, "alpha": "q"}}),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    name: str, change: dict[str, object], tmp_path: Path
) -> None:
    case = CASES[name]
    folder = tmp_path / "adapter"
    shutil.copytree(case.adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError):
        oa.load_checkpoint(folder, oa.open_model(case.base))


def test_a_second_call_is_adapted_although_its_weight_was_copied(tmp_path: Path) -> None:
    """Simplifiers fold the Identity that shares a weight between the calls of a module."""
    case = CASES["peft_repeated_lora_ts"]
    base = onnx.load(case.base)
    stored = {tensor.name: tensor for tensor in base.graph.initializer}
    shared = [n for n in base.graph.node if n.op_type == "Identity" and n.input[0] in stored]
    assert shared
    for node in shared:
        copy = base.graph.initializer.add()
        copy.CopyFrom(stored[node.input[0]])
        copy.name = node.output[0]
        base.graph.node.remove(node)
    onnx.save(base, tmp_path / "folded.onnx")
    model = oa.open_model(tmp_path / "folded.onnx")
    found = oa.load_checkpoint(case.adapter, model)
    oa.save_model(oa.insert_checkpoint(model, found), tmp_path / "adapted.onnx")
    outputs = run(tmp_path / "adapted.onnx", {**case.inputs(), **found.adapter.feeds()})
    assert case.distance(outputs) < case.tolerance
