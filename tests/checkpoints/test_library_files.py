"""Files of other libraries than PEFT and AdapterHub: each form, and what is refused of it.

The cases that the libraries made are compared with PyTorch by `test_checkpoints.py`; here are
the forms beside them, and the sentences for what is missing.
"""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import h5py
import numpy as np
import pytest
import safetensors.numpy
import yaml
from slot_models import cli
from trained_cases import CASES, ROOT, Case

import onnx_adapt as oa
from onnx_adapt.checkpoints.edits import Bottleneck, Edit, LowRank, Replacement
from onnx_adapt.checkpoints.readers import gguf_lora
from onnx_adapt.checkpoints.readers.head_rows import halves_of_pairs
from onnx_adapt.checkpoints.readers.table import read_edits, read_saved
from onnx_adapt.errors import CheckpointError

RANDOM = np.random.default_rng(5)
LIBRARIES = (
    *("mlx_", "torchtune_", "litgpt_", "gguf_", "keras_", "nemo_", "loralib_", "edifice_"),
)
MADE = [name for name in CASES if name.startswith(LIBRARIES)]


def _edits(path: Path) -> list[Edit]:
    return read_edits(read_saved(path))


def _factors(path: Path) -> dict[str, LowRank]:
    found = {edit.module: edit for edit in _edits(path) if isinstance(edit, LowRank)}
    assert found
    return found


