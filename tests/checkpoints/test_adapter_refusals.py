"""Checkpoints that cannot be inserted: exit 2, a reason, a hint, and nothing is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from adapter_models import lora, peft_folder, saved_model, two_layers
from onnx import helper
from slot_models import cli
from torch_files import archive, one
from trained_cases import CASES

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
Capture = pytest.CaptureFixture[str]
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def _refused(capsys: Capture, base: Path, folder: Path, *more: str) -> str:
    """Insert a checkpoint; see that it is refused and that nothing is written."""
    out = folder.parent / "out"
    out.mkdir()
    command = ("insert", str(base), "--adapter", str(folder), "-o", str(out / "a.onnx"), *more)
    code, printed, err = cli(capsys, *command)
    assert (code, printed) == (2, "")
    assert err.startswith("error: ")
    assert "\nhint: " in err
    assert not list(out.iterdir())
    return err


# What is no checkpoint.


def _folder_of_folders(path: Path) -> None:
    peft_folder(path / "checkpoint-500", lora())
    peft_folder(path / "best", lora())


def _write(name: str, data: str | bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        peft_folder(path, lora())
        (path / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return change


def _hostile(path: Path) -> None:
    peft_folder(path, lora())
    (path / WEIGHTS).unlink()
    call = b"cposix\nsystem\n(X" + b"\x04\0\0\0true" + b"tR"
    (path / "adapter_model.bin").write_bytes(archive(one(call)))


def _without_weights(path: Path) -> None:
    peft_folder(path, lora())
    (path / WEIGHTS).unlink()


def _config_is_a_folder(path: Path) -> None:
    peft_folder(path, lora())
    (path / CONFIG).unlink()
    (path / CONFIG).mkdir()


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda path: None, ["no file or folder", "trained", "saved: torchtune; PEFT"]),
    "a file": (lambda path: path.write_text("hello"), ["no file of weights", "trained"]),
    "an empty folder": (Path.mkdir, ["no adapter_config.json", "AdapterHub"]),
    "folders of checkpoints": (
        _folder_of_folders,
        ["one of its folders? best, checkpoint-500"],
    ),
    "a folder for a config": (_config_is_a_folder, ["no adapter_config.json"]),
    "no weights": (_without_weights, ["none of adapter_model.safetensors"]),
    "an empty config": (_write(CONFIG, ""), [CONFIG]),
    "no JSON": (_write(CONFIG, "{"), [CONFIG]),
    "deep JSON": (_write(CONFIG, "[" * 100_000), [CONFIG]),
    "a list": (_write(CONFIG, "[]"), [CONFIG, "JSON object"]),
    "no text": (_write(CONFIG, b"\xff\xfe\x00"), [CONFIG]),
    "of neither library": (_write(CONFIG, "{}"), [CONFIG, "neither PEFT nor AdapterHub"]),
    "empty weights": (_write(WEIGHTS, ""), [WEIGHTS]),
    "damaged weights": (_write(WEIGHTS, b"\xff" * 64), [WEIGHTS]),
    "a git-lfs pointer": (_write(WEIGHTS, "version https://git-lfs.github.com"), [WEIGHTS]),
    "a hostile pickle": (_hostile, ["posix.system", "hostile"]),
}


@pytest.mark.parametrize("what", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused(what: str, tmp_path: Path, capsys: Capture) -> None:
    make, words = NO_CHECKPOINTS[what]
    make(tmp_path / "trained")
    err = _refused(capsys, saved_model(tmp_path / "model.onnx"), tmp_path / "trained")
    assert [word for word in words if word not in err] == []


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha is text": {"lora_alpha": "sixteen"},
    "alpha is null": {"lora_alpha": None},
    "alpha is a list": {"lora_alpha": [16]},
    "alpha is NaN": {"lora_alpha": float("nan")},
    "alpha is infinite": {"lora_alpha": 1e999},
    "alpha is beyond float32": {"lora_alpha": 1e40},
    "pattern is broken": {"alpha_pattern": {"(": 3}},
    "pattern is a list": {"alpha_pattern": ["fc1"]},
    "pattern is text": {"alpha_pattern": "fc1"},
    "pattern's alpha is text": {"alpha_pattern": {"fc1": "x"}},
    "a method unknown": {"peft_type": "TELEPATHY"},
    "a method that is no text": {"peft_type": ["LORA"]},
}


@pytest.mark.parametrize(
    ("peft_type", "tensors"),
    [
        ("IA3", lora()),
        ("LORA", {"base_model.model.fc1.ia3_l": np.ones((4, 1), np.float32)}),
    ],
)
def test_tensors_of_another_method_than_the_config_s_are_refused_with_both(
    peft_type: str, tensors: dict, tmp_path: Path, capsys: Capture
) -> None:
    folder = peft_folder(tmp_path / "trained", tensors, peft_type=peft_type)
    err = _refused(capsys, saved_model(tmp_path / "model.onnx"), folder)
    assert f"peft_type {peft_type}" in err
    assert next(iter(tensors)) in err


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_with_a_wrong_value_is_refused(
    what: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = peft_folder(tmp_path / "trained", lora(), **CONFIGS[what])
    err = _refused(capsys, saved_model(tmp_path / "model.onnx"), folder, "--no-verify")
    assert any(key in err for key in (*CONFIGS[what], "alpha", "fc1", str(folder)))


A, B = (f"base_model.model.fc1.lora_{part}.weight" for part in "AB")
ZEROS = np.zeros((4, 2), np.float32)
TENSORS: dict[str, dict[str, np.ndarray | None]] = {
    "B missing": {B: None},
    "A missing": {A: None},
    "A a vector": {A: np.zeros(4, np.float32)},
    "A a scalar": {A: np.zeros((), np.float32)},
    "B a vector": {B: np.zeros(4, np.float32)},
    "A with an axis more": {A: np.zeros((2, 4, 1), np.float32)},
    "A and B exchanged": {A: ZEROS, B: ZEROS.T},
    "rank 0": {A: np.zeros((0, 4), np.float32), B: np.zeros((4, 0), np.float32)},
    "ranks that differ": {A: np.zeros((3, 4), np.float32)},
    "another width in": {A: np.zeros((2, 8), np.float32)},
    "another width out": {B: np.zeros((8, 2), np.float32)},
    "NaN": {A: np.full((2, 4), np.nan, np.float32)},
    "infinity": {B: np.full((4, 2), np.inf, np.float32)},
    "an unknown part": {"base_model.model.fc1.mystery": ZEROS},
    "a bias of another size": {"base_model.model.fc2.bias": np.zeros(3, np.float32)},
    "no tensors": dict.fromkeys(lora()),
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_checkpoint_with_a_wrong_tensor_is_refused(
    what: str, tmp_path: Path, capsys: Capture
) -> None:
    tensors = {**lora(), **TENSORS[what]}
    kept = {name: value for name, value in tensors.items() if value is not None}
    folder = peft_folder(tmp_path / "trained", kept)
    err = _refused(capsys, saved_model(tmp_path / "model.onnx"), folder)
    assert any(key in err for key in ("fc1", "fc2", str(folder)))


PROMISED: dict[str, tuple[str, dict[str, Any], str]] = {
    "DoRA without a magnitude": ("LORA", {"use_dora": True}, "lora_magnitude_vector"),
    "lora_bias without a bias": ("LORA", {"lora_bias": True}, "lora_B.bias"),
}


@pytest.mark.parametrize("what", PROMISED)
@pytest.mark.parametrize("size", [None, 1, 5])
def test_a_tensor_that_the_config_promises_must_be_there_and_fit(
    what: str, size: int | None, tmp_path: Path, capsys: Capture
) -> None:
    peft_type, config, part = PROMISED[what]
    tensors = lora(modules=["fc1"])
    if size is not None:
        tensors[f"base_model.model.fc1.{part}"] = np.ones(size, np.float32)
    folder = peft_folder(tmp_path / "trained", tensors, peft_type=peft_type, **config)
    err = _refused(capsys, saved_model(tmp_path / "model.onnx"), folder)
    assert part in err
    assert next(iter(config)) in err


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 1), (2, 4), (1, 3), (3, 1), (1, 4, 4)])
def test_factors_of_ia3_of_another_size_are_refused(
    shape: tuple[int, ...], tmp_path: Path, capsys: Capture
) -> None:
    tensors = {"base_model.model.fc2.ia3_l": np.full(shape, 2, np.float32)}
    folder = peft_folder(tmp_path / "trained", tensors, peft_type="IA3")
    assert "fc2" in _refused(capsys, saved_model(tmp_path / "model.onnx"), folder)


@pytest.mark.parametrize("name", ["ah_llama_double_seq_bn", "ah_bert_compacter_plus_ts"])
def test_a_damaged_checkpoint_is_told_in_its_own_words(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    file = "adapter.safetensors"
    tensors = safetensors.numpy.load_file(CASES[name].adapter / file)
    for number, key in enumerate(sorted(tensors)[:6]):
        folder = tmp_path / str(number) / "trained"
        shutil.copytree(CASES[name].adapter, folder, copy_function=shutil.copyfile)
        rest = {k: v for k, v in tensors.items() if k != key}
        safetensors.numpy.save_file(rest, folder / file)
        err = _refused(capsys, CASES[name].base, folder)
        assert key.partition(".adapters.")[0] in err
        assert not [
            word for word in ("Error", "Iteration", "array", "NoneType") if word in err
        ]


# The wrong base.


def _edited(name: str, folder: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a PEFT checkpoint with other keys added."""
    shutil.copytree(CASES[name].adapter, folder, copy_function=shutil.copyfile)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    more = {rename(key): value for key, value in tensors.items()}
    safetensors.numpy.save_file({**tensors, **more}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("base", "adapter", "theirs", "ours"),
    [
        ("ah_gpt2_lora", "peft_bert_lora_default_ts", "bert.encoder.layer", "transformer.h."),
        ("peft_bert_lora_default_ts", "ah_gpt2_lora", "transformer.h.0", "bert."),
        ("ah_llama_lora", "ah_bert_seq_bn", "bert.encoder.layer.0", "model.layers"),
        ("ah_bert_seq_bn", "peft_llama_lora_ts", "model.layers.0", "bert."),
        ("peft_vit_lora", "peft_bert_lora_default_ts", "bert.encoder.layer.0", ""),
        ("peft_vit_lora", "ah_bert_seq_bn", "bert.encoder.layer.0", "vit."),
        ("ah_vit_seq_bn", "ah_bert_double_seq_bn", "bert.encoder.layer.0", "vit."),
        ("peft_convnet_lora", "peft_bert_lora_default_ts", "bert.encoder", "features."),
    ],
)
def test_an_adapter_of_another_architecture_is_refused_with_both_naming_schemes(
    base: str, adapter: str, theirs: str, ours: str, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(CASES[adapter].adapter, tmp_path / "trained")
    err = _refused(capsys, CASES[base].base, tmp_path / "trained")
    assert theirs in err
    assert ours in err


def test_a_base_with_fewer_layers_is_refused_and_what_is_left_over_is_named(
    tmp_path: Path, capsys: Capture
) -> None:
    name = "peft_bert_lora_default_ts"
    folder = _edited(name, tmp_path / "t", lambda key: key.replace("layer.1.", "layer.7."))
    err = _refused(capsys, CASES[name].base, folder)
    assert "2 of 7 modules" in err
    assert "bert.encoder.layer.7.attention.self.query" in err
    assert "layer.1" not in err.partition("; the graph has")[0]
    assert "fewer layers" in err


def test_an_adapter_of_another_hidden_size_is_refused_with_both_sizes(
    tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "trained"
    case = CASES["peft_llama_lora_ts"]
    shutil.copytree(case.adapter, folder, copy_function=shutil.copyfile)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    wide = {k: np.tile(v, (1, 2) if "lora_A" in k else (2, 1)) for k, v in tensors.items()}
    safetensors.numpy.save_file(wide, folder / WEIGHTS)
    err = _refused(capsys, case.base, folder)
    assert "64" in err
    assert "32" in err
    assert "another size" in err


def test_a_hand_made_fused_layer_is_refused(tmp_path: Path, capsys: Capture) -> None:
    proto = two_layers()
    del proto.graph.node[1:]
    node = helper.make_node(
        "SkipLayerNormalization", ["a", "a", "fc2.bias"], ["y"], "/fc2/Skip"
    )
    node.domain = "com.microsoft"
    proto.graph.node.append(node)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    folder = peft_folder(tmp_path / "trained", lora())
    err = _refused(capsys, saved_model(tmp_path / "fused.onnx", proto), folder)
    assert "/fc2/Skip" in err
    assert "SkipLayerNormalization" in err


def test_an_adapter_that_cannot_be_written_leaves_no_model(
    tmp_path: Path, capsys: Capture
) -> None:
    base = saved_model(tmp_path / "model.onnx")
    folder = peft_folder(tmp_path / "trained", lora())
    out = tmp_path / "out"
    out.mkdir()
    command = ["insert", str(base), "--adapter", str(folder), "-o", str(out / "a.onnx")]
    code, printed, err = cli(capsys, *command, "--name", "x" * 250)
    assert (code, printed) == (2, "")
    assert "shorter name" in err
    assert not list(out.iterdir())


def test_an_adapter_whose_place_is_a_folder_leaves_no_model(
    tmp_path: Path, capsys: Capture
) -> None:
    base = saved_model(tmp_path / "model.onnx")
    folder = peft_folder(tmp_path / "trained", lora())
    (tmp_path / "out" / "a.trained.safetensors").mkdir(parents=True)
    out = tmp_path / "out" / "a.onnx"
    code, _, err = cli(capsys, "insert", str(base), "--adapter", str(folder), "-o", str(out))
    assert code == 2
    assert "a.trained.safetensors" in err
    assert [file.name for file in out.parent.iterdir()] == ["a.trained.safetensors"]


def test_a_broken_model_is_an_error_before_the_checkpoint_is_read(
    tmp_path: Path, capsys: Capture
) -> None:
    folder = peft_folder(tmp_path / "trained", lora())
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 30)
    assert "broken.onnx" in _refused(capsys, tmp_path / "broken.onnx", folder)
    onnx.save(two_layers(), tmp_path / "model.onnx")
    (tmp_path / "out").rmdir()
    assert "trained" in _refused(capsys, tmp_path / "model.onnx", folder / "nowhere")
