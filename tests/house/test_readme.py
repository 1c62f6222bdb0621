"""The code on every page runs, and the commands do what they say."""

import importlib
import re
from pathlib import Path

import pytest
from pages import blocks, commands, link_files, run_command, run_python

import onnx_adapt

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
PAGES = ["README.md", "SECURITY.md", *DOCS]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    link_files(ROOT, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


WITH_PYTHON = [page for page in PAGES if blocks("python", _read(page))]
WITH_COMMANDS = [page for page in DOCS if commands(_read(page))]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_every_python_block_of_a_page_runs(folder: Path, page: str) -> None:
    for block in blocks("python", _read(page)):
        run_python(block, folder)


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_of_a_page_succeeds(folder: Path, page: str) -> None:
    for arguments in commands(_read(page)):
        run_command(arguments, folder)


def test_pages_without_code_are_these() -> None:
    plain = {page for page in PAGES if page not in WITH_PYTHON}
    assert plain <= {"docs/index.md", "docs/reference/api.md"}


def test_every_picture_and_page_that_is_linked_is_there() -> None:
    made = {"commands.md"}  # by the site, from the code
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", _read(page)):
            there = (ROOT / page).parent / target
            assert there.exists() or there.name in made, (page, target)


def test_the_site_has_what_its_pages_link_to() -> None:
    hooks = (ROOT / "tools/site_hooks.py").read_text(encoding="utf-8")
    for page in DOCS:
        for target in re.findall(r"\]\(((?:\.\./)+[^)#:]+)\)", _read(page)):
            path = (ROOT / page).parent.joinpath(target).resolve()
            if not path.is_relative_to(ROOT / "docs"):
                assert f'"{path.relative_to(ROOT).as_posix()}"' in hooks, (page, target)


def test_the_python_reference_has_every_public_name() -> None:
    text = _read("docs/reference/api.md")
    named = {line.rpartition(".")[2] for line in text.splitlines() if line[:4] == "::: "}
    assert set(onnx_adapt.__all__) - {"AdaptError"} <= named


def test_the_python_reference_names_what_is_there() -> None:
    for line in _read("docs/reference/api.md").splitlines():
        if line.startswith("::: ") and line != "::: onnx_adapt.errors":
            home, _, name = line.removeprefix("::: ").rpartition(".")
            assert hasattr(importlib.import_module(home), name), line


def test_the_readme_gives_the_base_back(folder: Path) -> None:
    assert len(commands(README)) == 4
    for arguments in commands(README):
        run_command(arguments, folder)
    base = (ROOT / "models/dnsmos-p808.onnx").read_bytes()
    assert (folder / "restored.onnx").read_bytes() == base


def test_the_readme_fits_on_two_screens() -> None:
    assert len(README.splitlines()) <= 140
