"""What is shown before is what is done after, in few rows; scripts are told of errors."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from slot_models import cli, model_of, saved

import onnx_adapt as oa

LAYERS = range(12)
TEXT = (
    '<ir_version: 8, opset_import: ["" : 17]> g (float[n,4] x) => (float[n,4] y) '
    "<float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, int64[1] i = {0}> {"
    + "".join(
        f'["/h.{k}/fc/MatMul"] a{k} = MatMul({"x" if k == 0 else f"b{k - 1}"}, w) '
        f'["/h.{k}/out/MatMul"] b{k} = MatMul(a{k}, w) '
        for k in LAYERS
    )
    + '["/h.3/odd/ReduceSum"] z = ReduceSum <keepdims = 0> (b11) y = Add(b11, z) }'
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(model_of(TEXT), tmp_path / "m.onnx")


def _slots(out: str) -> list[str]:
    return [slot["tensor"] for slot in json.loads(out)["slots"]]


@pytest.mark.parametrize("pattern", ["h.*.fc", "/h.*/out/MatMul", "h.1?.*", "h.7.fc"])
def test_sites_a_dry_run_and_insert_mean_the_same(
    base: Path, capsys: pytest.CaptureFixture[str], pattern: str
) -> None:
    out = cli(capsys, "sites", str(base), pattern, "--json")[1]
    good = [site["tensor"] for site in json.loads(out)["sites"] if not site["refused"]]
    _, out, err = cli(capsys, "insert", str(base), "--after", pattern, "--dry-run", "--json")
    assert "nothing was proven or written" in err
    assert [path.name for path in base.parent.iterdir()] == ["m.onnx"]
    planned = _slots(out)
    out = cli(capsys, "insert", str(base), "--after", pattern, "--json")[1]
    assert planned == _slots(out)
    assert sorted(planned) == sorted(good)


def test_the_names_of_sites_go_into_insert(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = cli(capsys, "sites", str(base), "fc", "--names")[1].split()
    assert len(names) == len(LAYERS)
    after = [word for name in names for word in ("--after", name)]
    out = cli(capsys, "insert", str(base), *after, "--dry-run", "--json")[1]
    assert len(_slots(out)) == len(LAYERS)


def test_many_slots_are_a_row_for_each_module(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = "insert", str(base), "--after", "h.*.fc", "--after", "h.*.out"
    _, out, err = cli(capsys, *args, "--dry-run")
    rows = [line.split()[:3] for line in out.splitlines()[1:]]
    assert rows == [["h.*.fc", "0-11", "12"], ["h.*.out", "0-11", "12"]]
    assert "24 slots: 2 modules in 12 layers (--long has a line for each)" in err
    out = cli(capsys, *args, "--dry-run", "--long")[1]
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert names[:8:2] == ["h.0.fc", "h.1.fc", "h.2.fc", "h.3.fc"]
    assert names[20:] == ["h.10.fc", "h.10.out", "h.11.fc", "h.11.out"]


def test_places_that_are_left_out_for_one_reason_are_one_line(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = '["c.0"] p = Identity(b1) ["c.1"] q = Identity(b2)'
    live = '["c.2"] r = Identity(b11) y = Add(r, z)'
    text = TEXT.replace("y = Add(b11, z)", f"{dead} {live}")
    path = saved(model_of(text), base.with_name("c.onnx"))
    err = cli(capsys, "insert", str(path), "--after", "c.*", "--dry-run")[2]
    notes = {line for line in err.splitlines() if "left out" in line}
    assert [note[:35] for note in notes] == ["note: left out main:p and 1 more: d"]


def test_a_second_slot_at_a_place_is_asked_for(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted, twice = base.with_name("a.onnx"), base.with_name("b.onnx")
    cli(capsys, "insert", str(base), "--after", "h.0.fc", "-o", str(adapted))
    again = "insert", str(adapted), "--after", "h.0.fc", "-o", str(twice)
    code, _, err = cli(capsys, *again)
    assert code == 2
    assert "slot 'h.0.fc' is at main:a0 already" in err
    assert "--stack" in err
    assert not twice.exists()
    assert cli(capsys, *again, "--stack")[0] == 0
    assert len(oa.list_slots(twice)) == 2


def test_what_differs_between_two_models(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = base.with_name("a.onnx")
    cli(
        capsys,
        "insert",
        str(base),
        "--after",
        "h.0.fc",
        "--bottleneck",
        "2",
        "-o",
        str(adapted),
    )
    code, out, err = cli(capsys, "diff", str(base), str(adapted))
    assert code == 0
    assert out.splitlines()[1].split() == [
        "h.0.fc",
        "-",
        "2",
        "relu",
        "down",
        "up",
        "(filled)",
    ]
    assert "the outputs are 0.0e+00 apart" in err
    kept = oa.extract(adapted, name="one")
    (slot,) = kept.weights
    weights = dict(kept.weights[slot]) | {"up": np.ones((2, 4), np.float32)}
    other = base.with_name("b.onnx")
    oa.save_model(oa.fill(adapted, oa.make_adapter(adapted, "b", {slot: weights})), other)
    found = json.loads(cli(capsys, "diff", str(adapted), str(other), "--json")[1])
    assert found["same_base"]
    assert found["slots"][0]["apart"] > 0
    assert found["outputs"] > 0


def test_what_differs_between_two_adapters(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = oa.insert(base, "h.*.fc", activation="identity")
    oa.save_model(model, tmp_path / "a.onnx")
    files = []
    for name, size in (("one", 1.0), ("two", 1.5)):
        parts = {"down": np.ones((4, 1)), "up": np.full((1, 4), size)}
        adapter = oa.make_adapter(model, name, {s.name: parts for s in oa.list_slots(model)})
        files.append(str(oa.save_adapter(adapter, tmp_path / f"{name}.npz")))
    found = json.loads(cli(capsys, "diff", *files, "--json")[1])
    assert {round(slot["apart"], 9) for slot in found["slots"]} == {0.5}
    assert found["outputs"] is None
    found = json.loads(
        cli(capsys, "diff", *files, "--for", str(tmp_path / "a.onnx"), "--json")[1]
    )
    assert found["outputs"] > 0
    assert all(slot["second_moves"] > slot["first_moves"] > 0 for slot in found["slots"])
    assert cli(capsys, "diff", files[0], str(base))[0] == 2
    np.savez(tmp_path / "nan.npz", **{"adapter.h.0.fc.up": np.full((1, 4), np.nan, "f4")})
    code, _, err = cli(capsys, "diff", files[0], str(tmp_path / "nan.npz"))
    assert (code, "holds NaN or infinity" in err) == (2, True)


def test_an_error_is_a_document_where_one_was_asked_for(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in (
        ("sites", "nothing.onnx"),
        ("insert", str(base), "--after", "nix"),
        ("sites",),
    ):
        code, out, err = cli(capsys, *args, "--json")
        told = json.loads(out)["error"]
        assert code == 2
        assert set(told) == {"kind", "message", "hint"}
        assert f"error: {told['message']}" in err
        assert cli(capsys, *args)[1] == ""


def test_ctrl_c_ends_a_command_with_130() -> None:
    """Also while Python still imports the command line."""
    code = (
        "import os, signal, sys\n"
        "sys.argv = ['onnx-adapt', 'sites', 'models/dnsmos-p808.onnx']\n"
        "import onnx_adapt.__main__ as program\n"
        "class Late:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == WHERE:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Late())\n"
        "program.main()\n"
    )
    for where in ("onnx_adapt.cli", "click", "onnx_adapt.model.file"):
        text = code.replace("WHERE", repr(where))
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (128 + signal.SIGINT, b""), where
        assert b"Traceback" not in done.stderr