def _copy(case: Case, folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A case's adapter with a changed configuration."""
    shutil.copytree(case.adapter, folder)
    if config is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def _refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _edits(path)
    return f"{caught.value.message}\n{caught.value.hint}"


def _mlx(folder: Path, config: dict[str, Any], **tensors: np.ndarray) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {key.replace("__", "."): value for key, value in tensors.items()}
    safetensors.numpy.save_file(named, folder / "adapters.safetensors")
    return folder


def _random(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_every_library_has_a_case_that_it_made() -> None:
    assert {name.split("_")[0] + "_" for name in MADE} == set(LIBRARIES)


@pytest.mark.parametrize(
    "name", ["mlx_llama_dora", "gguf_bert", "nemo_llama_post", "edifice_bert"]
)
def test_the_slots_of_a_library_s_adapter_verify(name: str) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(case.adapter, base))
    oa.verify(base, adapted, inputs=case.inputs()).raise_for_mismatch()


@pytest.mark.parametrize("name", [name for name in MADE if name != "torchtune_llama_peft"])
def test_a_damaged_file_of_a_library_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    folder = _copy(case, tmp_path / "adapter")
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    for length in (len(data) * 2 // 3, 100, 0):
        file.write_bytes(data[:length])
        assert name == "torchtune_llama" or file.name in _refused(folder)
    out = tmp_path / "out.onnx"
    command = ("insert", str(case.base), "--adapter", str(folder), "-o", str(out))
    assert cli(capsys, *command)[0] == 2
    assert not out.exists()


def test_mlx_scale_is_not_divided_by_the_rank(tmp_path: Path) -> None:
    a, b = _random(6, 2), _random(2, 4)
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    edit = _factors(_mlx(tmp_path / "a", config, q__lora_a=a, q__lora_b=b))["q"]
    np.testing.assert_allclose(edit.scale * edit.b @ edit.a, 20 * (a @ b).T, rtol=1e-6)


def test_mlx_layers_that_were_tuned_whole_are_replaced(tmp_path: Path) -> None:
    config = {"fine_tune_type": "full", "lora_parameters": None}
    weight = _random(4, 6)
    (edit,) = _edits(_mlx(tmp_path / "a", config, layers__0__q__weight=weight))
    assert isinstance(edit, Replacement)
    assert (edit.module, edit.parameter) == ("layers.0.q", "weight")
    np.testing.assert_array_equal(edit.value, weight)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_layers": 4, "lora_parameters": {"rank": 2, "alpha": 4, "scale": 1}}, "0.14.1"),
        ({"lora_parameters": {"rank": 2, "alpha": 16}}, "no scale"),
        ({"lora_parameters": {"scale": float("nan")}}, "no number"),
        ({"fine_tune_type": "ia3", "lora_parameters": {"scale": 1}}, "'ia3'"),
        ({"fine_tune_type": "dora", "lora_parameters": {"scale": 1}}, "no magnitude"),
    ],
)
def test_an_mlx_configuration_that_does_not_say_the_scale_is_refused(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    parts = {"q__lora_a": _random(6, 2), "q__lora_b": _random(2, 4)}
    assert words in _refused(_mlx(tmp_path / "a", config, **parts))


def test_mlx_alpha_of_newer_versions_has_no_effect_as_in_mlx(tmp_path: Path) -> None:
    settings = {"rank": 2, "alpha": 16, "scale": 3.0}
    parts = {"q__lora_a": _random(6, 2), "q__lora_b": _random(2, 4)}
    config = {"num_layers": 4, "lora_parameters": settings}
    assert _factors(_mlx(tmp_path / "a", config, **parts))["q"].scale == 3.0


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"lora_a": (3, 2, 6), "lora_b": (3, 4, 2)}, "3 experts"),
        ({"lora_a": (6, 2), "lora_b": (3, 4)}, "do not fit each other"),
        ({"lora_a": (0,), "lora_b": (2, 4)}, "ZeRO-3"),
        ({"lora_a": (6, 2)}, "no lora_b"),
        ({"lora_a": (6, 2), "lora_b": (2, 4), "scales": (3,)}, "'q.scales'"),
    ],
)
def test_mlx_tensors_that_are_no_lora_are_refused(
    parts: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    config = {"lora_parameters": {"rank": 2, "scale": 1}}
    tensors = {f"q__{part}": _random(*shape) for part, shape in parts.items()}
    assert words in _refused(_mlx(tmp_path / "a", config, **tensors))


def test_torchtune_needs_alpha_and_the_heads_of_the_base(tmp_path: Path) -> None:
    folder = _copy(CASES["torchtune_llama"], tmp_path / "a")
    (folder / "config.json").write_text('{"model_type": "phi3", "num_attention_heads": 4}')
    assert "'phi3' is not supported" in _refused(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 3}')
    assert "32 rows are not 3 heads" in _refused(folder)
    (folder / "config.json").unlink()
    assert "config.json" in _refused(folder)
    assert "num_key_value_heads" in _refused(folder)
    (folder / "adapter_config.json").unlink()
    assert "lora_alpha" in _refused(folder)


def test_torchtune_s_own_form_and_what_it_writes_for_peft_are_one_adapter() -> None:
    own = _factors(CASES["torchtune_llama"].adapter)
    for_peft = _factors(CASES["torchtune_llama_peft"].adapter)
    assert own.keys() == for_peft.keys()
    for module, edit in own.items():
        np.testing.assert_array_equal(edit.b, for_peft[module].b)
        assert edit.scale == for_peft[module].scale


def test_torchtune_keeps_the_rows_of_qwen_as_they_are(tmp_path: Path) -> None:
    folder = _copy(CASES["torchtune_llama"], tmp_path / "a")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    name = "model.layers.0.self_attn.q_proj"
    there, paired = (
        _factors(folder)[name].b,
        _factors(CASES["torchtune_llama"].adapter)[name].b,
    )
    np.testing.assert_array_equal(halves_of_pairs(there, 4), paired)


def test_litgpt_without_its_settings_is_refused(tmp_path: Path) -> None:
    case = CASES["litgpt_llama"]
    for name in ("hyperparameters.yaml", "model_config.yaml"):
        folder = _copy(case, tmp_path / name)
        (folder / name).write_text("- no: [mapping")
        assert name in _refused(folder)
        (folder / name).unlink()
        assert f"has no {name}" in _refused(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("lora_key: false", "lora_key: true"), "3 groups"),
        (("lora_value: true", "lora_value: false"), "1 groups"),
        (("lora_r: 4", "lora_r: 3"), "lora_r is 3"),
        (("lora_r: 4", "lora_r: 0"), "wrong kind"),
        (("lora_alpha: 6", "x: 6"), "no lora_alpha"),
        (("lora_alpha: 6", "lora_alpha: .nan"), "no number"),
    ],
)
def test_litgpt_settings_of_another_adapter_are_refused(
    change: tuple[str, str], words: str, tmp_path: Path
) -> None:
    folder = _copy(CASES["litgpt_llama"], tmp_path / "a")
    path = folder / "hyperparameters.yaml"
    path.write_text(path.read_text().replace(*change))
    assert words in _refused(folder)


