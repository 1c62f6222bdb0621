"""Trained checkpoints on bases with quantised weights, against PyTorch and float twins.

A quantised base computes other numbers than PyTorch's, so two things are compared: what the
adapter changes, with what it changes in PyTorch; and the whole output, with that of a model
whose weights are floats of the very same values.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from trained_cases import CASES, run

import onnx_adapt as oa

Quantise = Callable[[Path, Path], None]


def _dynamic(source: Path, target: Path) -> None:
    options = {"EnableSubgraph": True}
    quantize_dynamic(source, target, weight_type=QuantType.QUInt8, extra_options=options)


def _blocks(source: Path, target: Path) -> None:
    quantiser = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32)
    quantiser.process()
    onnx.save(quantiser.model.model, target)


def _bnb4(source: Path, target: Path) -> None:
    quantiser = MatMulBnb4Quantizer(onnx.load(source), 1, 64)
    quantiser.process()
    onnx.save(quantiser.model.model, target)


def _adapted(base: Path, adapter: Path, target: Path) -> Path:
    opened = oa.open_model(base)
    checkpoint = oa.load_checkpoint(adapter, opened)
    oa.save_model(oa.insert_checkpoint(opened, checkpoint, baked=True), target)
    return target


@pytest.mark.parametrize(
    "name",
    [
        "peft_bert_lora_default_ts",
        "peft_bert_lora_all_linear",  # with a head, whose weight is quantised too
        "peft_bert_dora_embedding",  # of a table of integers
        "peft_vit_lora_ts",  # with a convolution and its trained bias
        "peft_convnet_lora_ts",
        "peft_repeated_lora_ts",  # a shared weight is quantised for one of two calls
        "ah_bert_seq_bn",
        "ah_bert_lora_gating",
        "ah_bert_opset14_flags",  # a coupling behind the embeddings
        "ah_distilbert_double_seq_bn",
    ],
)
def test_on_integers_an_adapter_changes_what_it_changes_in_pytorch(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    _dynamic(case.base, tmp_path / "base.onnx")
    _adapted(tmp_path / "base.onnx", case.adapter, tmp_path / "adapted.onnx")
    models = {"off": tmp_path / "base.onnx", "on": tmp_path / "adapted.onnx"}
    made = {key: run(path, case.inputs()) for key, path in models.items()}
    base = run(case.base, case.inputs())
    output, expected = case.expected()
    theirs, ours = expected - base[output], made["on"][output] - made["off"][output]
    cosine = np.vdot(theirs, ours) / np.linalg.norm(theirs) / np.linalg.norm(ours)
    assert cosine > 0.99  # 8 bits leave 0.998 of the least of them
    assert 0.9 < np.linalg.norm(ours) / np.linalg.norm(theirs) < 1.1


@pytest.mark.parametrize("quantise", [_blocks, _bnb4])
@pytest.mark.parametrize(
    "name",
    [
        "peft_bert_dora",
        "peft_bert_lora_all_linear",
        "ah_gpt2_par_bn",
        "peft_llama_lora_ts",
        "peft_bert_oft",
        "peft_bert_road",
        "peft_bert_pissa",
    ],
)
def test_on_packed_weights_an_adapter_gives_what_it_gives_on_floats_of_their_values(
    name: str, quantise: Quantise, tmp_path: Path
) -> None:
    case = CASES[name]
    quantise(case.base, tmp_path / "base.onnx")
    _write_floats(tmp_path / "base.onnx", tmp_path / "floats.onnx")
    on, twin = (
        run(_adapted(tmp_path / f"{n}.onnx", case.adapter, tmp_path / f"{n}.a"), case.inputs())
        for n in ("base", "floats")
    )
    off = run(tmp_path / "base.onnx", case.inputs())
    for output, value in twin.items():
        np.testing.assert_allclose(on[output], value, rtol=0, atol=10 * case.tolerance)
        assert np.abs(value - off[output]).max() > 100 * case.tolerance


def _write_floats(source: Path, target: Path) -> None:
    """Write a model with MatMuls for its products with packed weights.

    What ONNX Runtime makes of the rows of the identity is the weight.
    """
    proto = onnx.load(source)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type not in ("MatMulNBits", "MatMulBnb4"):
            continue
        sizes = {item.name: item.i for item in node.attribute}
        names = [name for name in node.input[1:] if name]
        x, y = (helper.make_tensor_value_info(n, 1, None) for n in (node.input[0], "y"))
        alone = helper.make_node(node.op_type, list(node.input), ["y"], domain=node.domain)
        alone.attribute.extend(node.attribute)
        graph = helper.make_graph([alone], "g", [x], [y], [stored[name] for name in names])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        small = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        session = ort.InferenceSession(small.SerializeToString())
        eye = np.eye(sizes["K"], dtype=np.float32)
        (weight,) = session.run(None, {node.input[0]: eye})
        name = f"{node.input[1]}_floats"
        proto.graph.initializer.append(numpy_helper.from_array(weight, name))
        node.op_type, node.domain = "MatMul", ""
        del node.attribute[:], node.input[1:]
        node.input.append(name)
    onnx.save(proto, target)


def test_rows_of_a_batch_that_share_a_range_are_told_to_have_no_adapters_of_their_own(
    tmp_path: Path,
) -> None:
    case = CASES["peft_bert_lora_default_ts"]
    _dynamic(case.base, tmp_path / "base.onnx")
    base = oa.open_model(tmp_path / "base.onnx")
    checkpoint = oa.load_checkpoint(case.adapter, base)
    batched = oa.insert_checkpoint(base, checkpoint, batched=True)
    report = oa.verify(base, batched, inputs=case.inputs())
    (rows,) = (check for check in report.checks if check.name == "rows")
    assert not rows.passed
    assert "one range for all rows" in rows.detail
