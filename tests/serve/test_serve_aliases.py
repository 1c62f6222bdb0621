"""Aliases mean one adapter after another, at once and whole, and can be rolled back."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from session_adapters import DE, FR, adapted_file, adapter

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError, RequestError
from onnx_adapt.serve.aliases import Alias, changed, read_aliases, read_change, write_aliases
from onnx_adapt.serve.repository import Repository


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    for name, item in (("fr-1", FR), ("fr-2", DE)):
        oa.save_adapter(item, tmp_path / f"adapters/{name}.npz")
    return tmp_path / "adapters"


def make(tmp_path: Path, location: str) -> Repository:
    copies = tmp_path / "copies"
    copies.mkdir(exist_ok=True)
    repository = Repository(str(adapted_file(tmp_path)), location, copies, "adapted")
    repository.sweep()
    return repository


@pytest.fixture
def repository(tmp_path: Path, folder: Path) -> Repository:
    return make(tmp_path, str(folder))


def meant(repository: Repository, name: str = "fr@stable") -> str:
    """The adapter that an alias means."""
    return repository.entries[name].version.rpartition("@")[0]


def put(folder: Path, text: str) -> None:
    (folder / "aliases.json").write_text(text, encoding="utf-8")


def test_an_alias_is_switched_and_rolled_back_once(
    repository: Repository, folder: Path, tmp_path: Path
) -> None:
    for name in ("fr-1", "fr-2", "fr-2"):
        repository.point("fr@stable", name)
        assert meant(repository) == name
    assert meant(make(tmp_path, str(folder))) == "fr-2"  # a server that is started anew
    repository.point("fr@stable", "")
    assert meant(repository) == "fr-1"
    with pytest.raises(RequestError, match="meant nothing else before"):
        repository.point("fr@stable", "")
    assert meant(repository) == "fr-1"
    repository.unload("fr@stable")
    assert "fr@stable" not in repository.entries
    assert sorted(path.name for path in folder.iterdir()) == [
        "aliases.json",
        "fr-1.npz",
        "fr-2.npz",
    ]


def test_a_file_that_is_put_there_counts_and_while_it_is_bad_the_last_good_one(
    repository: Repository, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(folder, '{"fr@stable": "fr-1", "fr@next": {"adapter": "fr-2", "before": "fr-1"}}')
    repository.sweep()
    assert (meant(repository), meant(repository, "fr@next")) == ("fr-1", "fr-2")
    put(folder, '{"fr@stable": "fr-2"')
    repository.sweep()
    repository.sweep()
    assert caplog.text.count("aliases stay as they were") == 1
    assert (meant(repository), meant(repository, "fr@next")) == ("fr-1", "fr-2")
    assert "no JSON" in repository.entries["fr@stable"].reason
    with pytest.raises(RequestError, match=r"aliases.json: it is no JSON"):
        repository.point("fr@stable", "fr-2")
    put(folder, '{"fr@stable": "fr-2"}')
    repository.sweep()
    assert repository.entries["fr@stable"].reason == ""
    assert meant(repository) == "fr-2"
    assert "fr@next" not in repository.entries
    (folder / "aliases.json").unlink()
    repository.sweep()
    assert list(repository.entries) == ["fr-1", "fr-2"]


def test_an_alias_of_a_version_keeps_it_however_often_the_file_is_replaced(
    repository: Repository, folder: Path, tmp_path: Path
) -> None:
    first = repository.entries["fr-1"].version
    repository.point("fr@stable", first)
    for seed in (7, 8, 9):
        oa.save_adapter(adapter("fr-1", seed), folder / "fr-1.npz")
        repository.sweep()
    assert repository.entries["fr-1"].version != first
    assert repository.entries["fr@stable"].version == first
    assert repository.read(first)[0] == f"{first}.npz"
    (tmp_path / "anew").mkdir()
    anew = make(tmp_path / "anew", str(folder))
    assert anew.entries["fr@stable"].version == ""
    assert f"there is no version {first!r}" in anew.entries["fr@stable"].reason


def test_an_alias_of_what_is_not_served_is_refused_and_tells_why(
    repository: Repository, folder: Path
) -> None:
    with pytest.raises(RequestError, match="there is no adapter 'xx'"):
        repository.point("fr@stable", "xx")
    assert not (folder / "aliases.json").exists()
    repository.point("fr@stable", "fr-1")
    repository.unload("fr-1")
    assert repository.entries["fr@stable"].version == ""
    assert "it was unloaded" in repository.entries["fr@stable"].reason
    with pytest.raises(RequestError, match="it was unloaded"):
        repository.load("fr@stable")
    repository.load("fr-1")
    repository.load("fr@stable")
    (folder / "fr-1.npz").unlink()
    repository.sweep()
    assert repository.entries["fr@stable"].reason == "there is no adapter 'fr-1'"


def test_a_file_that_cannot_be_written_changes_nothing(
    repository: Repository, folder: Path
) -> None:
    (folder / "aliases.json").mkdir()
    with pytest.raises(AdaptError, match=r"aliases.json"):
        repository.point("fr@stable", "fr-2")


@pytest.fixture
def store() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.mkdir("/adapters")
    yield "memory://adapters"
    files.rm("/adapters", recursive=True)


def test_an_object_store_holds_aliases_too(tmp_path: Path, folder: Path, store: str) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/adapters/fr-1.npz", (folder / "fr-1.npz").read_bytes())
    repository = make(tmp_path, store)
    repository.point("fr@stable", "fr-1")
    assert meant(repository) == "fr-1"
    assert json.loads(files.cat_file("/adapters/aliases.json"))["fr@stable"]["before"] == ""


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "",
        "\xff",
        "[" * 10**5,
        '{"fr@stable": "fr-1", "fr@stable": "fr-2"}',
        '{"fr": "fr-1"}',
        '{"fr@stable@x": "fr-1"}',
        '{"fr@3f2a9c01b2d4": "fr-1"}',
        '{"../fr@stable": "fr-1"}',
        '{"fr@stable": "../fr"}',
        '{"fr@stable": "fr@next"}',
        '{"fr@stable": {"before": "fr-1"}}',
        '{"fr@stable": {"adapter": "fr-1", "after": "fr-2"}}',
        '{"fr@stable": {"adapter": ""}}',
        '{"fr@stable": 1}',
        '{"fr@stable": ["fr-1"]}',
    ],
)
def test_what_is_no_alias_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        read_aliases(text.encode())


def test_a_file_of_aliases_is_read_as_it_was_written() -> None:
    aliases = changed({"a@b": Alias("a-2", "a-1")}, "c@d", "c@3f2a9c01b2d4")
    assert read_aliases(write_aliases(aliases)) == aliases


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fr", {"adapter": "fr-2"}),
        ("fr@stable", {"adapter": "fr-2", "rollback": True}),
        ("fr@stable", {"adapter": ["fr-2"]}),
        ("fr@stable", {"rollback": False}),
        ("fr@stable", {"file:1/model.onnx": "AAAA"}),
    ],
)
def test_other_parameters_of_a_load_are_refused(name: str, parameters: dict) -> None:
    with pytest.raises(RequestError):
        read_change(name, parameters)
