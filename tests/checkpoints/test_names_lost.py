"""Bases that lost their names: modules are found by the values of the base's weights."""

import ast
import contextlib
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from adapter_models import (
    B2,
    W1,
    W2,
    lora,
    lora_on,
    peft_folder,
    saved_model,
    two_layers,
)
from onnx import numpy_helper
from slot_models import cli
from torch_files import archive, mapping, num, storage, tensor, text, tup
from trained_cases import CASES, SUPPORTED, Case, run

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
Weights = dict[str, np.ndarray]


def _module(node: onnx.NodeProto) -> str:
    """The module path that torch's exporters leave at a node."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            return ast.literal_eval(entry.value)[-2]
    path: list[str] = []
    for part in node.name.split("/")[1:-1]:
        repeated = bool(path) and part.startswith(path[-1] + ".")
        path[len(path) - repeated :] = [part]
    return ".".join(path)


def _state_dict(proto: onnx.ModelProto) -> Weights:
    """The base's weights as PyTorch names and lays them out, from the export with names."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    found = {k: v for k, v in stored.items() if k.endswith((".weight", ".bias"))}
    for node in proto.graph.node:
        for name in node.input:
            unnamed = name in stored and name not in found and stored[name].ndim == 2
            if unnamed and node.op_type in ("MatMul", "Gemm") and _module(node):
                turned = any(a.name == "transB" and a.i for a in node.attribute)
                value = stored[name] if turned else stored[name].T
                found.setdefault(f"{_module(node)}.weight", value)
            if node.op_type == "Mul" and name in stored and name.startswith("add"):
                found[f"{_module(node)}.weight"] = stored[name] - 1  # Gemma's 1 + weight
    return found


