"""The code on every page runs, and the commands do what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import onnx_adapt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
PAGES = ["README.md", *DOCS]
PROGRAM = Path(sys.executable).parent / "onnx-adapt"


def _blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _commands(page: str) -> list[list[str]]:
    lines = [line for block in _blocks("console", page) for line in block.splitlines()]
    return [shlex.split(line[2:], comments=True) for line in lines if line[:2] == "$ "]


WITH_PYTHON = [page for page in PAGES if _blocks("python", _read(page))]
WITH_COMMANDS = [page for page in DOCS if _commands(_read(page))]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_every_python_block_of_a_page_runs(folder: Path, page: str) -> None:
    for block in _blocks("python", _read(page)):
        subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, cwd=folder)


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_of_a_page_succeeds(folder: Path, page: str) -> None:
    for program, *arguments in _commands(_read(page)):
        assert program == "onnx-adapt"
        subprocess.run([PROGRAM, *arguments], check=True, cwd=folder, capture_output=True)


def test_pages_without_code_are_these() -> None:
    plain = {page for page in PAGES if page not in WITH_PYTHON}
    assert plain <= {"docs/index.md", "docs/reference/api.md"}


def test_every_picture_and_page_that_is_linked_is_there() -> None:
    made = {"commands.md"}  # by the site, from the code
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", _read(page)):
            there = (ROOT / page).parent / target
            assert there.exists() or there.name in made, (page, target)


def test_the_python_reference_has_every_public_name() -> None:
    text = _read("docs/reference/api.md")
    named = {line.rpartition(".")[2] for line in text.splitlines() if line[:4] == "::: "}
    assert set(onnx_adapt.__all__) - {"AdaptError"} <= named


def test_the_readme_gives_the_base_back(folder: Path) -> None:
    commands = _commands(README)
    assert len(commands) == 4
    for _, *arguments in commands:
        subprocess.run([PROGRAM, *arguments], check=True, cwd=folder, capture_output=True)
    base = (ROOT / "models/dnsmos-p808.onnx").read_bytes()
    assert (folder / "restored.onnx").read_bytes() == base


def test_the_readme_fits_on_two_screens() -> None:
    assert len(README.splitlines()) <= 150
