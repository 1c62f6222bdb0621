"""The repository of a server: what appears in a folder is checked, and served until better."""

import hashlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from adapter_models import adapted, two_layers
from session_adapters import DE, FR, adapted_file, adapter

import onnx_adapt as oa
from onnx_adapt.errors import AdapterNotFoundError, RequestError, SlotError
from onnx_adapt.serve.repository import Repository


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def repository(tmp_path: Path, folder: Path) -> Repository:
    return make(tmp_path, str(folder))


def make(tmp_path: Path, location: str, settle_s: float = 0.02) -> Repository:
    copies = tmp_path / "copies"
    copies.mkdir()
    model = str(adapted_file(tmp_path))
    return Repository(model, location, copies, "adapted", settle_s=settle_s)


def served(repository: Repository, name: str = "fr") -> oa.Adapter:
    """The adapter that is served under a name, by the bytes of its version."""
    file_name, data = repository.read(repository.entries[name].version)
    path = Path(repository._copies) / f"read-{file_name.rpartition('@')[2]}"
    path.write_bytes(data)
    return oa.load_adapter(path)


def same(one: oa.Adapter, other: oa.Adapter) -> bool:
    pairs = zip(one.feeds().items(), other.feeds().items(), strict=True)
    return all(a == b and (x == y).all() for (a, x), (b, y) in pairs)


def test_a_version_that_is_kept_is_never_written_again(
    repository: Repository, folder: Path
) -> None:
    """Who runs it may have it mapped: cut short for a moment, it ends the process."""
    file = oa.save_adapter(FR, folder / "fr.onnx_adapter")
    repository.sweep()
    path = repository.path(repository.entries["fr"].version)
    before = path.stat()
    file.write_bytes(file.read_bytes())
    repository.load("fr")
    assert repository.path(repository.entries["fr"].version) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("suffix", ["safetensors", "onnx_adapter", "npz"])
def test_a_file_that_appears_is_served(
    repository: Repository, folder: Path, suffix: str
) -> None:
    repository.sweep()
    assert repository.entries == {}
    oa.save_adapter(FR, folder / f"fr.{suffix}")
    (folder / "notes.txt").write_text("no adapter", encoding="utf-8")
    (folder / "more.npz").mkdir()
    repository.sweep()
    assert list(repository.entries) == ["fr"]
    assert same(served(repository), FR)


def test_a_file_that_changes_is_a_new_version_and_the_old_one_is_kept_a_while(
    repository: Repository, folder: Path
) -> None:
    versions = []
    for seed in (1, 2, 3):
        oa.save_adapter(adapter("fr", seed), folder / "fr.npz")
        repository.sweep()
        versions.append(repository.entries["fr"].version)
        assert same(served(repository), adapter("fr", seed))
    assert len(set(versions)) == 3
    assert repository.read(versions[1])[0] == f"{versions[1]}.npz"
    with pytest.raises(AdapterNotFoundError, match="is gone"):
        repository.read(versions[0])


def test_what_is_served_can_be_read_while_other_files_are_looked_at(
    tmp_path: Path, folder: Path
) -> None:
    repository = make(tmp_path, str(folder), settle_s=0.5)
    gone = oa.save_adapter(FR, folder / "fr.npz")
    repository.sweep()
    gone.unlink()
    oa.save_adapter(DE, folder / "de.npz")  # so new that the next look waits for half a second
    looking = threading.Thread(target=repository.sweep)
    looking.start()
    while looking.is_alive():
        for entry in repository.entries.values():
            assert repository.read(entry.version)
    assert list(repository.entries) == ["de"]


def test_the_same_content_is_the_same_version(repository: Repository, folder: Path) -> None:
    oa.save_adapter(FR, folder / "fr.npz")
    repository.sweep()
    before = repository.entries
    oa.save_adapter(FR, folder / "fr.npz")
    repository.sweep()
    assert repository.entries == before