def _nameless(proto: onnx.ModelProto) -> onnx.ModelProto:
    """As simplifiers leave a model: no node names, no metadata, tensors numbered."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    names = {name: name for name in kept}
    del graph.value_info[:], graph.metadata_props[:], result.metadata_props[:]
    for stored in graph.initializer:
        stored.name = names.setdefault(stored.name, f"t{len(names)}")
        del stored.metadata_props[:]
    for node in graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        for ends in (node.input, node.output):
            for i, name in enumerate(ends):
                ends[i] = names.setdefault(name, f"t{len(names)}")
    return result


def _save(path: Path, weights: Mapping[str, np.ndarray]) -> Path:
    plain = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    safetensors.numpy.save_file(plain, path)
    return path


def _adapted(
    base: onnx.ModelProto, checkpoint: Path, weights: Mapping[str, np.ndarray], folder: Path
) -> tuple[Path, oa.Checkpoint]:
    """Insert a checkpoint into a nameless copy of a base, by the values of its weights."""
    onnx.save(_nameless(base), folder / "nameless.onnx")
    model = oa.open_model(folder / "nameless.onnx")
    known = _save(folder / "model.safetensors", weights)
    found = oa.load_checkpoint(checkpoint, model, base_weights=known)
    oa.save_model(oa.insert_checkpoint(model, found), folder / "adapted.onnx")
    return folder / "adapted.onnx", found


def _distance(case: Case, path: Path, checkpoint: oa.Checkpoint) -> float:
    return case.distance(run(path, {**case.inputs(), **checkpoint.adapter.feeds()}))


TIED = "peft_gpt2_lora_embedding"  # has one table for two modules: see below
TIED_ROWS = ("peft_gpt2_tokens", "peft_gpt2_token_indices_apart")  # and so have these
NO_NORMS = "peft_llama_ln_tuning"  # TorchScript wrote its RMSNorms as arithmetic


@pytest.mark.parametrize(
    "name", [n for n in SUPPORTED if n not in (TIED, *TIED_ROWS, NO_NORMS)]
)
def test_a_nameless_base_gives_what_pytorch_gives(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = onnx.load(case.base)
    weights = _state_dict(base) | case.parameters()
    path, found = _adapted(base, case.adapter, weights, tmp_path)
    assert _distance(case, path, found) < case.tolerance


def test_norms_that_are_arithmetic_in_a_nameless_base_are_refused_by_name(
    tmp_path: Path,
) -> None:
    case = CASES[NO_NORMS]
    base = onnx.load(case.base)
    with pytest.raises(CheckpointError, match=r"input_layernorm.*is not in the graph"):
        _adapted(base, case.adapter, _state_dict(base), tmp_path)


def test_a_stack_of_experts_that_was_cut_into_pieces_is_found_by_values(
    tmp_path: Path,
) -> None:
    case = CASES["peft_experts_loop"]
    base = onnx.load(case.base)
    weights = _state_dict(base) | case.parameters()
    path, found = _adapted(base, case.adapter, weights, tmp_path)
    assert _distance(case, path, found) < case.tolerance
    assert len(found.slots) == 6
    assert _distance(case, path, found) < case.tolerance


def test_without_the_weights_a_nameless_base_is_refused_with_the_advice(
    tmp_path: Path,
) -> None:
    case = CASES["ah_bert_seqbn_dynamo"]
    onnx.save(_nameless(onnx.load(case.base)), tmp_path / "nameless.onnx")
    with pytest.raises(CheckpointError, match=r"bert\.encoder\.layer\.0") as caught:
        oa.load_checkpoint(case.adapter, oa.open_model(tmp_path / "nameless.onnx"))
    assert "--base-weights" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ah_bert_lora", "", "module."),
        ("ah_bert_lora", "", "base_model.model."),
        ("peft_bert_lora_patterns", "bert.", ""),
        ("peft_bert_lora_patterns", "bert.", "model."),
    ],
)
def test_the_weights_may_have_another_prefix(
    name: str, old: str, new: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base = onnx.load(case.base)
    weights = {new + k.removeprefix(old): v for k, v in _state_dict(base).items()}
    path, found = _adapted(base, case.adapter, weights, tmp_path)
    assert _distance(case, path, found) < case.tolerance


def test_weights_with_tensorflow_s_names_for_layernorm_are_known(tmp_path: Path) -> None:
    case = CASES["peft_bert_lora_bias_all"]
    base = onnx.load(case.base)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {
        next((key.replace(new, name) for new, name in old.items() if new in key), key): value
        for key, value in _state_dict(base).items()
    }
    path, found = _adapted(base, case.adapter, weights, tmp_path)
    assert _distance(case, path, found) < case.tolerance


# Normalisations that are as they were made, so that all have the same values.


def _fresh_norms(base: onnx.ModelProto, names: str = "LayerNorm") -> onnx.ModelProto:
    for stored in base.graph.initializer:
        if names in stored.name:
            value = np.full(stored.dims, stored.name.endswith("weight"), np.float32)
            stored.CopyFrom(numpy_helper.from_array(value, stored.name))
    return base


@pytest.mark.parametrize("name", ["peft_bert_lora_bias_all", "ah_bert_double_seq_bn_inv_ts"])
def test_equal_normalisations_are_told_apart_by_the_layers_beside_them(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base = _fresh_norms(onnx.load(case.base))
    path, found = _adapted(base, case.adapter, _state_dict(base), tmp_path)
    named = oa.open_model(saved_model(tmp_path / "named.onnx", base))
    by_name = oa.load_checkpoint(case.adapter, named)
    oa.save_model(oa.insert_checkpoint(named, by_name), tmp_path / "by_name.onnx")
    off = run(path, {**case.inputs(), **found.adapter.feeds()})
    on = run(tmp_path / "by_name.onnx", {**case.inputs(), **by_name.adapter.feeds()})
    np.testing.assert_allclose(off["logits"], on["logits"], 1e-4, 1e-4)
    assert len(found.replacements) == len(by_name.replacements)


def test_equal_normalisations_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    """In a ViT the normalisations stand between layers of two blocks."""
    case = CASES["peft_vit_lora_ts"]
    base = _fresh_norms(onnx.load(case.base), "layernorm")
    key = "base_model.model.vit.layers.1.layernorm_after"
    tensors = {f"{key}.weight": np.full(32, 2, "f4"), f"{key}.bias": np.ones(32, "f4")}
    folder = peft_folder(tmp_path / "norm", tensors)
    with pytest.raises(CheckpointError, match="cannot be told from") as caught:
        _adapted(base, folder, _state_dict(base), tmp_path)
    assert "layernorm_after" in caught.value.message
    assert "fewer layers" not in caught.value.message + caught.value.hint


# Heads beside the adapter.


def test_a_head_that_the_file_lacks_but_the_graph_has_is_an_error(tmp_path: Path) -> None:
    case = CASES["ah_bert_double_seq_bn"]
    base = onnx.load(case.base)
    weights = {k: v for k, v in _state_dict(base).items() if "classifier" not in k}
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*: classifier") as caught:
        _adapted(base, case.adapter, weights, tmp_path)
    assert "with its head" in caught.value.hint


def test_a_head_of_other_values_than_the_file_has_is_an_error(tmp_path: Path) -> None:
    case = CASES["ah_bert_double_seq_bn"]
    base = onnx.load(case.base)
    weights = _state_dict(base)
    weights["classifier.weight"] = weights["classifier.weight"] + 1
    with pytest.raises(CheckpointError, match=r"classifier.*is not in the graph"):
        _adapted(base, case.adapter, weights, tmp_path)


@pytest.mark.parametrize("listed", [True, False])
def test_a_head_that_the_graph_lacks_is_left_out_with_a_note(
    listed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES["ah_bert_double_seq_bn"]
    base = onnx.load(case.base)
    weights = _state_dict(base)
    (pooled,) = [n.output[0] for n in base.graph.node if n.op_type == "Tanh"]
    last = [n for n in base.graph.node if n.output[0] == "logits"]
    for node in last:
        base.graph.node.remove(node)
    for stored in [t for t in base.graph.initializer if t.name.startswith("classifier")]:
        base.graph.initializer.remove(stored)
    base.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(pooled, 1, ["batch", 32]))
    if not listed:
        weights = {k: v for k, v in weights.items() if "classifier" not in k}
    _, found = _adapted(base, case.adapter, weights, tmp_path)
    assert found.replacements == ()
    assert "the graph has no classifier" in caplog.text


# GPT-2's embedding and head are one tensor.


def _tied(*keys: str) -> tuple[onnx.ModelProto, Weights]:
    base = onnx.load(CASES["peft_gpt2_lora_embedding"].base)
    weights = _state_dict(base)
    table = weights.pop("lm_head.weight")
    return base, {**weights, **dict.fromkeys(keys, table)}


@pytest.mark.parametrize(
    "keys",
    [
        ("transformer.wte.weight",),
        ("transformer.wte.weight", "lm_head.weight"),
        ("lm_head.weight", "transformer.wte.weight"),
    ],
)
def test_lora_on_a_tied_embedding_is_not_put_on_the_head(
    keys: tuple[str, ...], tmp_path: Path
) -> None:
    case = CASES["peft_gpt2_lora_embedding"]
    base, weights = _tied(*keys)
    path, found = _adapted(base, case.adapter, weights, tmp_path)
    assert _distance(case, path, found) < case.tolerance


def test_lora_on_a_tied_head_is_not_put_on_the_embedding(tmp_path: Path) -> None:
    case = CASES["peft_gpt2_lora_embedding"]
    base, weights = _tied("transformer.wte.weight", "lm_head.weight")
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (2, 32), "lora_B": (60, 2)}
    tensors = {
        f"base_model.model.lm_head.{part}.weight": rng.standard_normal(shape).astype("f4")
        for part, shape in shapes.items()
    }
    folder = peft_folder(tmp_path / "head", tensors, lora_alpha=2)
    path, found = _adapted(base, folder, weights, tmp_path)
    assert len(found.slots) == 1
    off = run(path, case.inputs())["logits"]
    on = run(path, {**case.inputs(), **found.adapter.feeds()})["logits"]
    # The head sees hidden states h with h @ table.T = off; what is added is h @ A.T @ B.T.
    table = weights["lm_head.weight"].astype(np.float64)
    hidden = np.linalg.lstsq(table, off.reshape(-1, 60).T.astype(np.float64), rcond=None)[0].T
    a, b = tensors.values()
    np.testing.assert_allclose((on - off).reshape(-1, 60), hidden @ a.T @ b.T, 0, 1e-3)


# Weights that cannot be told apart.


def _with_second(value: np.ndarray) -> onnx.ModelProto:
    """`two_layers` with another weight at the second MatMul, as the graph stores it."""
    proto = two_layers()
    stored = numpy_helper.from_array(np.ascontiguousarray(value), "onnx::MatMul_2")
    proto.graph.initializer[1].CopyFrom(stored)
    return proto


@pytest.mark.parametrize("modules", [["fc1"], ["fc2"], ["fc1", "fc2"]])
@pytest.mark.parametrize("what", ["equal", "tied", "transposed"])
def test_weights_that_are_not_unique_never_give_a_wrong_model(
    what: str, modules: list[str], tmp_path: Path
) -> None:
    second = W1.T if what == "transposed" else W1
    base = two_layers(tied=True) if what == "tied" else _with_second(second.T)
    tensors = lora(modules=modules)
    folder = peft_folder(tmp_path / "fr", tensors)
    weights = {"fc1.weight": W1, "fc2.weight": second, "fc2.bias": B2}
    with contextlib.suppress(CheckpointError):
        path, found = _adapted(base, folder, weights, tmp_path)
        assert len(found.slots) == len(modules)
        value = run(path, {"x": X, **found.adapter.feeds()})["y"]
        np.testing.assert_allclose(value, lora_on(X, tensors, w2=second), 1e-4, 1e-4)


# Precision, and files that are not the base's weights.


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_weights_of_a_higher_precision_than_the_graph_are_recognised(
    dtype: type, tmp_path: Path
) -> None:
    base = two_layers(np.float16)
    weights = {"fc1.weight": W1.astype(dtype), "fc2.weight": W2.astype(dtype)}
    folder = peft_folder(tmp_path / "fr", lora())
    path, found = _adapted(base, folder, weights, tmp_path)
    value = run(path, {"x": X.astype(np.float16), **found.adapter.feeds()})["y"]
    np.testing.assert_allclose(value, lora_on(X, lora()), 0.02, 0.2)


def test_weights_in_a_bin_file_are_read(tmp_path: Path) -> None:
    square = tup(num(4), num(4))
    pairs = [
        text(f"fc{i}.weight")
        + tensor(num(0), square, tup(num(4), num(1)), storage(text(str(i)), count=num(16)))
        for i in (1, 2)
    ]
    data = {str(i): struct.pack("<16f", *value.ravel()) for i, value in ((1, W1), (2, W2))}
    (tmp_path / "pytorch_model.bin").write_bytes(archive(mapping(*pairs), data))
    model = oa.open_model(saved_model(tmp_path / "m.onnx", _nameless(two_layers())))
    folder = peft_folder(tmp_path / "fr", lora())
    found = oa.load_checkpoint(folder, model, base_weights=tmp_path / "pytorch_model.bin")
    value = run(
        _saved(oa.insert_checkpoint(model, found), tmp_path), {"x": X, **found.adapter.feeds()}
    )["y"]
    np.testing.assert_allclose(value, lora_on(X, lora()), 1e-4, 1e-4)


def _saved(model: oa.Model, folder: Path) -> Path:
    oa.save_model(model, folder / "adapted.onnx")
    return folder / "adapted.onnx"


OTHERS: dict[str, Weights] = {
    "another fine-tune": {"fc1.weight": W1 + 1, "fc2.weight": W2 + 1},
    "one of another fine-tune": {"fc1.weight": W1, "fc2.weight": W2 * 1.001},
    "another size": {"fc1.weight": np.ones((7, 7), "f4"), "fc2.weight": np.ones((7, 7), "f4")},
    "NaN": {"fc1.weight": W1 * np.nan, "fc2.weight": W2 * np.nan},
    "other names": {"a.weight": W1, "b.weight": W2},
    "nothing": {},
}


@pytest.mark.parametrize("what", OTHERS)
def test_weights_of_another_model_are_refused(what: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "fr", lora())
    with pytest.raises(CheckpointError, match="in the graph") as caught:
        _adapted(two_layers(), folder, OTHERS[what], tmp_path)
    assert "--base-weights" not in caught.value.hint


@pytest.mark.parametrize("name", ["missing.safetensors", "model.onnx", "folder", "text.bin"])
def test_a_file_that_holds_no_weights_is_an_error_with_exit_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved_model(tmp_path / "model.onnx", _nameless(two_layers()))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.bin").write_text("hello")
    folder = peft_folder(tmp_path / "fr", lora())
    before = sorted(tmp_path.iterdir())
    weights = str(tmp_path / name)
    code, out, err = cli(
        capsys, "insert", str(base), "--adapter", str(folder), "--base-weights", weights
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert name in err
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_line_maps_by_weights_for_insert_and_convert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved_model(tmp_path / "base.onnx", _nameless(two_layers()))
    weights = _save(tmp_path / "model.safetensors", {"fc1.weight": W1, "fc2.weight": W2})
    first, second = lora(), lora(seed=5, rank=3)
    for name, tensors in (("fr", first), ("de", second)):
        peft_folder(tmp_path / name, tensors)
    known = ("--base-weights", str(weights))
    model, other = str(tmp_path / "adapted.onnx"), str(tmp_path / "de.onnx_adapter")
    for args in (
        ("insert", str(base), "--adapter", str(tmp_path / "fr"), "-o", model),
        ("convert", str(tmp_path / "de"), "--for", model, "-o", other),
    ):
        code, _, err = cli(capsys, *args, *known)
        assert code == 0, err
    for file, tensors in ((tmp_path / "adapted.fr.safetensors", first), (other, second)):
        value = run(Path(model), {"x": X, **oa.load_adapter(file).feeds()})["y"]
        np.testing.assert_allclose(value, lora_on(X, tensors), 1e-4, 1e-4)
