"""The benchmarks run: tiny, without other libraries, and what they find is written down."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def run_all(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(BENCHMARKS / "all.py"), "--tiny", "--no-peers"]
    line += ["--folder", str(tmp_path), "--output", str(tmp_path / "results"), *more]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="they read /proc")
def test_benchmarks_write_what_they_find_and_keep_what_is_known(tmp_path: Path) -> None:
    for only in ("inference,mixed", "insert,nodes,swap"):
        ended = run_all(tmp_path, "--only", only)
        assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))
    assert list(found) == ["insert", "nodes", "inference", "swap", "mixed"]
    facts = {each["what"]: each["value"] for each in found["insert"]["findings"]}
    assert facts["every field: fields lost"] == 0
    assert facts["inline 32.8 kB: remove gives the base"] == 1
    text = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert "dense: off / base" in text


def test_a_benchmark_that_is_not_there_is_named(tmp_path: Path) -> None:
    ended = run_all(tmp_path, "--only", "insrt")
    assert ended.returncode == 2
    assert "there is no 'insrt'" in ended.stderr


def test_check_finds_ratios_that_are_worse_by_more_than_their_spread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    checking, measuring = (importlib.import_module(n) for n in ("checking", "measuring"))

    def run(*ratios: tuple[float, float]) -> dict[str, object]:
        rows = [(i, measuring.Ratio(*ratio), "remark") for i, ratio in enumerate(ratios)]
        table = measuring.Table("runs", ("case", "off", "of"), rows)
        return {"one": measuring.Part("one", tables=[table])}

    before = run((1.02, 0.02), (1.5, 0.1))
    assert checking.report(run((1.04, 0.03), (1.2, 0.0)), before) == 0
    assert checking.report(run((1.06, 0.03), (1.5, 0.0)), before) == 1
    assert (
        "worse: one, runs, 0, off: 1.060 ± 0.03, before 1.020 ± 0.02"
        in capsys.readouterr().err
    )
    assert checking.report(run(), before) == 2


def test_a_check_needs_a_run_to_compare_with(tmp_path: Path) -> None:
    ended = run_all(tmp_path, "--check", str(tmp_path / "missing.json"))
    assert ended.returncode == 2
    assert "to compare with" in ended.stderr
