"""Weights that are computed from the base's own: replaced, or a slot of the difference."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from adapter_models import B2, W1, W2, peft_folder, saved_model
from onnx import helper, numpy_helper
from slot_models import cli, run
from trained_cases import CASES
from trained_cases import run as run_file

import onnx_adapt as oa
from onnx_adapt.checkpoints.edits import Edit, Reweight, Weighed
from onnx_adapt.checkpoints.readers.peft_methods import table
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

RNG = np.random.default_rng(8)
X = RNG.standard_normal((2, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def _mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that multiplies the weight, and the bias if it is told so, by a matrix."""

    def edits(found: ModuleTensors) -> Iterator[Edit]:
        left = found.parts["left_l"].astype(np.float64)

        def compute(weight: Array, bias: Array | None) -> Weighed:
            turned = np.tensordot(left, weight, axes=1)
            shift = found.config.get("shift", 0)
            if shift:
                return turned, (0 if bias is None else left @ bias) + np.full(len(left), shift)
            return turned, bias

        yield Reweight(found.module, compute, found.config.get("bound"))

    monkeypatch.setitem(table.METHODS, "TURNED", table.Method(("left_l",), edits))


def _folder(path: Path, config: dict, **left: Array) -> Path:
    tensors = {
        f"base_model.model.{module}.left_l": value.astype(np.float32)
        for module, value in left.items()
    }
    return peft_folder(path, tensors, peft_type="TURNED", **config)


def _expected(left: Array, shift: float = 0) -> Array:
    """What fc2 gives if it is turned, from the float32 numbers that PyTorch would have."""
    hidden = np.maximum(X @ W1.T, 0)
    return np.asarray(hidden @ (left @ W2).T + (left @ B2 + shift if shift else B2))


FULL = RNG.standard_normal((4, 4)).astype(np.float32)
ONE = np.eye(4, dtype=np.float32) + np.outer([1, -2, 0.5, 3], [1, 2, 0, 1])


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize(
    ("left", "config", "slots", "replaced"),
    [
        (FULL, {}, 0, ["base.fc2.weight"]),
        (FULL, {"shift": 3.0}, 0, ["base.fc2.bias", "base.fc2.weight"]),
        (ONE, {"bound": 1}, 1, []),
        (ONE, {"bound": 1, "shift": 3.0}, 1, []),
        (ONE, {"bound": 2}, 0, ["base.fc2.weight"]),  # above a third of 4
        (FULL, {"bound": 1}, 0, ["base.fc2.weight"]),  # the bound does not hold
    ],
)
def test_a_reweighted_layer_is_replaced_or_a_slot_whichever_is_smaller(
    left: Array, config: dict, slots: int, replaced: list[str], baked: bool, tmp_path: Path
) -> None:
    folder = _folder(tmp_path / "a", config, fc2=left)
    base = oa.open_model(saved_model(tmp_path / "m.onnx"))
    checkpoint = oa.load_checkpoint(folder, base)
    assert len(checkpoint.slots) == slots
    assert sorted(checkpoint.adapter.replaced) == replaced
    adapted = oa.insert_checkpoint(base, checkpoint, baked=baked)
    report = oa.verify(base, adapted, adapter=checkpoint.adapter)
    assert report.passed, [check for check in report.checks if not check.passed]
    feeds = {"x": X, **({} if baked else checkpoint.adapter.feeds())}
    expected = _expected(left, config.get("shift", 0))
    np.testing.assert_allclose(run(adapted, feeds)[0], expected, rtol=1e-5, atol=1e-4)
    again = oa.save_model(oa.remove(adapted), tmp_path / "again.onnx").path
    assert again.read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_a_layer_without_a_bias_gets_the_new_one_from_a_slot(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", {"shift": 3.0}, fc1=FULL)
    base = oa.open_model(saved_model(tmp_path / "m.onnx"))
    checkpoint = oa.load_checkpoint(folder, base)
    assert list(checkpoint.adapter.replaced) == ["base.fc1.weight"]
    assert [slot.name for slot in checkpoint.slots] == ["fc1"]
    found = run(oa.insert_checkpoint(base, checkpoint), {"x": X, **checkpoint.adapter.feeds()})
    expected = np.maximum(X @ (FULL @ W1).T + 3, 0) @ W2.T + B2
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-4)


def test_a_second_adapter_of_the_method_fits_the_same_model(tmp_path: Path) -> None:
    base = oa.open_model(saved_model(tmp_path / "m.onnx"))
    first = _folder(tmp_path / "a", {}, fc2=FULL)
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(first, base))
    other = RNG.standard_normal((4, 4)).astype(np.float32)
    adapter = oa.convert(_folder(tmp_path / "b", {}, fc2=other), adapted)
    found = run(adapted, {"x": X, **adapter.feeds()})[0]
    np.testing.assert_allclose(found, _expected(other), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (np.ones((5, 4)), r"trained weight is \[5, 4\]"),
        (np.eye(5), "does not fit the base's weight"),
        (np.full((4, 4), np.nan), "NaN or infinity"),
        (np.diag([3e38, 3e38, 3e38, 3e38]), "NaN or infinity"),
    ],
)
def test_what_gives_no_weight_for_the_layer_is_refused(
    left: Array, words: str, tmp_path: Path
) -> None:
    folder = _folder(tmp_path / "a", {}, fc2=left)
    base = oa.open_model(saved_model(tmp_path / "m.onnx"))
    with pytest.raises(CheckpointError, match=words):
        oa.load_checkpoint(folder, base)


