"""Layers whose weight in the graph is not the module's, or that no module's call computes."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from adapter_models import B2, lora, lora_on, peft_folder, saved_model, two_layers
from onnx import numpy_helper
from slot_models import cli
from trained_cases import CASES, run

import onnx_adapt as oa

Capture = pytest.CaptureFixture[str]


def _refused(capsys: Capture, base: Path, folder: Path) -> str:
    out = folder.parent / "out"
    out.mkdir()
    command = ("insert", str(base), "--adapter", str(folder), "-o", str(out / "a.onnx"))
    code, printed, err = cli(capsys, *command)
    assert (code, printed) == (2, "")
    assert not list(out.iterdir())
    return err


@pytest.mark.parametrize("name", ["peft_repeated_lora", "peft_repeated_lora_ts"])
@pytest.mark.parametrize("conv", ["features.0", "features.3"])
def test_lora_on_a_conv_with_a_batchnorm_folded_in_is_refused(
    name: str, conv: str, tmp_path: Path, capsys: Capture
) -> None:
    """The graph's convolution is the BatchNorm of the module's."""
    key = f"base_model.model.{conv}.lora"
    shape = (2, 3, 3, 3) if conv == "features.0" else (2, 8, 1, 1)
    tensors = {
        f"{key}_A.weight": np.ones(shape, np.float32),
        f"{key}_B.weight": np.ones((8, 2, 1, 1), np.float32),
    }
    err = _refused(capsys, CASES[name].base, peft_folder(tmp_path / "trained", tensors))
    assert conv in err
    assert "BatchNorm" in err
    assert "optimize=False" in err


@pytest.mark.parametrize("scope", ["/attention", ""])
def test_lora_on_a_linear_that_is_never_called_is_refused(
    scope: str, tmp_path: Path, capsys: Capture
) -> None:
    """As in torch.nn.MultiheadAttention, which reads the weights of its `out_proj`."""
    proto = two_layers()
    for node in proto.graph.node[2:]:
        node.name = node.name.replace("/fc2", scope)
    module = f"{scope[1:]}.fc2" if scope else "fc2"
    proto.graph.initializer[2].name = proto.graph.node[3].input[1] = f"{module}.bias"
    folder = peft_folder(tmp_path / "trained", lora(modules=[module]))
    err = _refused(capsys, saved_model(tmp_path / "model.onnx", proto), folder)
    assert module in err
    assert "without calling the module" in err


def test_a_normalisation_whose_weight_was_computed_on_export_is_refused(
    tmp_path: Path, capsys: Capture
) -> None:
    """As Gemma multiplies by one plus the weight: the graph stores the sum."""
    case = CASES["peft_llama_lora_embedding_norm"]
    proto = _renamed(case.base, "model.norm.weight", "add_729")
    key = "base_model.model.model.norm.weight"
    folder = peft_folder(tmp_path / "trained", {key: np.full(32, 2, np.float32)})
    base = saved_model(tmp_path / "model.onnx", proto)
    assert "model.norm.weight" in _refused(capsys, base, folder)


def _without_scopes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """As simplifiers leave a dynamo export: weights keep their names, nodes lose theirs."""
    for node in proto.graph.node:
        node.name = ""
        del node.metadata_props[:]
    return proto


def test_without_scopes_lora_on_an_attention_s_out_proj_is_refused(
    tmp_path: Path, capsys: Capture
) -> None:
    proto = _without_scopes(two_layers())
    proto.graph.initializer[2].name = proto.graph.node[3].input[1] = "attn.out_proj.bias"
    used = numpy_helper.from_array(np.zeros(4, np.float32), "attn.in_proj_bias")
    proto.graph.initializer.append(used)
    folder = peft_folder(tmp_path / "trained", lora(modules=["attn.out_proj"]))
    base = saved_model(tmp_path / "model.onnx", proto)
    assert "MultiheadAttention" in _refused(capsys, base, folder)


def test_without_scopes_a_conv_is_adapted_only_if_its_weight_is_known(
    tmp_path: Path, capsys: Capture
) -> None:
    """The exporter folds a BatchNorm into a weight that keeps its name."""
    case = CASES["peft_convnet_lora"]
    proto = _without_scopes(onnx.load(case.base))
    base = saved_model(tmp_path / "model.onnx", proto)
    shutil.copytree(case.adapter, tmp_path / "trained", copy_function=shutil.copyfile)
    assert "--base-weights" in _refused(capsys, base, tmp_path / "trained")
    weights = {
        stored.name: numpy_helper.to_array(stored)
        for stored in proto.graph.initializer
        if stored.name.endswith((".weight", ".bias"))
    }
    safetensors.numpy.save_file(weights, tmp_path / "base.safetensors")
    command = ("insert", str(base), "--adapter", str(tmp_path / "trained"))
    out = (
        "-o",
        str(tmp_path / "a.onnx"),
        "--base-weights",
        str(tmp_path / "base.safetensors"),
    )
    assert cli(capsys, *command, *out)[0] == 0
    adapter = oa.load_adapter(tmp_path / "a.trained.safetensors")
    found = run(tmp_path / "a.onnx", {**case.inputs(), **adapter.feeds()})
    assert case.distance(found) < case.tolerance


@pytest.mark.parametrize("equal", [True, False])
def test_a_bias_with_two_names_is_replaced_once(
    equal: bool, tmp_path: Path, capsys: Capture
) -> None:
    """As in BERT's language-model head: `predictions.bias` and `predictions.decoder.bias`."""
    proto = two_layers()
    for node in proto.graph.node[2:]:
        node.name = node.name.replace("/fc2", "/cls/decoder")
    proto.graph.initializer[2].name = proto.graph.node[3].input[1] = "cls.bias"
    new = np.array([1, 2, 3, 4], np.float32)
    tensors = {
        **lora(modules=["fc1"]),
        "base_model.model.cls.bias": new,
        "base_model.model.cls.decoder.bias": new if equal else new + 1,
    }
    folder = peft_folder(tmp_path / "trained", tensors)
    base = saved_model(tmp_path / "model.onnx", proto)
    if not equal:
        assert "two values" in _refused(capsys, base, folder)
        return
    model = oa.open_model(base)
    checkpoint = oa.load_checkpoint(folder, model)
    oa.save_model(oa.insert_checkpoint(model, checkpoint), tmp_path / "a.onnx")
    x = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
    found = run(tmp_path / "a.onnx", {"x": x, **checkpoint.adapter.feeds()})["y"]
    np.testing.assert_allclose(found, lora_on(x, tensors) - B2 + new, 1e-4, 1e-4)
    oa.save_model(oa.remove(oa.open_model(tmp_path / "a.onnx")), tmp_path / "r.onnx")
    assert (tmp_path / "r.onnx").read_bytes() == base.read_bytes()


def _renamed(path: Path, old: str, new: str) -> onnx.ModelProto:
    proto = onnx.load(path)
    for stored in proto.graph.initializer:
        if stored.name == old:
            value = numpy_helper.to_array(stored) + np.float32(1)
            stored.CopyFrom(numpy_helper.from_array(value, new))
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
    return proto
