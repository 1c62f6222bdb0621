"""Modules that a node computes side by side: one slot for them, and the columns of each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from adapter_models import peft_folder
from onnx import TensorProto, helper, numpy_helper
from slot_models import cli, run

import onnx_adapt as oa
from onnx_adapt.checkpoints.edits import LowRank
from onnx_adapt.checkpoints.modules.packed import unpack
from onnx_adapt.errors import CheckpointError

WIDTHS = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
RNG = np.random.default_rng(6)
WEIGHTS = {name: RNG.standard_normal((n, 6)).astype(np.float32) for name, n in WIDTHS.items()}
X = RNG.standard_normal((3, 6)).astype(np.float32)
Lora = Mapping[str, tuple[np.ndarray, np.ndarray]]


def _packed(cut: str = "split", sizes: Sequence[int] = (8, 4, 4)) -> oa.Model:
    """`attn.qkv_proj`, whose columns a Split or three Slices hand to q, k and v."""
    arrays = {"w": np.concatenate(list(WEIGHTS.values())).T, "sizes": np.array(sizes)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "/attn/qkv_proj/MatMul")]
    ends = np.cumsum([0, *sizes])
    if cut == "split":
        node = helper.make_node("Split", ["h", "sizes"], list("qkv"), "/attn/Split", axis=-1)
        nodes.append(node)
    else:
        arrays |= {f"e{i}": np.array([end]) for i, end in enumerate(ends)}
        arrays["last"] = np.array([-1])
        for i, name in enumerate("qkv"):
            given = ["h", f"e{i}", f"e{i + 1}", "last"]
            nodes.append(helper.make_node("Slice", given, [name], f"/attn/Slice_{i}"))
    stored = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])
    outputs = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in "qkv"]
    graph = helper.make_graph(nodes, "g", [x], outputs, stored)
    opset = helper.make_opsetid("", 17)
    return oa.Model(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def _lora(seed: int, **ranks: int) -> Lora:
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.standard_normal((rank, 6)).astype(np.float32),
            rng.standard_normal((WIDTHS[name], rank)).astype(np.float32),
        )
        for name, rank in ranks.items()
    }


def _folder(path: Path, lora: Lora, **config: Any) -> Path:
    tensors = {}
    for name, (a, b) in lora.items():
        tensors[f"base_model.model.attn.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.attn.{name}.lora_B.weight"] = b
    ranks = {f"attn.{name}": a.shape[0] for name, (a, _) in lora.items()}
    return peft_folder(path, tensors, rank_pattern=ranks, **config)


def _peft(lora: Lora, alpha: float = 4) -> list[np.ndarray]:
    """What PEFT computes in the three modules: `W x + alpha / r * B A x`."""
    found = []
    for name, weight in WEIGHTS.items():
        y = X @ weight.T
        if name in lora:
            a, b = lora[name]
            y = y + X @ a.T @ b.T * (alpha / a.shape[0])
        found.append(y)
    return found


def _on(model: oa.Model, adapter: oa.Adapter) -> list[np.ndarray]:
    return run(model, {"x": X, **adapter.feeds()})


@pytest.mark.parametrize("cut", ["split", "slices"])
def test_three_modules_of_one_layer_are_one_slot(cut: str, tmp_path: Path) -> None:
    lora = _lora(0, q_proj=2, k_proj=3, v_proj=1)
    base = _packed(cut)
    checkpoint = oa.load_checkpoint(_folder(tmp_path / "a", lora), base)
    (slot,) = checkpoint.slots
    assert (slot.name, slot.width) == ("attn.qkv_proj", 16)
    assert slot.modules == ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    assert slot.columns == (0, 8, 12, 16)
    assert checkpoint.adapter.weights[slot.name]["down"].shape == (6, 2 + 3 + 1)
    adapted = oa.insert_checkpoint(base, checkpoint)
    for made, expected in zip(_on(adapted, checkpoint.adapter), _peft(lora), strict=True):
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)
    (read,) = oa.list_slots(adapted)
    assert (read.modules, read.columns) == (slot.modules, slot.columns)


def test_adapters_of_other_ranks_and_modules_fit_the_same_slot(tmp_path: Path) -> None:
    base = _packed()
    first = _folder(tmp_path / "a", _lora(0, q_proj=2, k_proj=2, v_proj=2))
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(first, base))
    for i, ranks in enumerate(({"q_proj": 1, "v_proj": 4}, {"k_proj": 3}, {"v_proj": 2})):
        lora = _lora(i + 1, **ranks)
        adapter = oa.convert(_folder(tmp_path / f"b{i}", lora), adapted)
        assert adapter.weights["attn.qkv_proj"]["down"].shape == (6, sum(ranks.values()))
        for made, expected in zip(_on(adapted, adapter), _peft(lora), strict=True):
            np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)


def test_dora_of_one_module_leaves_the_columns_of_the_others(tmp_path: Path) -> None:
    lora = _lora(0, q_proj=2, v_proj=3)
    folder = _folder(tmp_path / "a", lora, use_dora=True)
    tensors = dict(_tensors(folder))
    magnitude = {name: RNG.random(WIDTHS[name]).astype(np.float32) + 0.5 for name in lora}
    for name, value in magnitude.items():
        tensors[f"base_model.model.attn.{name}.lora_magnitude_vector"] = value
    _store(folder, tensors)
    base = _packed()
    checkpoint = oa.load_checkpoint(folder, base)
    assert [slot.name for slot in checkpoint.slots] == ["attn.qkv_proj"]
    made = _on(oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    for output, (name, weight) in zip(made, WEIGHTS.items(), strict=True):
        changed = weight
        if name in lora:
            a, b = lora[name]
            changed = weight + b @ a * (4 / a.shape[0])
            norm = np.linalg.norm(changed, axis=1)
            changed = changed * (magnitude[name] / norm)[:, None]
        np.testing.assert_allclose(output, X @ changed.T, rtol=1e-5, atol=1e-5)


def _tensors(folder: Path) -> Mapping[str, np.ndarray]:
    found: Mapping[str, np.ndarray] = safetensors.numpy.load_file(
        folder / "adapter_model.safetensors"
    )
    return found


def _store(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


def _apart() -> oa.Model:
    """The same three modules, each with a MatMul of its own."""
    nodes = [
        helper.make_node("MatMul", ["x", name], [name[0]], f"/attn/{name}/MatMul")
        for name in WEIGHTS
    ]
    stored = [
        numpy_helper.from_array(np.ascontiguousarray(value.T), name)
        for name, value in WEIGHTS.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])
    outputs = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in "qkv"]
    graph = helper.make_graph(nodes, "g", [x], outputs, stored)
    opset = helper.make_opsetid("", 17)
    return oa.Model(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def test_an_adapter_of_the_packed_module_fits_a_graph_that_has_them_apart(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 6), (16, 2)))
    tensors = {
        "base_model.model.attn.qkv_proj.lora_A.weight": a,
        "base_model.model.attn.qkv_proj.lora_B.weight": b,
    }
    base = _apart()
    checkpoint = oa.load_checkpoint(peft_folder(tmp_path / "a", tensors), base)
    assert [slot.name for slot in checkpoint.slots] == [f"attn.{name}" for name in WEIGHTS]
    made = _on(oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    whole = X @ np.concatenate(list(WEIGHTS.values())).T + X @ a.T @ b.T * 2
    np.testing.assert_allclose(np.concatenate(made, axis=1), whole, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_packed_width_is_refused(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.attn.qkv_proj.lora_A.weight": np.ones((2, 6), np.float32),
        "base_model.model.attn.qkv_proj.lora_B.weight": np.ones((12, 2), np.float32),
    }
    folder = peft_folder(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError, match=r"does not fit the layers .* with 16 outputs"):
        oa.load_checkpoint(folder, _apart())


@pytest.mark.parametrize("sizes", [(8, 4, 3), (8, 8), (8, 4, 2, 2)])
def test_columns_that_do_not_add_up_are_refused(
    sizes: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _packed()
    (split,) = (node for node in base.proto.graph.node if node.op_type == "Split")
    names = [*"qkv", "r"][: len(sizes)]
    del split.output[:]
    split.output.extend(names)
    base.proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array(sizes), "sizes"))
    del base.proto.graph.output[:]
    base.proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    onnx.save(base.proto, tmp_path / "model.onnx")
    folder = _folder(tmp_path / "a", _lora(0, q_proj=2))
    command = ["insert", str(tmp_path / "model.onnx"), "--adapter", str(folder)]
    code, printed, err = cli(capsys, *command, "-o", str(tmp_path / "out.onnx"))
    assert (code, printed) == (2, "")
    assert "'attn.qkv_proj' has 16 columns for attn.q_proj, attn.k_proj, attn.v_proj" in err
    assert not (tmp_path / "out.onnx").exists()


def test_the_modules_of_a_packed_layer_are_found_by_their_weights(tmp_path: Path) -> None:
    base = _packed()
    for i, node in enumerate(base.proto.graph.node):
        node.name = f"node_{i}"
    weights = {f"attn.{name}.weight": value for name, value in WEIGHTS.items()}
    safetensors.numpy.save_file(weights, tmp_path / "base.safetensors")
    lora = _lora(0, q_proj=2, v_proj=3)
    checkpoint = oa.load_checkpoint(
        _folder(tmp_path / "a", lora), base, base_weights=tmp_path / "base.safetensors"
    )
    made = _on(oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    for output, expected in zip(made, _peft(lora), strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_may_go_through_the_heads_are_not_cut() -> None:
    edit = LowRank("attention.query_key_value", np.ones((2, 6)), np.ones((12, 2)), 1.0)
    sizes = {f"attention.{name}": 4 for name in ("query", "key", "value")}
    with pytest.raises(CheckpointError, match="the file does not tell which"):
        list(unpack(edit, sizes))