WIDTHS = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
PACKED = {name: RNG.standard_normal((n, 6)).astype(np.float32) for name, n in WIDTHS.items()}
WIDE = RNG.standard_normal((3, 6)).astype(np.float32)


def _attention(*, packed: bool) -> oa.Model:
    """`q_proj`, `k_proj` and `v_proj`, in one MatMul `qkv_proj` or each in its own."""
    stored = {name: value.T for name, value in PACKED.items()}
    if packed:
        stored = {"w": np.concatenate(list(PACKED.values())).T, "sizes": np.array([8, 4, 4])}
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"], "/attn/qkv_proj/MatMul"),
            helper.make_node("Split", ["h", "sizes"], list("qkv"), "/attn/Split", axis=-1),
        ]
    else:
        nodes = [
            helper.make_node("MatMul", ["x", name], [name[0]], f"/attn/{name}/MatMul")
            for name in PACKED
        ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 6])
    outputs = [helper.make_tensor_value_info(o, onnx.TensorProto.FLOAT, None) for o in "qkv"]
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "g", [x], outputs, tensors)
    opset = helper.make_opsetid("", 17)
    return oa.Model(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def _attended(model: oa.Model, adapter: oa.Adapter) -> Array:
    return np.concatenate(run(model, {"x": WIDE, **adapter.feeds()}), axis=1)


def test_modules_packed_in_one_layer_become_one_slot_of_full_rank(tmp_path: Path) -> None:
    base = _attention(packed=True)
    left = {
        name: RNG.standard_normal((n, n)).astype(np.float32)
        for name, n in WIDTHS.items()
        if name != "k_proj"
    }
    folder = _folder(tmp_path / "a", {}, **{f"attn.{name}": v for name, v in left.items()})
    checkpoint = oa.load_checkpoint(folder, base)
    assert [slot.name for slot in checkpoint.slots] == ["attn.qkv_proj"]
    made = _attended(oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    wanted = [WIDE @ (left.get(n, np.eye(WIDTHS[n])) @ w).T for n, w in PACKED.items()]
    np.testing.assert_allclose(made, np.concatenate(wanted, axis=1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shift", [0, 2.0])
def test_a_packed_module_is_cut_where_the_graph_has_its_parts(
    shift: float, tmp_path: Path
) -> None:
    base = _attention(packed=False)
    left = RNG.standard_normal((16, 16)).astype(np.float32)  # it mixes the rows of all three
    folder = _folder(tmp_path / "a", {"shift": shift}, **{"attn.qkv_proj": left})
    checkpoint = oa.load_checkpoint(folder, base)
    assert len(checkpoint.adapter.replaced) == 3
    made = _attended(oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    wanted = WIDE @ (left @ np.concatenate(list(PACKED.values()))).T + shift
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-4)


def test_an_adapter_that_is_much_larger_than_its_checkpoint_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["peft_bert_oft"]
    base, adapter, out = str(case.base), str(case.adapter), str(tmp_path / "out.onnx")
    code, _, said = cli(capsys, "insert", base, "--adapter", adapter, "-o", out, "--no-verify")
    assert code == 0
    assert "note: the adapter needs 32.8 kB, not the 1.5 kB of its checkpoint" in said
    assert "6 whole weights of the base" in said


def test_a_convolution_that_pytorch_computes_otherwise_is_refused(tmp_path: Path) -> None:
    case = CASES["peft_convnet_hra"]
    folder = tmp_path / "a"
    shutil.copytree(case.adapter, folder)
    tensors = {"base_model.model.features.0.hra_u": np.ones((27, 2), np.float32)}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"features\.0.*another size along each axis"):
        oa.load_checkpoint(folder, oa.open_model(case.base))


def test_oft_of_overlapping_patches_is_refused(tmp_path: Path) -> None:
    case = CASES["peft_convnet_oft"]
    folder = tmp_path / "a"
    shutil.copytree(case.adapter, folder)
    tensors = {"base_model.model.features.0.oft_R.weight": np.ones((9, 3), np.float32)}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="overlapping patches"):
        oa.load_checkpoint(folder, oa.open_model(case.base))


@pytest.mark.parametrize("name", ["peft_bert_oft", "peft_bert_hra", "peft_bert_pissa"])
def test_a_module_inside_an_attention_becomes_a_slot_on_its_weight(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base = oa.open_model(CASES["peft_bert_optimised_lora"].base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    assert any(slot.on_weight for slot in checkpoint.slots)
    oa.save_model(oa.insert_checkpoint(base, checkpoint), tmp_path / "m.onnx")
    made = run_file(tmp_path / "m.onnx", {**case.inputs(), **checkpoint.adapter.feeds()})
    assert case.distance(made) < case.tolerance


def test_a_bias_inside_an_attention_is_not_changed(tmp_path: Path) -> None:
    base = oa.open_model(CASES["peft_bert_optimised_lora"].base)
    with pytest.raises(CheckpointError, match="inside node 'Attention_0'"):
        oa.load_checkpoint(CASES["peft_bert_road"].adapter, base)
