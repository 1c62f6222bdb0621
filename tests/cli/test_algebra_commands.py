"""Adapters merged, compressed, subtracted, quantised and inspected from the command line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from adapter_models import B2, W1, W2, lora, peft_folder, saved_model, trained, two_layers
from onnx import numpy_helper
from slot_models import cli, session

import onnx_adapt as oa

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model for two LoRA adapters, and files for the other commands."""
    monkeypatch.chdir(tmp_path)
    saved_model(tmp_path / "model.onnx")
    base = oa.open_model("model.onnx")
    for name, seed in (("fr", 0), ("de", 5)):
        folder = peft_folder(tmp_path / name, lora(seed=seed))
        checkpoint = oa.load_checkpoint(folder, base)
        oa.save_adapter(checkpoint.adapter, f"{name}.safetensors")
    oa.save_model(oa.insert_checkpoint(base, checkpoint), "m.onnx")
    tuned = two_layers()
    change = np.outer(np.arange(4), np.ones(4)).astype(np.float32)
    tuned.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ascontiguousarray(W1.T + change), "onnx::MatMul_1")
    )
    onnx.save(tuned, "tuned.onnx")
    keys = {"fc1.weight": W1, "fc2.weight": W2, "fc2.bias": B2}
    safetensors.numpy.save_file(keys, "base.safetensors")
    keys["fc1.weight"] = np.ascontiguousarray(W1 + change.T)
    safetensors.numpy.save_file(keys, "tuned.safetensors")
    return tmp_path