def test_a_bad_file_is_told_and_the_good_old_one_stays(
    repository: Repository, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oa.save_adapter(FR, folder / "fr.npz")
    repository.sweep()
    good = repository.entries["fr"].version
    for content in (b"", b"no zip", (folder / "fr.npz").read_bytes()[:200]):
        (folder / "fr.npz").write_bytes(content)
        caplog.clear()
        repository.sweep()
        repository.sweep()
        entry = repository.entries["fr"]
        assert entry.version == good
        assert entry.reason
        assert [record.getMessage() for record in caplog.records] == [
            f"adapter 'fr' is refused: {entry.reason}"
        ]
        assert same(served(repository), FR)
    oa.save_adapter(DE, folder / "fr.npz")
    repository.sweep()
    assert repository.entries["fr"].reason == ""
    assert same(served(repository), DE)


def test_an_adapter_that_does_not_fit_is_never_served(
    repository: Repository, folder: Path
) -> None:
    half = oa.Adapter("half", {"fc1": FR.weights["fc1"]})
    oa.save_adapter(half, folder / "half.safetensors")
    repository.sweep()
    assert repository.entries["half"].version == ""
    assert "no weights for slot 'fc2'" in repository.entries["half"].reason
    with pytest.raises(RequestError, match="no weights for slot 'fc2'"):
        repository.load("half")


def test_names_that_no_request_could_give_are_told(
    repository: Repository, folder: Path
) -> None:
    for name in ("a b.npz", "adapted.npz", "fr.npz", "fr.safetensors", "fr@0.npz"):
        oa.save_adapter(FR, folder / name)
    repository.sweep()
    reasons = {name: entry.reason for name, entry in repository.entries.items()}
    assert all(not entry.version for entry in repository.entries.values())
    assert "letters" in reasons["a b"]
    assert "letters" in reasons["fr@0"]
    assert reasons["adapted"] == "the base is called 'adapted'"
    assert reasons["fr"] == "several files have this name: fr.npz, fr.safetensors"


def test_a_file_that_goes_is_served_no_more(repository: Repository, folder: Path) -> None:
    oa.save_adapter(FR, folder / "fr.npz")
    repository.sweep()
    version = repository.entries["fr"].version
    (folder / "fr.npz").unlink()
    repository.sweep()
    assert repository.entries == {}
    with pytest.raises(AdapterNotFoundError):
        repository.read(version)


def test_a_folder_that_is_away_for_a_while_takes_nothing_with_it(
    repository: Repository, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oa.save_adapter(FR, folder / "fr.npz")
    repository.sweep()
    before = repository.entries
    shutil.move(folder, folder.with_name("away"))
    repository.sweep()
    assert repository.entries == before
    assert same(served(repository), FR)
    assert "cannot list" in caplog.text


def test_unload_lasts_until_load_whatever_happens_to_the_file(
    repository: Repository, folder: Path
) -> None:
    oa.save_adapter(FR, folder / "fr.npz")
    repository.sweep()
    repository.unload("fr")
    oa.save_adapter(DE, folder / "fr.npz")
    repository.sweep()
    assert repository.entries["fr"].version == ""
    assert repository.entries["fr"].reason == "it was unloaded"
    repository.load("fr")
    assert same(served(repository), DE)
    for action in (repository.load, repository.unload):
        with pytest.raises(AdapterNotFoundError, match="no adapter 'xx'"):
            action("xx")


@pytest.fixture
def store() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.mkdir("/adapters")
    yield "memory://adapters"
    files.rm("/adapters", recursive=True)


def test_an_object_store_does_as_well(tmp_path: Path, store: str) -> None:
    repository = make(tmp_path, store)
    for item in (FR, DE):
        data = oa.save_adapter(item, tmp_path / "x.safetensors").read_bytes()
        fsspec.filesystem("memory").pipe("/adapters/fr.safetensors", data)
        repository.sweep()
        assert same(served(repository), item)


def test_a_folder_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no folder"):
        make(tmp_path, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("model", "message"),
    [(oa.Model(two_layers()), "no slots"), (adapted(baked=True), "baked")],
    ids=["base", "baked"],
)
def test_a_model_without_swappable_slots_is_told_at_once(
    tmp_path: Path, folder: Path, model: oa.Model, message: str
) -> None:
    path = oa.save_model(model, tmp_path / "m.onnx").path
    with pytest.raises(SlotError, match=message):
        Repository(str(path), str(folder), tmp_path, "m")


def test_a_file_that_is_written_in_place_is_never_taken_half(
    tmp_path: Path, folder: Path
) -> None:
    """Both contents have one size and one header: a mixture passes every check of a file."""
    repository = make(tmp_path, str(folder), settle_s=1)
    contents = [
        oa.save_adapter(adapter("fr", seed), folder / "fr.safetensors").read_bytes()
        for seed in (1, 2)
    ]
    repository.sweep()
    whole = {hashlib.sha256(content).hexdigest()[:12] for content in contents}
    assert len(contents[0]) == len(contents[1])
    done = threading.Event()

    def write() -> None:
        for i in range(2):
            with (folder / "fr.safetensors").open("r+b", buffering=0) as file:
                for start in range(0, len(contents[0]), 100):
                    file.write(contents[i % 2][start : start + 100])
                    time.sleep(0.02)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        repository.sweep()
        assert repository.entries["fr"].version.rpartition("@")[2] in whole
    thread.join()
    repository.sweep()
    assert repository.entries["fr"].reason == ""
    assert same(served(repository), adapter("fr", 2))


def test_links_are_followed_as_kubernetes_replaces_what_they_lead_to(
    repository: Repository, folder: Path
) -> None:
    for number, item in enumerate((FR, DE)):
        (folder / f"..{number}").mkdir()
        oa.save_adapter(item, folder / f"..{number}/fr.npz")
    for number, item in enumerate((FR, DE)):
        (folder / "..next").symlink_to(f"..{number}")
        (folder / "..next").replace(folder / "..data")
        if not number:
            (folder / "fr.npz").symlink_to("..data/fr.npz")
        repository.sweep()
        assert same(served(repository), item)
    (folder / "..data").unlink()
    repository.sweep()
    assert repository.entries == {}


def test_what_cannot_be_kept_is_told_once_and_tried_again(
    repository: Repository, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, or somebody who cleans temporary folders: others are served on."""
    oa.save_adapter(FR, folder / "fr.npz")
    repository.sweep()
    shutil.rmtree(repository._copies)
    oa.save_adapter(DE, folder / "de.npz")
    repository.sweep()
    repository.sweep()
    assert {entry.reason[:14] for entry in repository.entries.values()} == {"cannot be kept"}
    assert caplog.text.count("'de' is not taken yet: cannot be kept") == 1
    with pytest.raises(RequestError, match="cannot be kept") as refused:
        repository.load("de")
    assert refused.value.status == 503
    repository._copies.mkdir()
    repository.sweep()
    assert [entry.reason for entry in repository.entries.values()] == ["", ""]
    assert same(served(repository), FR)
    assert same(served(repository, "de"), DE)
