"""The other libraries, in an environment of their own with pinned versions."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from measuring import Command

from onnx_adapt.cli.outputs import say

HERE = Path(__file__).resolve().parent
REQUIRED = HERE / "peers.txt"
LIBRARIES = ("onnx", "onnx-graphsurgeon", "onnx-ir", "onnxsim")


def environment(folder: Path) -> Path:
    """The Python that has the peers; made on the first call, and when `peers.txt` changed."""
    python, made_for = folder / "bin" / "python", folder / "made-for"
    wanted = f"{sys.version}\n{REQUIRED.read_text(encoding='utf-8')}"
    if not made_for.exists() or made_for.read_text(encoding="utf-8") != wanted:
        say(f"installing the peers in {folder}")
        venv.create(folder, clear=True, with_pip=True)
        quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        install = [python, "-m", "pip", "install", "--quiet", "-r", REQUIRED]
        subprocess.run(install, check=True, env=quiet)
        made_for.write_text(wanted, encoding="utf-8")
    return python


def insertion(python: Path, library: str, model: Path, output: Path, pattern: str) -> Command:
    """The command that inserts with a peer."""
    script = HERE / "peer_insert.py"
    line = [python, script, library, model, output, pattern]
    return Command(tuple(map(str, line)), (output,))


def versions() -> str:
    """What is pinned."""
    return ", ".join(REQUIRED.read_text(encoding="utf-8").split()).replace("==", " ")
