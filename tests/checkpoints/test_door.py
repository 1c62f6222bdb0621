"""One door for every trained adapter: a file or a folder, and content tells which it is."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from adapter_models import lora, peft_folder, saved_model
from slot_models import cli
from torch_files import archive, one, tensor

import onnx_adapt as oa
from onnx_adapt.checkpoints.readers.files import find_files
from onnx_adapt.checkpoints.readers.headers import read_header
from onnx_adapt.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _refused(path: Path, base: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(path, oa.open_model(base))
    return f"{caught.value.message}\n{caught.value.hint}"


def test_a_safetensors_file_named_bin_is_read_as_what_it_is(tmp_path: Path) -> None:
    base = oa.open_model(saved_model(tmp_path / "model.onnx"))
    folder = peft_folder(tmp_path / "trained", lora())
    wanted = oa.load_checkpoint(folder, base).adapter
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    found = oa.load_checkpoint(folder, base).adapter
    for name, array in wanted.feeds().items():
        np.testing.assert_array_equal(found.feeds()[name], array)


def test_a_pickle_named_safetensors_is_read_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(archive(one(tensor())))
    header = read_header(path)
    assert dict(header.shapes) == {"w": (4,)}


def test_names_shapes_and_metadata_are_known_without_reading_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({"a.b": np.zeros((3, 2), "f4")}, path, {"ss_dim": "4"})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = read_header(path)
    assert dict(header.shapes) == {"a.b": (3, 2)}
    assert dict(header.metadata) == {"ss_dim": "4"}
    path.write_bytes(whole[: 8 + length])  # all of the weights are cut off
    assert read_header(path).shapes == header.shapes


def test_a_file_is_looked_at_once(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3, "f4")}, path)
    files = find_files(path, "")
    assert files.file == path.name
    first = files.header(path.name)
    path.unlink()
    assert files.header(path.name) is first


def test_weights_without_their_settings_are_refused_with_what_is_missing(
    tmp_path: Path,
) -> None:
    base = saved_model(tmp_path / "model.onnx")
    folder = peft_folder(tmp_path / "trained", lora())
    assert f"give its folder, {folder}" in _refused(folder / WEIGHTS, base)
    (folder / CONFIG).unlink()
    text = _refused(folder / WEIGHTS, base)
    assert "PEFT's, without settings" in text
    assert "weights alone do not say rank" in text


def test_weights_of_no_adapter_are_refused_with_what_was_seen(tmp_path: Path) -> None:
    base, path = saved_model(tmp_path / "model.onnx"), tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"encoder.fc1.weight": np.zeros((4, 4), "f4")}, path)
    text = _refused(path, base)
    assert "encoder.fc1.weight" in text
    assert "no trained adapter" in text
    assert "one of these saved: torchtune; PEFT; AdapterHub" in text


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    base, path = saved_model(tmp_path / "model.onnx"), tmp_path / "adapter.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "a Git LFS pointer" in _refused(path, base)
    path.write_bytes(b"\xff" * 64)
    assert "no file of weights" in _refused(path, base)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("trained/adapter_config.json", "{}")
    assert f"{path} is a zip archive\nunpack it: `unzip" in _refused(path, base)
    path.write_bytes((1 << 31).to_bytes(8, "little") + b"{" + bytes(64))
    assert "the header goes past the end" in _refused(path, base)
    path.write_bytes((9).to_bytes(8, "little") + b'{"a":[1]}')
    assert "damaged safetensors file" in _refused(path, base)


def test_convert_keeps_the_file_that_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, path = saved_model(tmp_path / "model.onnx"), tmp_path / "style.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3, "f4")}, path)
    before = path.read_bytes()
    code, _, _ = cli(capsys, "convert", str(path), "--for", str(base), "-o", str(path))
    assert code == 2
    assert path.read_bytes() == before
