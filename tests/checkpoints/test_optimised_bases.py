"""Trained checkpoints on bases that ONNX Runtime optimised: PyTorch's outputs, or a reason."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime.transformers import optimizer
from trained_cases import CASES, Case, run

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

BASIC, EXTENDED, ALL = "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"
TRANSFORMERS = "onnxruntime.transformers"
"""The fusions of transformers that run offline, in Python; optimum calls them O2."""


def _optimised(case: Case, path: Path, level: str) -> Path:
    if level == TRANSFORMERS:
        found = optimizer.optimize_model(str(case.base), "bert", opt_level=0)
        found.save_model_to_file(str(path))
        return path
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(case.base, options, providers=["CPUExecutionProvider"])
    return path


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("peft_bert_dora", EXTENDED),  # the biases are in BiasGelu and SkipLayerNormalization
        ("peft_bert_lora_bias_all", EXTENDED),  # which take trained ones instead
        ("peft_bert_lora_default_ts", ALL),
        ("peft_bert_lora_bias_lora_only", ALL),
        ("ah_bert_lora", EXTENDED),
        ("ah_gpt2_lora", EXTENDED),
        ("ah_vit_lora_renamed", EXTENDED),
        ("peft_bert_lora_all_linear", EXTENDED),  # the pooler's Tanh is in a FusedGemm
        ("peft_bert_ia3_output", EXTENDED),
        ("ah_bert_seq_bn", BASIC),
        ("ah_bert_double_seq_bn", EXTENDED),
        ("ah_bert_adapterplus", EXTENDED),  # behind the residual sum of a fused node
        ("ah_bert_ln_before", EXTENDED),
        ("ah_gpt2_par_bn", EXTENDED),
        ("ah_roberta_seq_bn", ALL),
        ("ah_vit_double_seq_bn", EXTENDED),
        ("peft_convnet_lora_ts", EXTENDED),  # the ReLU is in a FusedConv
        ("ah_bert_par_bn", TRANSFORMERS),
        ("ah_bert_ia3", TRANSFORMERS),
        ("ah_bert_dora_output", TRANSFORMERS),  # scales its Linears' biases as well
        ("ah_bert_opset14_seq_bn", TRANSFORMERS),  # no LayerNormalization in its opset
        ("ah_llama_par_bn", TRANSFORMERS),
        ("peft_convnet_lora", BASIC),
        ("peft_llama_lora_ts", ALL),
    ],
)
def test_an_edit_of_layers_that_are_whole_gives_what_pytorch_gives(
    name: str, level: str, tmp_path: Path
) -> None:
    case = CASES[name]
    file = _optimised(case, tmp_path / "base.onnx", level)
    base = oa.open_model(file)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    adapted = oa.insert_checkpoint(base, checkpoint)
    oa.save_model(adapted, tmp_path / "adapted.onnx")
    feeds = {**case.inputs(), **checkpoint.adapter.feeds()}
    assert case.distance(run(tmp_path / "adapted.onnx", feeds)) < case.tolerance
    off, plain = (run(tmp_path / f"{n}.onnx", case.inputs()) for n in ("adapted", "base"))
    for output, value in plain.items():
        np.testing.assert_allclose(off[output], value, rtol=0, atol=case.tolerance)
    oa.verify(base, adapted).raise_for_mismatch()
    oa.save_model(oa.remove(adapted), tmp_path / "removed.onnx")
    assert (tmp_path / "removed.onnx").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("name", "level", "reason"),
    [
        ("ah_bert_from_headless", EXTENDED, "not in the graph: embeddings"),
        ("peft_convnet_lora", ALL, "not in the graph: features"),  # 0 or 6, by the processor
    ],
)
def test_an_edit_inside_a_fused_node_is_refused_by_its_module(
    name: str, level: str, reason: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base = oa.open_model(_optimised(case, tmp_path / "base.onnx", level))
    with pytest.raises(CheckpointError, match=reason) as caught:
        oa.load_checkpoint(case.adapter, base)
    assert caught.value.hint
