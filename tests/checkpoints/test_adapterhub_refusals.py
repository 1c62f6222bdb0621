"""AdapterHub checkpoints with wrong tensors or settings: refused, never a wrong adapter."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from slot_models import cli
from trained_cases import CASES

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
Array = np.ndarray
Tensors = dict[str, Array]


def _edited(
    name: str,
    folder: Path,
    change: Callable[[Tensors], Tensors] = dict,
    **settings: Any,
) -> Path:
    """A copy of a case's checkpoint with other tensors or settings."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(CASES[name].adapter, folder, copy_function=shutil.copyfile)
    facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    facts["config"] |= settings
    (folder / CONFIG).write_text(json.dumps(facts), encoding="utf-8")
    tensors = change(safetensors.numpy.load_file(folder / WEIGHTS))
    plain = {key: np.array(value, order="C") for key, value in tensors.items()}
    safetensors.numpy.save_file(plain, folder / WEIGHTS)
    return folder


def _refused(name: str, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(folder, oa.open_model(CASES[name].base))
    return caught.value.message


NAMES = ["ah_llama_double_seq_bn", "ah_bert_ln_after", "ah_bert_compacter_plus_ts",
         "ah_bert_double_seq_bn_inv_ts", "ah_gpt2_lora_k", "ah_bert_dora"]  # fmt: skip

EDITS: dict[str, Callable[[Array], Array]] = {
    "doubled": lambda a: np.concatenate([a, a], axis=-1),
    "halved": lambda a: a[: max(1, a.shape[0] // 2)],
    "flat": lambda a: a.reshape(-1)[:-1],
    "with an axis more": lambda a: a[..., None],
    "a scalar": lambda a: a.reshape(-1)[0],
    "empty": lambda a: a[:0],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoints_of_these_tests_are_read_unedited(name: str, tmp_path: Path) -> None:
    folder = _edited(name, tmp_path / "trained")
    base = oa.open_model(CASES[name].base)
    checkpoint = oa.load_checkpoint(folder, base)
    assert oa.insert_checkpoint(base, checkpoint)
    assert checkpoint.slots


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_a_wrong_shape_is_refused(name: str, edit: str, tmp_path: Path) -> None:
    tensors = safetensors.numpy.load_file(CASES[name].adapter / WEIGHTS)
    accepted = []
    for key in sorted(tensors)[:12]:
        changed = EDITS[edit](tensors[key])
        if changed.shape == tensors[key].shape:
            continue
        folder = _edited(name, tmp_path / "trained", lambda t, k=key, v=changed: {**t, k: v})
        with contextlib.suppress(CheckpointError):
            oa.load_checkpoint(folder, oa.open_model(CASES[name].base))
            accepted.append((key, tensors[key].shape, changed.shape))
    assert accepted == []


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_refused(name: str, tmp_path: Path) -> None:
    tensors = safetensors.numpy.load_file(CASES[name].adapter / WEIGHTS)
    accepted = []
    for key in sorted(tensors)[:12]:
        rest = {k: v for k, v in tensors.items() if k != key}
        folder = _edited(name, tmp_path / "trained", lambda _, r=rest: r)
        with contextlib.suppress(CheckpointError):
            oa.load_checkpoint(folder, oa.open_model(CASES[name].base))
            accepted.append(key)
    assert accepted == []


def _other_size(tensors: Tensors) -> Tensors:
    """The tensors of the same adapter for a base twice as wide."""
    return {
        key: np.concatenate([value, value], axis=value.shape.index(32))
        for key, value in tensors.items()
        if 32 in value.shape
    } | {key: value for key, value in tensors.items() if 32 not in value.shape}


@pytest.mark.parametrize(
    "name", ["ah_llama_double_seq_bn", "ah_bert_par_bn", "ah_bert_ln_after", "ah_llama_ia3"]
)
def test_an_adapter_of_another_hidden_size_is_refused_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _edited(name, tmp_path / "trained", _other_size)
    out = tmp_path / "out" / "a.onnx"
    out.parent.mkdir()
    command = ("insert", str(CASES[name].base), "--adapter", str(folder), "-o", str(out))
    code, printed, err = cli(capsys, *command)
    assert (code, printed) == (2, "")
    assert err.startswith("error: ")
    assert "64" in err
    assert not list(out.parent.iterdir())


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "an activation unknown": ("ah_llama_double_seq_bn", {"non_linearity": "telepathy"}),
    "an activation that is no text": ("ah_llama_double_seq_bn", {"non_linearity": 3}),
    "scaling is text": ("ah_llama_double_seq_bn", {"scaling": "much"}),
    "scaling is null": ("ah_llama_double_seq_bn", {"scaling": None}),
    "scaling is a list": ("ah_llama_double_seq_bn", {"scaling": [1]}),
    "scaling is huge": ("ah_llama_double_seq_bn", {"scaling": 10**400}),
    "residual unknown": ("ah_llama_double_seq_bn", {"residual_before_ln": "sometimes"}),
    "residual is a list": ("ah_llama_double_seq_bn", {"residual_before_ln": []}),
    "a gate that is not there": ("ah_llama_double_seq_bn", {"use_gating": True}),
    "a norm before that is not there": ("ah_llama_double_seq_bn", {"ln_before": True}),
    "a norm after that is not there": ("ah_llama_double_seq_bn", {"ln_after": True}),
    "alpha is null": ("ah_gpt2_lora_k", {"alpha": None}),
    "alpha is text": ("ah_gpt2_lora_k", {"alpha": "x"}),
    "r is 0": ("ah_gpt2_lora_k", {"r": 0}),
    "r is text": ("ah_gpt2_lora_k", {"r": "x"}),
    "matrices are null": ("ah_gpt2_lora_k", {"attn_matrices": None}),
    "matrices are others": ("ah_gpt2_lora_k", {"attn_matrices": ["q", "k", "v"]}),
    "an architecture unknown": ("ah_gpt2_lora_k", {"architecture": "telepathy"}),
    "an architecture that is a list": ("ah_gpt2_lora_k", {"architecture": ["lora"]}),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_setting_of_a_wrong_value_is_refused(what: str, tmp_path: Path) -> None:
    name, settings = SETTINGS[what]
    message = _refused(name, _edited(name, tmp_path / "trained", **settings))
    assert len(message) > 20


@pytest.mark.parametrize("value", [[1], "lora", 3, True])
def test_a_config_that_is_no_object_is_refused(value: object, tmp_path: Path) -> None:
    name = "ah_llama_double_seq_bn"
    folder = _edited(name, tmp_path / "trained")
    facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**facts, "config": value}), encoding="utf-8")
    assert CONFIG in _refused(name, folder)


def test_nan_in_a_checkpoint_is_refused_and_named(tmp_path: Path) -> None:
    name = "ah_llama_double_seq_bn"
    folder = _edited(
        name, tmp_path / "trained", lambda t: {k: v * np.nan for k, v in t.items()}
    )
    assert "NaN" in _refused(name, folder)


def test_an_adapter_fusion_is_read_and_refused_with_its_adapters(tmp_path: Path) -> None:
    config = {"adapter_names": ["en", "de"], "name": "en,de", "model_type": "bert"}
    (tmp_path / "adapter_fusion_config.json").write_text(json.dumps(config))
    place = "bert.encoder.layer.{}.output.adapter_fusion_layer.en,de.query.weight"
    tensors = {place.format(i): np.zeros((4, 4), np.float32) for i in range(2)}
    safetensors.numpy.save_file(tensors, tmp_path / "model_adapter_fusion.safetensors")
    base = oa.open_model(CASES["ah_bert_seq_bn"].base)
    with pytest.raises(
        CheckpointError, match="an AdapterFusion of en, de at 2 places"
    ) as error:
        oa.load_checkpoint(tmp_path, base)
    assert "attention over the outputs" in error.value.message
