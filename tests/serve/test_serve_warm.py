"""Adapters are loaded before anybody asks, and those that are pinned stay."""

import asyncio
from pathlib import Path

import pytest
from disk_models import refused
from session_adapters import FR, adapted_file

import onnx_adapt as oa
from onnx_adapt.errors import AdapterNotFoundError, AdaptError, RequestError
from onnx_adapt.serve.held import Held, Recent
from onnx_adapt.serve.warm import Warm, Warmer, read_warm


class Disk:
    """Versions that can be loaded, what names mean, and what was loaded."""

    def __init__(self, **versions: str) -> None:
        self.versions = versions
        self.loaded: list[str] = []
        self.broken: set[str] = set()

    async def load(self, version: str) -> Held:
        self.loaded.append(version)
        if version in self.broken:
            raise RequestError("broken")
        return Held(version)

    def version(self, name: str) -> str:
        if name not in self.versions:
            raise AdapterNotFoundError(f"adapter {name!r} is not in the repository")
        return self.versions[name]


def test_what_is_pinned_stays_and_others_are_evicted_as_before() -> None:
    disk = Disk(a="a@1", b="b@1")
    recent = Recent(disk.load, 3)

    async def ask() -> None:
        await Warmer(Warm(pin=("a", "b")), recent, disk.version).begin()
        for version in ("c@1", "d@1", "a@1", "e@1", "b@1", "e@1"):
            await recent(version)

    asyncio.run(ask())
    assert disk.loaded == ["a@1", "b@1", "c@1", "d@1", "e@1"]
    assert set(recent._held) == {"a@1", "b@1", "e@1"}


def test_a_cache_full_of_what_is_pinned_still_answers_for_others() -> None:
    disk = Disk(a="a@1")
    recent = Recent(disk.load, 1)

    async def ask() -> list[Held]:
        await Warmer(Warm(pin=("a",)), recent, disk.version).begin()
        return [await recent("b@1"), await recent("b@1"), await recent("a@1")]

    assert [held.name for held in asyncio.run(ask())] == ["b@1", "b@1", "a@1"]
    assert disk.loaded == ["a@1", "b@1", "b@1"]


def test_what_is_preloaded_is_there_and_can_be_evicted() -> None:
    disk = Disk(a="a@1", b="b@1")
    recent = Recent(disk.load, 2)
    asyncio.run(Warmer(Warm(preload=("b", "a")), recent, disk.version).begin())
    assert disk.loaded == ["b@1", "a@1"]

    async def ask() -> None:
        await recent("c@1")

    asyncio.run(ask())
    assert set(recent._held) == {"a@1", "c@1"}


def test_a_name_that_means_another_version_pins_that_one() -> None:
    disk = Disk(a="a@1")
    recent = Recent(disk.load, 2)
    warmer = Warmer(Warm(pin=("a",)), recent, disk.version)

    async def ask() -> None:
        await warmer.begin()
        await warmer.follow()
        disk.versions["a"] = "a@2"
        await warmer.follow()
        await recent("b@1")

    asyncio.run(ask())
    assert disk.loaded == ["a@1", "a@2", "b@1"]
    assert set(recent._held) == {"a@2", "b@1"}
    del disk.versions["a"]
    asyncio.run(warmer.follow())
    assert recent._pinned == frozenset()


def test_what_cannot_be_loaded_is_told_at_the_start_and_logged_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = Disk(a="a@1")
    recent = Recent(disk.load, 2)
    disk.broken.add("a@1")
    for warm in (Warm(preload=("a",)), Warm(pin=("a",)), Warm(preload=("xx",))):
        with pytest.raises(AdaptError, match=r"broken|'xx' is not in"):
            asyncio.run(Warmer(warm, recent, disk.version).begin())
    disk.broken = {"a@2"}
    warmer = Warmer(Warm(pin=("a",)), recent, disk.version)
    asyncio.run(warmer.begin())
    disk.versions["a"] = "a@2"
    caplog.clear()
    for _ in range(3):
        asyncio.run(warmer.follow())
    assert caplog.text.count("an adapter that is pinned is not loaded: broken") == 1


def test_names_may_be_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text("fr\n\n de@stable \r\nfr\n", encoding="utf-8")
    assert read_warm([f"@{path}", "it"], [], 3).preload == ("fr", "de@stable", "it")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preload", "xx"], "'xx' is not in the repository"),
        (["--pin", "../fr"], "'../fr' is no name"),
        (["--pin", "@nowhere"], "nowhere cannot be read"),
        (["--pin", "@bytes"], "bytes cannot be read"),
        (["--pin", "a", "--preload", "b", "--max-adapters", "1"], "2 adapters are to be"),
        (["--pin", "fr", "--replicas", "2"], "--pin is for a server of one process"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    adapted_file(tmp_path)
    (tmp_path / "adapters").mkdir()
    oa.save_adapter(FR, tmp_path / "adapters/fr.npz")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path)
    given = ["serve", "adapted.onnx", "--adapters", "adapters", "--port", "0", *options]
    assert words in refused(*given).error
