"""`onnx-adapt run`: outputs by name, shapes, latency, and how far an adapter moves them."""

import json
from pathlib import Path

import numpy as np
import pytest
from adapter_models import adapted, bumped
from session_adapters import BASE, DE, FR, X, close
from slot_models import cli

import onnx_adapt as oa

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    oa.save_model(adapted(), tmp_path / "adapted.onnx")
    oa.save_adapter(FR, tmp_path / "adapted.fr.safetensors")
    oa.save_adapter(DE, tmp_path / "de.onnx_adapter")
    np.savez(tmp_path / "x.npz", x=X)
    return tmp_path


def _run(capsys: Capture, work: Path, *args: str) -> tuple[np.ndarray, str, str]:
    out = work / "y.npz"
    given = ("run", str(work / "adapted.onnx"), "--inputs", str(work / "x.npz"))
    code, text, talk = cli(capsys, *given, *args, "-o", str(out))
    assert code == 0, talk
    with np.load(out) as stored:
        assert stored.files == ["y"]
        return stored["y"], text, talk


def test_without_an_adapter_it_is_the_base(work: Path, capsys: Capture) -> None:
    found, text, talk = _run(capsys, work)
    assert close(found, BASE)
    assert "[6, 4]" in text
    assert "float32" in text
    assert "latency" in talk


@pytest.mark.parametrize("name", ["fr", "adapted.fr.safetensors", "de", "de.onnx_adapter"])
def test_an_adapter_is_a_file_or_a_name_beside_the_model(
    name: str, work: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    found, _, _ = _run(capsys, work, "--adapter", name)
    assert close(found, bumped(X, FR if "fr" in name else DE))


def test_blends_and_rows_name_their_adapters(work: Path, capsys: Capture) -> None:
    found, _, _ = _run(capsys, work, "--rows", "fr,de,-,fr,de,-")
    for i, expected in enumerate((bumped(X, FR), bumped(X, DE), BASE) * 2):
        assert close(found[i], expected[i])
    blended, _, _ = _run(capsys, work, "--blend", f"fr=0.7,{work / 'de.onnx_adapter'}=0.3")
    with oa.AdapterSession(work / "adapted.onnx", {"fr": FR, "de": DE}) as session:
        assert close(blended, session.run({"x": X}, {"fr": 0.7, "de": 0.3})["y"])


def test_compare_says_how_far_each_output_moved(work: Path, capsys: Capture) -> None:
    given = (str(work / "adapted.onnx"), "--inputs", str(work / "x.npz"), "--json")
    code, text, _ = cli(capsys, "run", *given, "--adapter", "fr", "--compare", "base")
    document = json.loads(text)
    (entry,) = document["outputs"]
    apart = np.abs(bumped(X, FR) - BASE).max()
    assert code == 0
    assert entry["moved"] == pytest.approx(apart, rel=1e-4)
    assert entry["relative"] == pytest.approx(apart / np.abs(BASE).max(), rel=1e-4)
    assert (entry["output"], entry["shape"]) == ("y", [6, 4])


def test_repeat_tells_the_latency(work: Path, capsys: Capture) -> None:
    given = (str(work / "adapted.onnx"), "--inputs", str(work / "x.npz"))
    code, text, _ = cli(capsys, "run", *given, "--repeat", "20", "--json")
    latency = json.loads(text)["latency_ms"]
    assert (code, latency["runs"]) == (0, 20)
    assert 0 < latency["min"] <= latency["median"] <= latency["max"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--adapter", "es"), "no adapter 'es'"),
        (("--adapter", "none.npz"), "none.npz"),
        (("--adapter", "fr", "--rows", "fr"), "give one of"),
        (("--rows", "fr,de"), "adapters given is 2"),
        (("--rows", "fr,,de"), "empty"),
        (("--blend", "fr"), "a=0.7"),
        (("--blend", "fr=0.5,fr=0.5"), "each name once"),
        (("--blend", "fr=much"), "'much' is no number"),
        (("--blend", "fr=nan"), "no weight of a blend"),
        (("--compare", "base"), "nothing to compare"),
        (("--repeat", "0"), "0"),
        (("-o", "y.txt"), "no .npz"),
    ],
)
def test_bad_input_is_an_error_with_a_hint_and_writes_nothing(
    args: tuple[str, ...], words: str, work: Path, capsys: Capture
) -> None:
    before = sorted(work.iterdir())
    given = ("run", str(work / "adapted.onnx"), "--inputs", str(work / "x.npz"))
    code, out, err = cli(capsys, *given, *args)
    assert (code, out) == (2, "")
    assert words in err
    assert "hint: " in err
    assert sorted(work.iterdir()) == before


def test_the_outputs_never_replace_the_inputs(work: Path, capsys: Capture) -> None:
    given = ("run", str(work / "adapted.onnx"), "--inputs", str(work / "x.npz"))
    code, _, err = cli(capsys, *given, "-o", str(work / "x.npz"))
    assert (code, "would replace" in err) == (2, True)


def test_a_name_that_two_files_have_is_ambiguous(work: Path, capsys: Capture) -> None:
    oa.save_adapter(FR, work / "fr.npz")
    given = ("run", str(work / "adapted.onnx"), "--inputs", str(work / "x.npz"))
    code, _, err = cli(capsys, *given, "--adapter", "fr")
    assert code == 2
    assert "fr.npz" in err
    assert "adapted.fr.safetensors" in err


@pytest.mark.parametrize("name", ["missing.npz", "adapted.onnx"])
def test_inputs_that_cannot_be_read_are_named(name: str, work: Path, capsys: Capture) -> None:
    code, _, err = cli(capsys, "run", str(work / "adapted.onnx"), "--inputs", str(work / name))
    assert (code, name in err) == (2, True)