def test_litgpt_models_of_another_form_are_refused(tmp_path: Path) -> None:
    folder = _copy(CASES["litgpt_llama"], tmp_path / "a")
    path = folder / "model_config.yaml"
    path.write_text(path.read_text().replace("LLaMAMLP", "LLaMAMoE"))
    assert "mlp_class_name LLaMAMoE" in _refused(folder)


def _gguf(
    path: Path, tensors: dict[str, np.ndarray], arch: str = "qwen2", **facts: Any
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(facts.get("type", "adapter"))
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", facts.get("alpha", 8.0))
    for name, value in tensors.items():
        kind = facts.get("kind", gguf.GGMLQuantizationType.F32)
        data = gguf.quants.quantize(value, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf_tensors_of_every_usual_type_are_dequantised(kind: str, tmp_path: Path) -> None:
    a, b = _random(32, 64), _random(96, 32)
    name = "blk.0.ffn_up.weight"
    path = _gguf(
        tmp_path / "a.gguf",
        {f"{name}.lora_a": a, f"{name}.lora_b": b},
        kind=gguf.GGMLQuantizationType[kind],
    )
    edit = _factors(path)["model.layers.0.mlp.up_proj"]
    assert edit.scale == 8 / 32
    for found, value in ((edit.a, a), (edit.b, b)):
        np.testing.assert_allclose(found, value, atol=0 if kind == "F32" else 0.02, rtol=0.01)


@pytest.mark.parametrize("kind", gguf_lora.ARCHITECTURES)
def test_gguf_names_are_those_of_the_package_s_own_table(kind: str) -> None:
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    table = gguf.get_tensor_name_map(arch, 2)
    names = gguf_lora.ARCHITECTURES[kind]
    for name, module in names.tensors.items():
        assert table.get_name(f"{names.layer.format(1)}.{module}") == f"blk.1.{name}"
    for name, module in names.whole.items():
        assert table.get_name(module) == name


ORDERS = json.loads((ROOT / "gguf_orders.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ORDERS)
def test_gguf_rows_come_back_in_the_order_that_the_converter_found(
    kind: str, tmp_path: Path
) -> None:
    """Each row of the factor held its own number when llama.cpp converted it."""
    tensors = {}
    for name, rows in ORDERS[kind].items():
        tensors[name] = np.array(rows, np.float32)[:, None]
        tensors[name.replace("lora_b", "lora_a")] = _random(1, 32)
    _gguf(tmp_path / "a.gguf", tensors, kind)
    base = {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(base))
    for edit in _factors(tmp_path).values():
        np.testing.assert_array_equal(edit.b[:, 0], np.arange(len(edit.b)))


def test_every_architecture_of_gguf_has_the_converter_s_order_or_a_case() -> None:
    assert {*ORDERS, "bert"} == set(gguf_lora.ARCHITECTURES)


@pytest.mark.parametrize(
    ("tensors", "facts", "words"),
    [
        ({}, {"arch": "rwkv6"}, "'rwkv6' is not supported"),
        ({}, {"type": "model"}, "GGUF file of a model, no LoRA"),
        ({"blk.0.ffn_up.weight.lora_a": (2, 4)}, {}, "no lora_b"),
        ({"blk.0.x.weight.lora_a": (2, 4), "blk.0.x.weight.lora_b": (4, 2)}, {}, "blk.0.x"),
        ({"blk.0.attn_norm.weight": (4,)}, {}, "'blk.0.attn_norm.weight'"),
        ({"output.weight.lora_a": (2, 4), "output.weight.lora_b": (4, 2)},
         {"alpha": float("inf")}, "no number"),
    ],
)  # fmt: skip
def test_a_gguf_file_of_another_kind_is_refused(
    tensors: dict[str, tuple[int, ...]], facts: dict[str, Any], words: str, tmp_path: Path
) -> None:
    made = {name: _random(*shape) for name, shape in tensors.items()}
    assert words in _refused(_gguf(tmp_path / "a.gguf", made or {"x": _random(2)}, **facts))


def test_gguf_of_llama_alone_says_what_to_put_beside_it(tmp_path: Path) -> None:
    file = shutil.copy(CASES["gguf_llama"].adapter / "adapter.gguf", tmp_path)
    assert "config.json" in _refused(Path(file))


def test_keras_layers_without_names_are_refused_with_what_to_write(
    tmp_path: Path,
) -> None:
    file = CASES["keras_llama"].adapter / "tiny.lora.h5"
    assert '{"modules": {"11":' in _refused(file)
    folder = _copy(CASES["keras_llama"], tmp_path / "a", {"modules": {"8": 3}})
    assert "calls its layers 11, 19" in _refused(folder)


@pytest.mark.parametrize(
    ("a", "b", "equation"),
    [((6, 2), (2, 4), "ir,ro->io"), ((6, 3, 2), (2, 4), "dnr,rh->dnh"),
     ((3, 4, 2), (2, 12), "nhr,rd->nhd")],
)  # fmt: skip
def test_keras_factors_give_the_kernel_that_keras_adds(
    a: tuple[int, ...], b: tuple[int, ...], equation: str, tmp_path: Path
) -> None:
    first, second = _random(*a), _random(*b)
    with h5py.File(tmp_path / "x.lora.h5", "w") as file:
        file["lora/5/vars/lora_kernel_a"] = first
        file["lora/5/vars/lora_kernel_b"] = second
    (tmp_path / "adapter_config.json").write_text('{"modules": {"5": "q"}}')
    edit = _factors(tmp_path)["q"]
    kernel = np.einsum(equation, first, second)
    rows = edit.a.shape[1]
    np.testing.assert_allclose((edit.b @ edit.a).T, kernel.reshape(rows, -1), rtol=1e-5)


def test_keras_tensors_outside_of_the_file_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.lora.h5", "w") as file:
        file["lora/5/vars/lora_kernel_a"] = _random(6, 2)
        external = [(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("lora/5/vars/lora_kernel_b", (2, 4), "f4", external=external)
    assert "no tensor of this file" in _refused(tmp_path)


def _nemo(folder: Path, change: Callable[[dict[str, Any]], None], name: str) -> Path:
    """A case of NeMo, unpacked, with a changed configuration."""
    folder.mkdir()
    with tarfile.open(CASES[name].adapter / "adapter.nemo") as archive:
        for member in ("model_config.yaml", "model_weights.ckpt"):
            stream = archive.extractfile(f"./{member}")
            assert stream
            (folder / member).write_bytes(stream.read())
    path = folder / "model_config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.dump(config))
    return folder


def test_nemo_s_unpacked_folder_is_read_like_the_archive(tmp_path: Path) -> None:
    folder = _nemo(tmp_path / "a", lambda _: None, "nemo_llama_lora")
    packed = _factors(CASES["nemo_llama_lora"].adapter)
    for module, edit in _factors(folder).items():
        np.testing.assert_array_equal(edit.b, packed[module].b)
        assert edit.scale == 6 / 4


@pytest.mark.parametrize("alpha", [None, "${model.peft.lora_tuning.adapter_dim}"])
def test_nemo_s_alpha_is_the_rank_unless_a_number_is_given(
    alpha: str | None, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["peft"]["lora_tuning"]["alpha"] = alpha

    edits = _factors(_nemo(tmp_path / "a", change, "nemo_llama_lora"))
    assert {edit.scale for edit in edits.values()} == {1.0}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("nemo_llama_lora", {"num_attention_heads": 3}, "3 heads in 2 groups"),
        ("nemo_llama_lora", {"kv_channels": 16}, "of size 16"),
        ("nemo_llama_lora", {"activation": "gelu"}, "'gelu' is not supported"),
        ("nemo_llama_lora", {"peft": {"lora_tuning": {"alpha": "x"}}}, "no number"),
        ("nemo_llama_post", {"bias": True}, "has a bias"),
        ("nemo_llama_post", {"peft": {"adapter_tuning": {"norm_position": "both"}}}, "'both'"),
    ],
)
def test_nemo_settings_that_the_weights_do_not_fit_are_refused(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in _refused(_nemo(tmp_path / "a", lambda c: c.update(changes), name))


def test_nemo_weights_of_several_machines_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.nemo", "w") as archive:
        archive.addfile(tarfile.TarInfo("mp_rank_00/model_weights.ckpt"))
    assert "lora_to_tp1.py" in _refused(tmp_path / "a.nemo")


def test_loralib_without_alpha_says_what_to_put_beside_it(tmp_path: Path) -> None:
    file = CASES["loralib_bert"].adapter / "lora.pt"
    assert '{"lora_alpha": 16}' in _refused(file)
    alone = shutil.copy(file, tmp_path / "lora.pt")
    assert "adapter_config.json" in _refused(Path(alone).parent)


def test_loralib_merged_layers_need_enable_lora(tmp_path: Path) -> None:
    case = CASES["loralib_gpt2_merged"]
    assert "enable_lora" in _refused(_copy(case, tmp_path / "a", {"enable_lora": None}))
    wrong = _copy(case, tmp_path / "b", {"enable_lora": [True, True, True]})
    assert "does not fit" in _refused(wrong)


def test_minlora_keys_are_read_like_loralib_s(tmp_path: Path) -> None:
    """Imitated: minLoRA parametrises `weight`, with alpha / rank as the scale."""
    start = "fc1.parametrizations.weight.0"
    a, b = _random(2, 4), _random(4, 2)
    safetensors.numpy.save_file(
        {f"{start}.lora_A": a, f"{start}.lora_B": b}, tmp_path / "lora.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6}')
    edit = _factors(tmp_path)["fc1"]
    assert edit.scale == 3
    np.testing.assert_array_equal(edit.b, b)


def test_weights_of_the_base_beside_loralib_s_factors_are_refused(tmp_path: Path) -> None:
    factors = {"fc1.lora_A": _random(2, 4), "fc1.lora_B": _random(4, 2)}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6}')
    path = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file({**factors, "fc1.weight": _random(4, 4)}, path)
    assert "'fc1.weight'" in _refused(tmp_path)
    safetensors.numpy.save_file({**factors, "fc1.bias": _random(4)}, path)
    assert isinstance(_edits(tmp_path)[1], Replacement)


def _edifice(path: Path, **parts: np.ndarray) -> Path:
    named = {key.replace("__", "."): value for key, value in parts.items()}
    safetensors.numpy.save_file(named, path / "adapter.safetensors")
    return path


def test_edifice_s_names_may_have_underscores_for_dots(tmp_path: Path) -> None:
    case = CASES["edifice_bert"]
    tensors = safetensors.numpy.load_file(case.adapter / "adapter.safetensors")
    named = {}
    for key, value in tensors.items():
        name, parameter = key.rsplit(".", 1)
        named[f"{name.replace('.', '_')}.{parameter}"] = value
    safetensors.numpy.save_file(named, tmp_path / "adapter.safetensors")
    base = oa.open_model(case.base)
    found = oa.load_checkpoint(tmp_path, base).adapter.feeds()
    for name, value in oa.load_checkpoint(case.adapter, base).adapter.feeds().items():
        np.testing.assert_array_equal(found[name], value)


def test_edifice_s_activation_is_relu_unless_the_folder_says_another(tmp_path: Path) -> None:
    parts = {"fc1_down__kernel": _random(4, 2), "fc1_up__kernel": _random(2, 4)}
    (edit,) = _edits(_edifice(tmp_path, **parts))
    assert isinstance(edit, Bottleneck)
    assert (edit.module, edit.activation, edit.place) == ("fc1", "relu", "output")
    (tmp_path / "adapter_config.json").write_text('{"activation": "swish"}')
    (edit,) = _edits(tmp_path)
    assert isinstance(edit, Bottleneck)
    assert edit.activation == "silu"
    (tmp_path / "adapter_config.json").write_text('{"activation": "softmax"}')
    assert "'softmax'" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"down__kernel": (4, 2), "up__kernel": (3, 4)}, "kernels of shape [4, 2] and [3, 4]"),
        ({"down__kernel": (4, 2)}, "has no up"),
        ({"down__kernel": (4, 2), "up__kernel": (2, 4), "up__bias": (2,)}, "[2], not [4]"),
        ({"down__kernel": (4, 2), "up__kernel": (2, 4), "n__gamma": (4,)}, "'fc1_n.gamma'"),
    ],
)  # fmt: skip
def test_an_incomplete_edifice_adapter_is_refused(
    parts: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    made = {f"fc1_{name}": _random(*shape) for name, shape in parts.items()}
    assert words in _refused(_edifice(tmp_path, **made))


def test_two_adapters_in_one_folder_are_not_guessed_between(tmp_path: Path) -> None:
    parts = {"fc1_down__kernel": _random(4, 2), "fc1_up__kernel": _random(2, 4)}
    _edifice(tmp_path, **parts)
    shutil.copy(tmp_path / "adapter.safetensors", tmp_path / "other.safetensors")
    assert "several files of adapters" in _refused(tmp_path)
