"""`onnx-adapt insert`, `slots` and `remove` on files: what they write, say and return."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from slot_models import MLP, MODELS, cli, dense, model_of, run, saved

import onnx_adapt as oa

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
FUNCTION = f"""<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
g (float[n,4] x) => (float[n,4] y) <{dense("w1")}> {{ [call] y = local.block(x, w1) }}
<domain: "local", opset_import: ["" : 17]>
block (x, w) => (z) {{ [inner] h = MatMul(x, w)  z = Relu(h) }}"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(model_of(MLP), tmp_path / "mlp.v1.onnx")


def test_it_just_works(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = cli(capsys, "insert", str(base), "--after", "first")
    adapted = base.with_name("mlp.v1.adapted.onnx")
    assert code == 0
    assert "first" in out
    assert f"wrote {adapted}" in err
    assert "verified against mlp.v1.onnx" in err
    assert run(adapted, {"x": X})[0].tobytes() == run(base, {"x": X})[0].tobytes()


def test_it_writes_what_the_library_makes(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = base.with_name("out.onnx")
    options = ["--after", "first", "--after", "act", "--activation", "gelu", "--bias"]
    options += ["--baked", "--bottleneck", "5", "--seed", "3", "-o", str(out)]
    assert cli(capsys, "insert", str(base), *options)[0] == 0
    wanted = oa.insert(
        oa.open_model(base),
        after=["first", "act"],
        activation="gelu",
        bias=True,
        baked=True,
        bottleneck=5,
        seed=3,
    )
    assert onnx.load(out) == wanted.proto


def test_the_json_names_the_weights_to_feed(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = cli(capsys, "insert", str(base), "--after", "first", "--json")
    document = json.loads(out)
    adapted = Path(document["output"])
    assert code == 0
    assert {"output", "size", "data", "verified", "slots"} <= set(document)
    assert document["size"] == adapted.stat().st_size
    assert document["verified"] is True
    (slot,) = document["slots"]
    assert slot["weights"] == {"down": "adapter.first.down", "up": "adapter.first.up"}
    listed = json.loads(cli(capsys, "slots", str(adapted), "--json")[1])
    assert listed["slots"] == document["slots"]


def test_a_second_insertion_lists_only_its_own_slots(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli(capsys, "insert", str(base), "--after", "first")
    adapted = str(base.with_name("mlp.v1.adapted.onnx"))
    document = json.loads(cli(capsys, "insert", adapted, "--after", "act", "--json")[1])
    assert [slot["name"] for slot in document["slots"]] == ["act"]


def test_the_file_goes_there_and_back(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli(capsys, "insert", str(base), "--after", "first", "--after", "act")
    adapted, back = base.with_name("mlp.v1.adapted.onnx"), tmp_path / "back.onnx"
    code, out, err = cli(capsys, "remove", str(adapted), "-o", str(back))
    assert (code, out) == (0, "")
    assert "byte for byte" in err
    assert back.read_bytes() == base.read_bytes()
    some = ("--slot", "first", "--json", "-o", str(tmp_path / "some.onnx"))
    document = json.loads(cli(capsys, "remove", str(adapted), *some)[1])
    assert (document["removed"], document["left"]) == (1, ["act"])
    assert document["base_restored"] is False


def test_a_function_is_refused_with_a_hint_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(saved(model_of(FUNCTION), tmp_path / "f.onnx"))
    code, _, err = cli(capsys, "insert", path, "--after", "inner")
    assert code == 2
    assert "--inline-functions" in err.splitlines()[1]
    assert not (tmp_path / "f.adapted.onnx").exists()
    code, _, err = cli(capsys, "insert", path, "--after", "inner__1", "--inline-functions")
    assert code == 0
    code, _, err = cli(capsys, "remove", str(tmp_path / "f.adapted.onnx"))
    assert code == 0
    assert "inlined" in err


def test_a_model_that_does_not_run_here_is_written_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (bfloat16[n,4] y) <{dense("w1")}>
    {{ c = Cast<to = 16>(x)  w = Cast<to = 16>(w1)  [first] y = MatMul(c, w) }}"""
    path = saved(model_of(text), tmp_path / "b.onnx")
    code, out, err = cli(capsys, "insert", str(path), "--after", "first", "--json")
    assert code == 0
    assert json.loads(out)["verified"] is False
    assert "warning: not verified" in err
    onnx.checker.check_model(tmp_path / "b.adapted.onnx", full_check=True)


def test_without_verification_nothing_is_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "out.onnx")
    model = str(MODELS / "plcmos.onnx")
    code, _, err = cli(capsys, "insert", model, "--after", "Gemm_*", "-o", out, "--no-verify")
    assert code == 0
    assert "verified" not in err
    assert len(oa.list_slots(oa.open_model(out))) >= 2


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["--after", "frist"], "'frist'", "first"),
        (["--after", "first", "--bottleneck", "0"], "bottleneck of 0", "64"),
        (["--after", "first", "--bottleneck", "-1"], "bottleneck of -1", "1 or more"),
        (["--after", "first", "--bottleneck", "x"], "'x'", "--help"),
        (["--after", "first", "--activation", "rleu"], "'rleu'", "relu"),
        (["--after", "first", "--source", "second"], "after target", "before"),
        (["--after", "first", "--source", "nowhere"], "'nowhere'", ""),
        (["--after", "x"], "an input", "node"),
        (["--after", "first", "-o", "{base}"], "replace the input", "--force"),
        (["--after", "first", "-o", "{folder}/none/out.onnx"], "no folder", ""),
        ([], "--after", "--help"),
    ],
)
def test_what_cannot_be_done_exits_with_2_and_writes_nothing(
    args: list[str],
    message: str,
    hint: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = base.read_bytes()
    filled = [arg.format(base=base, folder=tmp_path) for arg in args]
    code, out, err = cli(capsys, "insert", str(base), *filled)
    assert (code, out) == (2, "")
    error, told = err.strip().splitlines()
    assert error.startswith("error: ")
    assert told.startswith("hint: ")
    assert message in error
    assert hint in told
    assert list(tmp_path.iterdir()) == [base]
    assert base.read_bytes() == before


def test_with_force_the_output_may_be_the_input(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = base.read_bytes()
    path = str(base)
    assert cli(capsys, "insert", path, "--after", "first", "-o", path, "--force")[0] == 0
    assert len(oa.list_slots(oa.open_model(base))) == 1
    assert cli(capsys, "remove", path, "-o", path, "--force")[0] == 0
    assert base.read_bytes() == before


def test_a_damaged_manifest_is_an_error_of_every_command(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = oa.insert(oa.open_model(base), after="first")
    entry = next(p for p in adapted.proto.metadata_props if p.key == "onnx_adapt")
    entry.value = entry.value.replace('"relu"', '"rleu"').replace('"main"', '"body"')
    path = str(saved(adapted, tmp_path / "a.onnx"))
    for args in (
        ["verify", str(base), path],
        ["slots", path],
        ["insert", path, "--after", "act"],
    ):
        code, _, err = cli(capsys, *args)
        assert (code, err.startswith("error: ")) == (2, True), args
