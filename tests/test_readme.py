"""The code on every page runs, and the README's commands do what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
PROGRAM = Path(sys.executable).parent / "onnx-adapt"


def _blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_of_a_page_runs(folder: Path, page: str) -> None:
    blocks = _blocks("python", (ROOT / page).read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, cwd=folder)


def test_every_command_of_the_readme_succeeds_and_the_base_comes_back(folder: Path) -> None:
    lines = [line for block in _blocks("console") for line in block.splitlines()]
    commands = [shlex.split(line[2:], comments=True) for line in lines if line[:2] == "$ "]
    assert len(commands) == 4
    for program, *arguments in commands:
        assert program == "onnx-adapt"
        subprocess.run([PROGRAM, *arguments], check=True, cwd=folder, capture_output=True)
    base = (ROOT / "models/dnsmos-p808.onnx").read_bytes()
    assert (folder / "restored.onnx").read_bytes() == base


def test_the_readme_fits_on_two_screens() -> None:
    assert len(README.splitlines()) <= 150
