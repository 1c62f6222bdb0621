"""Adapters in shards, and in the folders of sentence-transformers' models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from adapter_models import lora, peft_folder, saved_model
from trained_cases import ROOT

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

WHOLE = "adapter_model.safetensors"
INDEX = f"{WHOLE}.index.json"
SHARDS = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def _cut(path: Path, *, index: bool = True) -> Path:
    """A checkpoint whose weights are in two files, each with those of one module."""
    tensors = lora()
    folder = peft_folder(path, tensors)
    (folder / WHOLE).unlink()
    places = {key: SHARDS["fc2" in key] for key in tensors}
    for shard in SHARDS:
        inside = {key: value for key, value in tensors.items() if places[key] == shard}
        safetensors.numpy.save_file(inside, folder / shard)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / INDEX).write_text(text, encoding="utf-8")
    return folder


def _refused(folder: Path, base: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(folder, oa.open_model(base))
    return f"{caught.value.message}\n{caught.value.hint}"


@pytest.mark.parametrize("index", [True, False])
def test_an_adapter_in_shards_is_read_as_if_it_were_whole(index: bool, tmp_path: Path) -> None:
    base = oa.open_model(saved_model(tmp_path / "model.onnx"))
    whole = oa.load_checkpoint(peft_folder(tmp_path / "whole", lora()), base).adapter
    found = oa.load_checkpoint(_cut(tmp_path / "cut", index=index), base).adapter
    assert found.feeds().keys() == whole.feeds().keys()
    for name, value in whole.feeds().items():
        np.testing.assert_array_equal(found.feeds()[name], value)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(index: bool, tmp_path: Path) -> None:
    folder, base = _cut(tmp_path / "cut", index=index), saved_model(tmp_path / "model.onnx")
    (folder / SHARDS[1]).unlink()
    text = _refused(folder, base)
    assert SHARDS[1] in text
    assert "a part of it is missing" in text


def test_a_shard_that_is_half_written_is_named(tmp_path: Path) -> None:
    folder, base = _cut(tmp_path / "cut"), saved_model(tmp_path / "model.onnx")
    data = (folder / SHARDS[1]).read_bytes()
    for size in (len(data) - 8, 20, 0):
        (folder / SHARDS[1]).write_bytes(data[:size])
        assert SHARDS[1] in _refused(folder, base)


def test_a_shard_of_another_adapter_is_named(tmp_path: Path) -> None:
    folder, base = _cut(tmp_path / "cut"), saved_model(tmp_path / "model.onnx")
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, folder / SHARDS[1])
    assert "which the index says is in it" in _refused(folder, base)
    shutil.copy(folder / SHARDS[0], folder / SHARDS[1])
    (folder / INDEX).unlink()
    assert "of another file again" in _refused(folder, base)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "..", "", 3])
def test_an_index_that_leads_out_of_the_folder_is_refused(
    place: object, tmp_path: Path
) -> None:
    folder, base = _cut(tmp_path / "cut"), saved_model(tmp_path / "model.onnx")
    text = json.dumps({"weight_map": {"a": place}})
    (folder / INDEX).write_text(text, encoding="utf-8")
    assert "files beside it" in _refused(folder, base)


def test_more_shards_than_anyone_writes_are_refused_at_once(tmp_path: Path) -> None:
    folder = _cut(tmp_path / "cut", index=False)
    for shard in SHARDS:
        (folder / shard).unlink()
    (folder / "adapter_model-1-of-99999999999.safetensors").touch()
    assert "99999999999 files" in _refused(folder, saved_model(tmp_path / "model.onnx"))


def test_an_adapter_in_the_folder_of_a_module_of_sentence_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "embedder"
    shutil.copytree(ROOT / "st_bert_lora" / "adapter", folder / "0_Transformer")
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    base = oa.open_model(ROOT / "bases" / "bert_headless" / "base.onnx")
    found = oa.load_checkpoint(folder, base)
    assert found.adapter.name == "embedder"
    assert len(found.slots) == 4


@pytest.mark.parametrize("prefix", ["0.model.", "0.auto_model."])
def test_names_of_sentence_transformers_lose_the_number_of_the_module(
    prefix: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(ROOT / "st_bert_lora_wrapped" / "adapter", tmp_path / "a")
    tensors = safetensors.numpy.load_file(folder / WHOLE)
    renamed = {key.replace("0.model.", prefix): value for key, value in tensors.items()}
    safetensors.numpy.save_file(renamed, folder / WHOLE)
    base = oa.open_model(ROOT / "bases" / "bert_headless" / "base.onnx")
    assert len(oa.load_checkpoint(folder, base).slots) == 4


def test_a_file_of_modules_that_is_no_such_thing_leaves_the_folder_as_it_is(
    tmp_path: Path,
) -> None:
    base = saved_model(tmp_path / "model.onnx")
    folder = tmp_path / "embedder"
    folder.mkdir()
    for text in ("{", "[1]", '{"a": 1}', '[{"path": "../x"}]'):
        (folder / "modules.json").write_text(text, encoding="utf-8")
        assert "has no adapter_config.json" in _refused(folder, base)