def _document(capsys: Capture, *args: str) -> dict[str, Any]:
    code, out, err = cli(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


def _run(adapter: str, model: str = "m.onnx") -> np.ndarray:
    with oa.AdapterSession(model, {"a": adapter}) as running:
        return running.run({"x": X}, adapter="a")["y"]


def test_merge_writes_the_exact_sum(work: Path, capsys: Capture) -> None:
    files = ("fr.safetensors", "de.safetensors")
    found = _document(capsys, "merge", *files, "--weights", "0.7,0.3", "-o", "mix.safetensors")
    assert found["method"] == "cat"
    assert set(found["losses"]) == {"fc1", "fc2"}
    with oa.AdapterSession("m.onnx", {n: f"{n}.safetensors" for n in ("fr", "de")}) as running:
        blended = running.run({"x": X}, adapter={"fr": 0.7, "de": 0.3})["y"]
    np.testing.assert_allclose(_run("mix.safetensors"), blended, 0, 1e-4)


def test_merge_tells_how_far_it_is_from_the_sum(work: Path, capsys: Capture) -> None:
    args = ("merge", "fr.safetensors", "de.safetensors", "--weights", "0.7,0.3")
    args += ("--method", "ties", "--density", "0.5", "--majority", "frequency", "-o", "t.npz")
    code, out, err = cli(capsys, *args, "--for", "m.onnx")
    assert code == 0
    assert "off the exact sum" in out
    assert "merged 2 adapters by ties: wrote" in err
    assert oa.load_adapter("t.npz").weights["fc1"]["up"].shape[0] == 2
    losses = _document(capsys, *args)["losses"]
    assert all(0.1 < loss < 2 for loss in losses.values())


def test_merge_takes_the_heads_of_the_base_from_the_model(work: Path, capsys: Capture) -> None:
    (work / "heads").mkdir()
    base, checkpoint = trained(work / "heads")
    oa.save_model(oa.insert_checkpoint(base, checkpoint), "heads.onnx")
    oa.save_adapter(checkpoint.adapter, "h.safetensors")
    args = ("merge", "h.safetensors", "h.safetensors", "--weights", "0.5,1", "-o", "hh.npz")
    code, _, err = cli(capsys, *args)
    assert code == 2
    assert "--for MODEL" in err
    assert not Path("hh.npz").exists()
    assert cli(capsys, *args, "--for", "heads.onnx")[0] == 0
    head = oa.load_adapter("hh.npz").replaced["base.fc2.weight"]
    np.testing.assert_allclose(head, (1.5 * -2 * W2 - 0.5 * W2).T, 1e-5)


def test_compress_tells_what_each_slot_lost(work: Path, capsys: Capture) -> None:
    found = _document(capsys, "compress", "fr.safetensors", "--rank", "1", "-o", "c.npz")
    assert found["ranks"]["fc1"] == {"before": 2, "after": 1}
    given, small = oa.load_adapter("fr.safetensors"), oa.load_adapter("c.npz")
    assert found["losses"] == pytest.approx(oa.measure_loss(given, small))
    code, out, err = cli(
        capsys, "compress", "fr.safetensors", "--energy", "0.5", "-o", "e.npz"
    )
    assert code == 0
    assert "rank after" in out
    assert "compressed" in err


def test_a_quantised_file_runs_wherever_an_adapter_does(work: Path, capsys: Capture) -> None:
    found = _document(
        capsys, "quantize", "fr.safetensors", "--bits", "8", "-o", "q.safetensors"
    )
    assert all(0 < loss < 0.05 for loss in found["losses"].values())
    exact, near = _run("fr.safetensors"), _run("q.safetensors")
    assert 0 < np.abs(exact - near).max() < 0.05 * np.abs(exact).max()
    code, out, _ = cli(capsys, "check", "m.onnx", "q.safetensors")
    assert (code, out.count("ok")) == (0, 2)
    assert cli(capsys, "fill", "m.onnx", "q.safetensors", "-o", "filled.onnx")[0] == 0
    np.testing.assert_allclose(
        session(Path("filled.onnx")).run(None, {"x": X})[0], near, 0, 1e-5
    )
    found = _document(capsys, "inspect", "q.safetensors")
    assert (found["bits"], found["format"]) == (8, "safetensors")


def test_inspect_tells_ranks_and_the_base(work: Path, capsys: Capture) -> None:
    code, out, err = cli(capsys, "inspect", "fr.safetensors", "--for", "m.onnx")
    assert code == 0
    assert "was made for the base of m.onnx" in err
    assert [line.split()[5:7] for line in out.splitlines()[1:]] == [["2", "2"]] * 2
    oa.save_adapter(
        replace(oa.load_adapter("fr.safetensors"), fingerprint="sha256:0"), "o.npz"
    )
    code, _, err = cli(capsys, "inspect", "o.npz", "--for", "m.onnx")
    assert code == 1
    assert "was not made for the base" in err
    found = _document(capsys, "inspect", "fr.safetensors")
    assert found["slots"][0]["rank"] == 2
    assert found["misfits"] is None


def test_inspect_shows_an_adapter_that_diverged(work: Path, capsys: Capture) -> None:
    parts = {"down": np.full((4, 2), np.nan, "float32"), "up": np.ones((2, 4), "float32")}
    oa.save_adapter(
        oa.Adapter("nan", {"fc1": parts}, activations={"fc1": "identity"}), "n.npz"
    )
    code, out, _ = cli(capsys, "inspect", "n.npz")
    assert code == 0
    assert "NaN or infinity in down" in out
    assert _document(capsys, "inspect", "n.npz")["slots"][0]["norm"] is None


@pytest.mark.parametrize("weights", [False, True])
def test_subtract_writes_a_model_and_an_adapter_for_it(
    weights: bool, work: Path, capsys: Capture
) -> None:
    files = (
        ("base.safetensors", "tuned.safetensors") if weights else ("model.onnx", "tuned.onnx")
    )
    graph = ("--for", "model.onnx") if weights else ()
    args = ("subtract", *files, *graph, "--rank", "1", "-o", "s.onnx")
    found = _document(capsys, *args, "--name", "ours")
    assert found["verified"]
    assert found["losses"]["fc1"] < 1e-5
    assert Path(found["adapter"]).name == "s.ours.safetensors"
    expected = session(Path("tuned.onnx")).run(None, {"x": X})[0]
    np.testing.assert_allclose(_run("s.ours.safetensors", "s.onnx"), expected, 0, 1e-4)
    code, out, err = cli(capsys, *args, "--no-verify")
    assert code == 0
    assert out.splitlines()[0].split() == ["module", "loss"]
    assert "1 LoRA, and 0 weights replaced whole" in err


def _nan_file(folder: Path) -> None:
    parts = {"down": np.full((4, 2), np.nan, "float32"), "up": np.ones((2, 4), "float32")}
    adapter = oa.Adapter("nan", {"fc1": parts}, activations={"fc1": "identity"})
    oa.save_adapter(adapter, folder / "bad.safetensors")


def _bottleneck(folder: Path) -> None:
    parts = {"down": np.ones((4, 2), "float32"), "up": np.ones((2, 4), "float32")}
    adapter = oa.Adapter("relu", {"fc1": parts}, activations={"fc1": "relu"})
    oa.save_adapter(adapter, folder / "bad.safetensors")


def _other_base(folder: Path) -> None:
    adapter = oa.load_adapter(folder / "fr.safetensors")
    oa.save_adapter(replace(adapter, fingerprint="sha256:0"), folder / "bad.safetensors")


def _cut(folder: Path) -> None:
    data = (folder / "fr.safetensors").read_bytes()
    (folder / "bad.safetensors").write_bytes(data[:-9])


def _nothing(folder: Path) -> None:
    pass


FR, TWO = "fr.safetensors", "fr.safetensors bad.safetensors --weights 1,1"
REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "other bases": (f"merge {TWO} -o x.npz", _other_base, "different bases"),
    "NaN merged": (f"merge {TWO} --method svd -o x.npz", _nan_file, "NaN"),
    "NaN blended": (f"merge {TWO} -o x.npz", _nan_file, "NaN"),
    "cut": (f"merge {TWO} -o x.npz", _cut, "not a whole safetensors file"),
    "activation": (f"merge {TWO} -o x.npz", _bottleneck, "the activation"),
    "three weights": (f"merge {FR} {FR} --weights 1,1,1 -o x.npz", _nothing, "3 weights"),
    "no numbers": (f"merge {FR} {FR} --weights 1;1 -o x.npz", _nothing, "0.7,0.3"),
    "no weights": (f"merge {FR} {FR} -o x.npz", _nothing, "--weights"),
    "method": (f"merge {FR} {FR} --weights 1,1 --method best -o x.npz", _nothing, "no method"),
    "not for this model": (
        f"merge {FR} {FR} --weights 1,1 --for tuned.onnx -o x.npz",
        _nothing,
        "has no slots",
    ),
    "its own input": (f"merge {FR} {FR} --weights 1,1 -o {FR}", _nothing, "replace"),
    "a folder": ("merge fr de --weights 1,1 -o x.npz", _nothing, "is a folder"),
    "rank 0": (f"compress {FR} --rank 0 -o x.npz", _nothing, "no rank"),
    "rank 3": (f"compress {FR} --rank 3 -o x.npz", _nothing, "compresses nothing"),
    "no rank": (f"compress {FR} -o x.npz", _nothing, "either a rank or an energy"),
    "energy NaN": (f"compress {FR} --energy nan -o x.npz", _nothing, "no share"),
    "bottleneck": ("compress bad.safetensors --rank 1 -o x.npz", _bottleneck, "relu"),
    "NaN compressed": ("compress bad.safetensors --rank 1 -o x.npz", _nan_file, "NaN"),
    "suffix": (f"compress {FR} --rank 1 -o x.txt", _nothing, "no known adapter format"),
    "16 bits": (f"quantize {FR} --bits 16 -o x.safetensors", _nothing, "16 bits"),
    "NaN quantised": ("quantize bad.safetensors -o x.safetensors", _nan_file, "NaN"),
    "onnx_adapter": (f"quantize {FR} -o x.onnx_adapter", _nothing, "cannot hold quantised"),
    "one model": ("subtract model.onnx fr -o x.onnx --rank 1", _nothing, "no .onnx file"),
    "no graph": ("subtract base.safetensors tuned.safetensors --rank 1", _nothing, "--for"),
    "idle graph": (
        "subtract model.onnx tuned.onnx --for m.onnx --rank 1 -o x.onnx",
        _nothing,
        "is a model",
    ),
    "the same": ("subtract model.onnx model.onnx --rank 1 -o x.onnx", _nothing, "nothing"),
    "slots": ("subtract m.onnx tuned.onnx --rank 1 -o x.onnx", _nothing, "has slots already"),
    "wide": ("subtract model.onnx tuned.onnx --rank 9 -o x.onnx", _nothing, "over the width"),
    "subtract rank 0": (
        "subtract model.onnx tuned.onnx --rank 0 -o x.onnx",
        _nothing,
        "no rank",
    ),
    "an adapter": (
        f"subtract base.safetensors {FR} --for model.onnx --rank 1 -o x.onnx",
        _nothing,
        "lacks",
    ),
    "missing": ("inspect nothing.safetensors", _nothing, "cannot read"),
    "inspect a cut file": ("inspect bad.safetensors", _cut, "not a whole"),
    "inspect a model": ("inspect model.onnx", _nothing, "no adapter file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_exits_with_2_and_writes_nothing(
    what: str, work: Path, capsys: Capture
) -> None:
    line, prepare, message = REFUSED[what]
    prepare(work)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    code, out, err = cli(capsys, *line.split())
    assert (code, out) == (2, ""), err
    assert message in err
    assert "hint: " in err
    assert {p: p.read_bytes() for p in work.rglob("*") if p.is_file()} == before
