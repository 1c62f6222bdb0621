"""`onnx-adapt insert`, `slots` and `remove` on files: what they write, say and return."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from slot_models import MLP, MODELS, cli, dense, model_of, run, saved

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError

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


UNPROVABLE = {
    "a type that ONNX Runtime has no kernel for": f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (bfloat16[n,4] y) <{dense("w1")}>
    {{ c = Cast<to = 16>(x)  w = Cast<to = 16>(w1)  [first] y = MatMul(c, w) }}""",
    "an operator of nobody": f"""<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}>
    {{ [first] h = MatMul(x, w1)  y = mine.Odd(h) }}""",
    "inputs that nobody guesses": f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x) => (float[m,4] y) <int64[2] shape = {{-1, 7}}, {dense("w1")},
    float[7,4] w = {{{", ".join(["1"] * 28)}}}> {{
      r = Reshape(x, shape)  h = MatMul(r, w)  [first] y = MatMul(h, w1) }}""",
    "an input that is a sequence": f"""<ir_version: 8, opset_import: ["" : 17]>
    g (seq(float[n,4]) x) => (float[m,4] y) <{dense("w1")}>
    {{ c = ConcatFromSequence<axis = 0>(x)  [first] y = MatMul(c, w1) }}""",
    "a loop that does not turn": f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}, int64 none = {{0}}, bool on = {{1}}> {{
      y = Loop(none, on, x) <body = b (int64 i, bool go, float[n,4] s)
        => (bool go_on, float[n,4] t) {{ go_on = Identity(go)  [first] t = MatMul(s, w1) }}>
    }}""",
}


@pytest.mark.parametrize("kind", UNPROVABLE)
def test_a_model_that_cannot_be_proven_is_not_written_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = saved(model_of(UNPROVABLE[kind]), tmp_path / "b.onnx")
    code, out, err = cli(capsys, "insert", str(path), "--after", "first", "--json")
    assert (code, list(json.loads(out))) == (2, ["error"])
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert "--no-verify" in hint
    assert sorted(tmp_path.iterdir()) == [path]
    code, out, _ = cli(
        capsys, "insert", str(path), "--after", "first", "--json", "--no-verify"
    )
    assert code == 0
    assert json.loads(out)["verified"] is False
    assert len(oa.list_slots(oa.open_model(tmp_path / "b.adapted.onnx"))) == 1


def test_inputs_that_were_asked_for_by_name_and_type_make_the_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = UNPROVABLE["inputs that nobody guesses"]
    path = saved(model_of(text), tmp_path / "b.onnx")
    _, _, err = cli(capsys, "insert", str(path), "--after", "first")
    assert "numpy.savez" in err.splitlines()[1]
    assert "x: float32 [n]" in err.splitlines()[1]
    np.savez(tmp_path / "inputs.npz", x=np.ones(14, np.float32))
    given = ["--inputs", str(tmp_path / "inputs.npz")]
    code, _, err = cli(capsys, "insert", str(path), "--after", "first", *given)
    assert code == 0
    following = err.splitlines()[-1].removeprefix("next: onnx-adapt ").split()
    assert cli(capsys, *following)[0] == 0


def test_a_sequence_is_given_to_the_proof_in_python_as_its_hint_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_of(UNPROVABLE["an input that is a sequence"])
    adapted = oa.insert(base, after="first")
    with pytest.raises(AdaptError) as caught:
        oa.verify(base, adapted)
    assert "inputs={'x': [array, ...]}, weights=False" in caught.value.hint
    arrays = [np.ones((3, 4), np.float32), np.ones((2, 4), np.float32)]
    for weights in (False, True):
        assert oa.verify(base, adapted, inputs={"x": arrays}, weights=weights).passed


def test_an_array_of_text_is_taken_by_insert_and_verify_as_by_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
    g (string[n] s) => (float[n,2] y) <float[2,4] e = {1, 2, 3, 4, 5, 6, 7, 8},
      float[4,2] w = {1, 0, 0, 1, 1, 0, 0, 1}> {
      ids = ai.onnx.ml.LabelEncoder<keys_strings = ["a", "b"], values_int64s = [0, 1],
        default_int64 = 0>(s)
      rows = Gather(e, ids)  [fc] y = MatMul(rows, w) }"""
    path, adapted = str(saved(model_of(text), tmp_path / "t.onnx")), str(tmp_path / "a.onnx")
    np.savez(tmp_path / "in.npz", s=np.array(["a", "b", "a"]))
    given = ["--inputs", str(tmp_path / "in.npz")]
    assert cli(capsys, "insert", path, "--after", "fc", "-o", adapted, *given)[0] == 0
    assert cli(capsys, "verify", path, adapted, *given)[0] == 0
    assert cli(capsys, "run", adapted, *given)[0] == 0


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


@pytest.mark.parametrize("idle", ["--inputs", "--provider"])
def test_what_only_a_proof_uses_is_refused_without_one(
    idle: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--inputs": "x.npz", "--provider": "cuda"}[idle]
    options = ["--after", "first", "--no-verify", idle, given]
    code, _, err = cli(capsys, "insert", str(base), *options)
    assert code == 2
    assert f"{idle} has no effect with --no-verify" in err
