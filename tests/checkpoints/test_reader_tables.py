"""Adding a library, or a method of one, is one row and one function."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from adapter_models import W1, saved_model
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.checkpoints.edits import Edit, LowRank, Scaling
from onnx_adapt.checkpoints.readers import adapterhub, table
from onnx_adapt.checkpoints.readers.files import Files
from onnx_adapt.checkpoints.readers.peft_methods import table as peft_table
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.saved import Saved
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

X = np.random.default_rng(3).standard_normal((2, 4)).astype(np.float32)
VECTOR = np.array([2, -1, 0.5, 3], np.float32)


def _folder(path: Path, config: Mapping[str, Any], file: str, **arrays: Array) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    safetensors.numpy.save_file(arrays, path / file)
    return path


def _filled(folder: Path, base: Path) -> oa.Model:
    model = oa.open_model(base)
    checkpoint = oa.load_checkpoint(folder, model)
    adapted = oa.insert_checkpoint(model, checkpoint)
    oa.verify(model, adapted).raise_for_mismatch()
    return oa.fill(adapted, checkpoint.adapter)


def _hidden(model: oa.Model) -> Array:
    """What the first of the two layers gives."""
    model = model.copy()
    model.proto.graph.output[0].name = "a"
    return np.asarray(run(model, {"x": X})[0])


def test_a_library_is_one_row_and_one_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(files: Files) -> Saved:
        tensors = files.tensors(("rank_one.safetensors",), "give the folder")
        return Saved(files.path, "rank_one", files.config(), tensors)

    def rank_one(saved: Saved) -> list[Edit]:
        column, row = saved.tensors["column"], saved.tensors["row"]
        return [LowRank(str(saved.config["rank_one"]), row, column, 1.0)]

    row = table.Reader(
        label="RankOne",
        recognises=lambda files: "rank_one" in files.config(),
        mark="`rank_one`",
        read=read,
        edits=rank_one,
    )
    down, up = VECTOR[None], np.arange(4, dtype=np.float32)[:, None]
    folder = _folder(
        tmp_path / "trained", {"rank_one": "fc1"}, "rank_one.safetensors", row=down, column=up
    )
    base = saved_model(tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="neither PEFT nor AdapterHub"):
        oa.load_checkpoint(folder, oa.open_model(base))
    monkeypatch.setitem(table.READERS, "rank_one", row)
    wanted = X @ (W1 + up @ down).T
    np.testing.assert_allclose(_hidden(_filled(folder, base)), wanted, rtol=1e-5, atol=1e-5)
    other = _folder(tmp_path / "other", {}, "rank_one.safetensors", row=down)
    with pytest.raises(CheckpointError, match="nor RankOne") as caught:
        oa.load_checkpoint(other, oa.open_model(base))
    assert "nor `rank_one`" in caught.value.hint


def test_a_method_of_peft_is_one_row_and_one_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(found: ModuleTensors) -> Iterator[Edit]:
        vector = found.parts["half_l"] * found.config["times"]
        yield Scaling(found.module, vector, on_input=False)

    config = {"peft_type": "HALVES", "times": 2}
    file = "adapter_model.safetensors"
    folder = _folder(
        tmp_path / "trained", config, file, **{"base_model.model.fc1.half_l": VECTOR / 2}
    )
    base = saved_model(tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="peft_type HALVES is not supported"):
        oa.load_checkpoint(folder, oa.open_model(base))
    monkeypatch.setitem(peft_table.METHODS, "HALVES", peft_table.Method(("half_l",), doubled))
    wanted = X @ W1.T * VECTOR
    np.testing.assert_allclose(_hidden(_filled(folder, base)), wanted, rtol=1e-5, atol=1e-5)


def test_a_method_of_adapterhub_is_one_row_and_one_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(location: str, parts: dict[str, Array], trained: adapterhub.Trained) -> Edit:
        return Scaling(location, parts["weight"] * trained.config["times"], on_input=False)

    config = {"name": "fr", "config": {"architecture": None, "times": 2}}
    file = "adapter.safetensors"
    folder = _folder(
        tmp_path / "trained", config, file, **{"fc1.halves.fr.weight": VECTOR / 2}
    )
    base = saved_model(tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match=r"halves\.fr.*no known kind"):
        oa.load_checkpoint(folder, oa.open_model(base))
    monkeypatch.setitem(adapterhub.METHODS, "halves", scaled)
    wanted = X @ W1.T * VECTOR
    np.testing.assert_allclose(_hidden(_filled(folder, base)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(peft_table.REFUSED_METHODS))
def test_a_method_that_is_refused_is_not_read_as_well(kind: str) -> None:
    assert kind not in peft_table.METHODS
