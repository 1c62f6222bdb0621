"""The table of adapter file formats: one more row is one more format everywhere."""

from pathlib import Path

import click
import json_adapters
import numpy as np
import pytest
from adapter_models import adapted, bumped
from click.shell_completion import ShellComplete
from session_adapters import DE, FR, X, close
from slot_models import cli

import onnx_adapt as oa
from onnx_adapt.cli import cli as main
from onnx_adapt.errors import AdapterError, ModelFileError
from onnx_adapt.formats import FORMATS, AdapterFormat, adapter_files, format_names
from onnx_adapt.serve.repository import Repository

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapted model and an adapter in a format that one new row describes."""
    monkeypatch.setitem(FORMATS, json_adapters.ROW.suffix, json_adapters.ROW)
    monkeypatch.chdir(tmp_path)
    oa.save_model(adapted(), tmp_path / "adapted.onnx")
    oa.save_adapter(FR, tmp_path / "adapted.fr.json_adapter")
    np.savez(tmp_path / "x.npz", x=X)
    return tmp_path


def test_a_row_lacks_no_column() -> None:
    with pytest.raises(TypeError, match="most_bytes"):
        AdapterFormat(  # type: ignore[call-arg]
            name="x",
            suffix=".x",
            module="x",
            what="an x",
            head=b"x",
            as_model="",
            only_adapters=True,
            mapped=False,
            scalars=True,
        )


def test_what_a_new_format_wrote_is_read_again(work: Path) -> None:
    found = oa.load_adapter(work / "adapted.fr.json_adapter")
    assert (found.name, found.fingerprint) == (FR.name, FR.fingerprint)
    assert list(found.feeds()) == list(FR.feeds())
    for name, value in FR.feeds().items():
        np.testing.assert_array_equal(found.feeds()[name], value)


def test_a_new_format_refuses_what_its_row_says_it_cannot_hold(work: Path) -> None:
    scalar = oa.Adapter("a", {}, {"w": np.float32(1).reshape(())})
    with pytest.raises(AdapterError, match="'w' is a scalar"):
        oa.save_adapter(scalar, work / "a.json_adapter")
    large = oa.Adapter("a", {}, {"w": np.zeros(1 << 16, np.float32)})
    with pytest.raises(AdapterError, match=r"a\.json_adapter would pass"):
        oa.save_adapter(large, work / "a.json_adapter")
    assert not (work / "a.json_adapter").exists()


def test_a_file_of_a_new_format_is_recognised_by_its_bytes(work: Path) -> None:
    data = (work / "adapted.fr.json_adapter").read_bytes()
    (work / "fr.npz").write_bytes(data)
    with pytest.raises(AdapterError, match="is a JSON adapter") as as_adapter:
        oa.load_adapter(work / "fr.npz")
    assert as_adapter.value.hint == "let its name end in .json_adapter"
    (work / "fr.onnx").write_bytes(data)
    with pytest.raises(ModelFileError, match="is a JSON adapter") as as_model:
        oa.open_model(work / "fr.onnx")
    assert as_model.value.hint == "it goes with a model, fr.onnx does"
    with pytest.raises(AdapterError) as unknown:
        oa.load_adapter(work / "fr.txt")
    assert ".json_adapter" in unknown.value.hint


def test_a_session_loads_reloads_and_runs_a_file_of_a_new_format(work: Path) -> None:
    file = work / "adapted.fr.json_adapter"
    with oa.AdapterSession(work / "adapted.onnx", {"fr": file}) as session:
        assert close(session.run({"x": X}, "fr")["y"], bumped(X, FR))
        oa.save_adapter(DE, file)
        assert session.reload() == ("fr",)
        assert close(session.run({"x": X}, "fr")["y"], bumped(X, DE))


def test_the_commands_know_a_new_format(work: Path, capsys: Capture) -> None:
    complete = ShellComplete(main, {}, "onnx-adapt", "_X")
    offered = complete.get_completions(["run", "adapted.onnx", "--adapter"], "")
    assert [item.value for item in offered] == ["fr"]
    given = ("run", "adapted.onnx", "--inputs", "x.npz", "-o", "y.npz", "--adapter")
    code, _, talk = cli(capsys, *given, "fr")
    assert code == 0, talk
    with np.load("y.npz") as stored:
        assert close(stored["y"], bumped(X, FR))
    code, _, talk = cli(capsys, *given, "absent")
    assert code == 2
    assert "adapted.fr.json_adapter" in talk
    oa.save_model(oa.fill(oa.open_model("adapted.onnx"), FR), "filled.onnx")
    code, _, talk = cli(capsys, "extract", "filled.onnx", "-o", "out.json_adapter")
    assert code == 0, talk
    assert sorted(oa.load_adapter("out.json_adapter").weights) == ["fc1", "fc2"]


def test_a_server_takes_up_a_file_of_a_new_format(work: Path) -> None:
    (work / "copies").mkdir()
    (work / "served").mkdir()
    oa.save_adapter(FR, work / "served" / "fr.json_adapter")
    repository = Repository("adapted.onnx", str(work / "served"), work / "copies", "adapted")
    repository.sweep()
    assert repository.entries["fr"].reason == ""
    name, data = repository.read(repository.entries["fr"].version)
    assert Path(name).suffix == ".json_adapter"
    assert data == (work / "served" / "fr.json_adapter").read_bytes()


def test_the_format_option_offers_every_format_and_the_default_is_the_first() -> None:
    option = next(
        p for p in main.get_command(None, "insert").params if p.name == "file_format"
    )
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == format_names()
    assert option.default == format_names()[0]


def test_every_format_is_in_the_documentation() -> None:
    docs = Path(__file__).parents[2] / "docs"
    for page in ("formats.md", "sessions.md", "serving.md"):
        text = (docs / page).read_text(encoding="utf-8")
        assert [s for s in FORMATS if f"`{s}`" not in text] == [], page


def test_a_file_of_any_arrays_is_an_adapter_only_under_the_name_of_the_model(
    work: Path,
) -> None:
    np.savez(work / "adapted.npz", x=X)
    np.savez(work / "adapted.de.npz", x=X)
    found = [path.name for path in adapter_files(Path("adapted.onnx"))]
    assert found == ["adapted.de.npz", "adapted.fr.json_adapter"]
