"""Run a page: its Python blocks and its commands, in a folder, with this Python's package.

The tests use this, and `tools/release-check` in an environment that has nothing else.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(sys.executable).parent / "onnx-adapt"
FOLDERS = ("models", "tests")


def blocks(language: str, page: str) -> list[str]:
    """The text of the blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The arguments of the commands in the `console` blocks, without the program."""
    lines = [line for block in blocks("console", page) for line in block.splitlines()]
    words = [shlex.split(line[2:], comments=True) for line in lines if line[:2] == "$ "]
    strangers = [program for program, *_ in words if program != "onnx-adapt"]
    if strangers:
        raise ValueError(f"a page may run onnx-adapt only, not {strangers}")
    return [arguments for _, *arguments in words]


def run_python(block: str, folder: Path) -> None:
    """Run one block; a warning is an error."""
    subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, cwd=folder)


def run_command(arguments: list[str], folder: Path) -> None:
    """Run one command, which must succeed."""
    subprocess.run([PROGRAM, *arguments], check=True, cwd=folder, stdout=subprocess.PIPE)


def link_files(root: Path, folder: Path) -> None:
    """Give a folder what the pages read."""
    for name in FOLDERS:
        (folder / name).symlink_to(root / name)


def main(path: Path, folder: Path) -> None:
    """Run all of a page in an empty folder."""
    page = path.read_text(encoding="utf-8")
    link_files(path.resolve().parent, folder)
    for arguments in commands(page):
        print("$ onnx-adapt", *arguments, flush=True)
        run_command(arguments, folder)
    for block in blocks("python", page):
        print(f"{len(block.splitlines())} lines of Python", flush=True)
        run_python(block, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
