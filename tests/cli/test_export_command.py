"""`onnx-adapt export`: what is written, said and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from adapter_models import lora, lora_on, peft_folder, saved_model
from slot_models import cli
from trained_cases import session_of

import onnx_adapt as oa

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def work(tmp_path: Path, capsys: Capture) -> Path:
    """A folder with a base, an adapted model, its adapter, and inputs."""
    base = saved_model(tmp_path / "base.onnx")
    folder, model = peft_folder(tmp_path / "fr", lora()), tmp_path / "adapted.onnx"
    given = ["insert", str(base), "--adapter", str(folder), "-o", str(model)]
    assert cli(capsys, *given)[0] == 0
    (tmp_path / "adapted.fr.safetensors").rename(tmp_path / "fr.safetensors")
    np.savez(tmp_path / "x.npz", x=X)
    return tmp_path


def _names(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def _export(capsys: Capture, work: Path, *options: str) -> tuple[int, str, str]:
    return cli(capsys, "export", str(work / "adapted.onnx"), "--required", *options)


def test_an_exported_model_goes_through_every_command_and_back(
    work: Path, capsys: Capture
) -> None:
    model = work / "required.onnx"
    code, out, err = _export(capsys, work, "-o", str(model), "--json")
    told = json.loads(out)
    assert (code, told["output"]) == (0, str(model))
    assert told["neutral"] == str(work / "required.safetensors")
    assert f"wrote {work / 'required.safetensors'}: feed it" in err
    assert oa.load_adapter(told["neutral"]).feeds().keys() == set(told["inputs"])
    fed = {"x": X, **oa.load_adapter(work / "fr.safetensors").feeds()}
    found = session_of(model).run(None, fed)[0]
    np.testing.assert_allclose(found, lora_on(X, lora()), 1e-4, 1e-4)
    assert cli(capsys, "slots", str(model))[0] == 0
    assert (
        cli(capsys, "check", str(model), told["neutral"], str(work / "fr.safetensors"))[0] == 0
    )
    assert cli(capsys, "verify", str(work / "base.onnx"), str(model))[0] == 0
    y = work / "y.npz"
    given = ["run", str(model), "--inputs", str(work / "x.npz"), "-o", str(y)]
    assert cli(capsys, *given)[0] == 0
    plain = session_of(work / "base.onnx").run(None, {"x": X})[0]
    np.testing.assert_allclose(np.load(y)["y"], plain, 1e-5, 1e-5)
    assert cli(capsys, *given, "--adapter", str(work / "fr.safetensors"))[0] == 0
    np.testing.assert_allclose(np.load(y)["y"], lora_on(X, lora()), 1e-4, 1e-4)
    for command in (
        ["fill", str(model), str(work / "fr.safetensors")],
        ["remove", str(model)],
    ):
        assert cli(capsys, *command, "-o", str(work / f"{command[0]}.onnx"))[0] == 0
    assert (work / "remove.onnx").read_bytes() == (work / "base.onnx").read_bytes()
    filled = session_of(work / "fill.onnx").run(None, {"x": X})[0]
    np.testing.assert_allclose(filled, lora_on(X, lora()), 1e-4, 1e-4)


def test_the_default_name_is_beside_the_model_and_a_second_export_is_the_same(
    work: Path, capsys: Capture
) -> None:
    assert _export(capsys, work)[0] == 0
    first = _names(work)
    assert {"adapted.required.onnx", "adapted.required.safetensors"} <= first.keys()
    assert _export(capsys, work)[0] == 0
    assert _names(work) == first


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    work: Path, capsys: Capture
) -> None:
    model, adapter = str(work / "adapted.onnx"), str(work / "fr.safetensors")
    assert cli(capsys, "fill", model, adapter, "-o", str(work / "full.onnx"))[0] == 0
    assert cli(capsys, "fill", model, adapter, "-o", str(work / "ice.onnx"), "--baked")[0] == 0
    assert _export(capsys, work, "-o", str(work / "done.onnx"))[0] == 0
    (work / "text.onnx").write_text("no model")
    before = _names(work)
    refused = {
        ("full.onnx", "out.onnx"): "full.onnx is filled",
        ("ice.onnx", "out.onnx"): "are baked",
        ("done.onnx", "out.onnx"): "exported already",
        ("base.onnx", "out.onnx"): "has no slots",
        ("text.onnx", "out.onnx"): "text.onnx",
        ("missing.onnx", "out.onnx"): "missing.onnx",
        ("adapted.onnx", "fr.onnx"): "fr.safetensors exists",
        ("adapted.onnx", "x.safetensors"): "no name for a model",
        ("adapted.onnx", "adapted.onnx"): "would replace the input",
        ("adapted.onnx", "nowhere/out.onnx"): "there is no folder",
    }
    for (source, target), message in refused.items():
        given = [str(work / source), "--required", "-o", str(work / target)]
        code, out, err = cli(capsys, "export", *given)
        assert (code, out) == (2, ""), source
        assert message in err
        assert "hint: " in err
        assert _names(work) == before


def test_sites_of_an_exported_model_are_not_offered(work: Path, capsys: Capture) -> None:
    assert _export(capsys, work, "-o", str(work / "required.onnx"))[0] == 0
    code, _, err = cli(capsys, "sites", str(work / "required.onnx"))
    assert code == 0
    assert "insert into the model that it was exported from" in err
    assert "next: " not in err


def test_fill_says_that_the_neutral_adapter_changes_nothing(
    work: Path, capsys: Capture
) -> None:
    assert _export(capsys, work, "-o", str(work / "required.onnx"))[0] == 0
    given = ["fill", str(work / "required.onnx"), "-o", str(work / "filled.onnx")]
    _, _, err = cli(capsys, *given, str(work / "required.safetensors"))
    assert "note: 'required' turns all of its slots off" in err
    _, _, err = cli(capsys, *given, str(work / "fr.safetensors"))
    assert "turns all" not in err


def test_export_says_that_it_needs_to_know_how(work: Path, capsys: Capture) -> None:
    code, _, err = cli(capsys, "export", str(work / "adapted.onnx"))
    assert code == 2
    assert "--required" in err
