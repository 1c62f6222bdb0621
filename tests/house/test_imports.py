"""What commands import: the start of the program is most of the time of a short one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/dnsmos-p808.onnx"

_HEAVY = {"google", "numpy", "ml_dtypes", "onnx", "onnxruntime", "pygal"}
"""Packages whose import takes longer than what a short command does."""

_TELL = """
import atexit, json, sys
atexit.register(lambda: print("loaded:", json.dumps(sorted(sys.modules)), file=sys.stderr))
sys.argv[0] = "onnx-adapt"
from onnx_adapt.__main__ import main
main()
"""


def modules_of(*words: str | Path, **variables: str) -> set[str]:
    """The modules that a command has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", _TELL, *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **variables},
    )
    return set(json.loads(done.stderr.rpartition("loaded:")[2]))


def packages(modules: set[str]) -> set[str]:
    """The packages that modules are in."""
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("completion", "bash")])
def test_what_opens_no_model_imports_neither_onnx_nor_numpy(words: tuple[str, ...]) -> None:
    assert not _HEAVY & packages(modules_of(*words))


def test_completing_an_option_imports_neither_onnx_nor_numpy() -> None:
    asked = {"COMP_WORDS": "onnx-adapt insert --no", "COMP_CWORD": "2"}
    assert not _HEAVY & packages(modules_of(_ONNX_ADAPT_COMPLETE="bash_complete", **asked))


def test_inserting_without_proof_does_not_import_what_proves(tmp_path: Path) -> None:
    place, written = "mos_estimator_small_1/dense_3/MatMul_add", tmp_path / "adapted.onnx"
    loaded = modules_of("insert", MODEL, "--after", place, "-o", written, "--no-verify")
    assert written.exists()
    assert "onnxruntime" not in packages(loaded)
    rooms = {".".join(name.split(".")[:2]) for name in loaded}
    assert not {"onnx_adapt.proof", "onnx_adapt.report", "onnx_adapt.session"} & rooms
