"""The code on every page runs, and the commands do what they say."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from pages import blocks, commands, link_files, run_command, run_python

import onnx_adapt
import onnx_adapt as oa
from onnx_adapt.cli import cli, main

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


def _shell_commands(page: str) -> list[list[str]]:
    """The commands of onnx-adapt in the `sh` blocks of a page, without the program."""
    text = "\n".join(blocks("sh", _read(page))).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip().startswith("onnx-adapt ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("sh", _read(page))])
def test_every_command_in_a_block_for_the_shell_exists(page: str) -> None:
    for name, *arguments in _shell_commands(page):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, name
        command.make_context(name, arguments)  # fails on an option that there is not


RUNNABLE = {
    "README.md": ".safetensors",
    "docs/peft.md": ".safetensors",
    "docs/sessions.md": ".safetensors",
    "docs/blend.md": ".safetensors",
    "docs/deploy.md": ".onnx_adapter",
    "docs/troubleshooting.md": ".safetensors",
}
"""Pages whose blocks are about a base, its adapters, and files of these of this kind."""


@pytest.mark.parametrize("page", RUNNABLE)
def test_every_block_for_the_shell_runs(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = ROOT / "tests/cases/peft_bert_lora_default_ts"
    for name in ("trained", "trained-de"):
        (folder / name).symlink_to(case / "adapter")
    shutil.copy(case / "base.onnx", folder)
    few = np.load(case / "inputs.npz")
    np.savez("x.npz", **{name: few[name][[0, 1, 0]] for name in few.files})
    base = oa.open_model("base.onnx")
    trained = oa.load_checkpoint("trained", base)
    oa.save_model(oa.insert_checkpoint(base, trained), "adapted.onnx")
    for name in ("fr", "de"):
        oa.save_adapter(trained.adapter, name + RUNNABLE[page])
    for arguments in _shell_commands(page):
        monkeypatch.setattr("sys.argv", ["onnx-adapt", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, arguments


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
