"""`onnx-adapt verify`: 0 when the answer is yes, 1 when it is no, 2 when there is none."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from slot_models import CHECKS, MLP, SILENCED, cli, model_of, node_of, saved

import onnx_adapt as oa
from onnx_adapt.edit.weights import fill_weights


def _adapted(after: str | list[str] = "first", **options: object) -> tuple[oa.Model, oa.Model]:
    base = model_of(MLP)
    return base, oa.insert(base, after=after, **options)


def _files(folder: Path, adapted: oa.Model, base: oa.Model | None = None) -> tuple[str, str]:
    base = base or model_of(MLP)
    paths = saved(base, folder / "base.onnx"), saved(adapted, folder / "adapted.onnx")
    return str(paths[0]), str(paths[1])


def test_the_command_says_no_with_1_and_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapted = _adapted()
    node_of(adapted, "a").op_type = "Sub"
    code, out, err = cli(capsys, "verify", *_files(tmp_path, adapted))
    assert code == 1
    assert "FAILED" in out
    assert "adapted.onnx is NOT base.onnx plus its slots" in err


def test_a_nan_does_not_break_the_json_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON (RFC 8259)")

    _, adapted = _adapted(bottleneck=2)
    weights = {"down": np.ones((4, 2)), "up": np.full((2, 4), np.nan)}
    files = _files(tmp_path, fill_weights(adapted, {"first": weights}))
    code, out, _ = cli(capsys, "verify", *files, "--json")
    assert code == 1
    assert not json.loads(out, parse_constant=refuse)["passed"]


def test_strict_turns_a_warning_into_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_of(SILENCED)
    files = _files(tmp_path, oa.insert(base, after=["first", "second"]), base)
    code, _, err = cli(capsys, "verify", *files)
    assert (code, "warning: slot 'first' moves no output" in err) == (0, True)
    assert cli(capsys, "verify", *files, "--strict")[0] == 1


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["{base}", "{base}"], "no slots", "insert"),
        (["{base}", "{folder}/nothing.onnx"], "nothing.onnx", "path"),
        (["{base}"], "ADAPTED", "--help"),
        (["{base}", "{adapted}", "--inputs", "{folder}/no.npz"], "no.npz", "savez"),
        (["{base}", "{adapted}", "--seed", "x"], "--seed", "--help"),
        (["{base}", "{adapted}", "--nonsense"], "--nonsense", "--help"),
    ],
)
def test_what_cannot_be_verified_exits_with_2(
    args: list[str],
    message: str,
    hint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapted = _files(tmp_path, _adapted()[1])
    filled = [a.format(base=base, adapted=adapted, folder=tmp_path) for a in args]
    code, out, err = cli(capsys, "verify", *filled)
    assert (code, out) == (2, "")
    error, told = err.strip().splitlines()
    assert error.startswith("error: ")
    assert told.startswith("hint: ")
    assert message in error
    assert hint in told


def test_the_command_prints_the_report_and_exits_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = cli(
        capsys, "verify", *_files(tmp_path, _adapted(after=["first", "act"])[1])
    )
    assert code == 0
    assert all(name in out for name in [*CHECKS, "first", "act"])
    assert "adapted.onnx is base.onnx plus its slots" in err
    assert onnxruntime.__version__ in err


def test_the_json_report_has_stable_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = cli(
        capsys, "verify", *_files(tmp_path, _adapted(after=["first", "act"])[1]), "--json"
    )
    report = json.loads(out)
    assert code == 0
    keys = {"passed", "base", "adapted", "runtime", "strict", "checks", "slots", "shapes"}
    assert keys <= set(report)
    assert [set(check) for check in report["checks"]] == [
        {"name", "passed", "detail", "warnings"}
    ] * 6
    numbers = {"name", "error", "tolerance", "bottlenecks", "effect", "ratio", "shares"}
    assert [set(slot) for slot in report["slots"]] == [numbers] * 2
    assert report["shapes"][0]["x"][1] == 4
    assert (report["base"], report["adapted"]) == ("base.onnx", "adapted.onnx")
