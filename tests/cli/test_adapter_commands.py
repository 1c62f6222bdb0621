"""Trained adapters from the command line: what is written, said, refused and returned."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from adapter_models import (
    B2,
    W2,
    lora,
    lora_on,
    peft_folder,
    saved_model,
    trained,
    two_layers,
)
from slot_models import cli
from trained_cases import CASES, run, session_of

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a base and two checkpoints for it, of different rank and alpha."""
    saved_model(tmp_path / "model.onnx")
    peft_folder(tmp_path / "fr", lora())
    peft_folder(tmp_path / "de", lora(seed=5, rank=3), r=3, lora_alpha=9)
    return tmp_path


def _names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def _refused(capsys: Capture, *args: object) -> str:
    """Run a command that must do nothing, and return its `error:` and `hint:` lines."""
    code, out, err = cli(capsys, *map(str, args))
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert [line.partition(": ")[0] for line in lines if ": " in line][:2] == ["error", "hint"]
    return err


def _document(capsys: Capture, *args: object) -> dict[str, Any]:
    code, out, _ = cli(capsys, *map(str, args), "--json")
    assert code == 0
    return json.loads(out)


def _close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, 1e-4, 1e-4)


# The journey of real checkpoints.

JOURNEYS = ["peft_bert_lora_default_ts", "ah_bert_seq_bn", "peft_bert_lora_bias_all",
            "ah_gpt2_seq_bn", "peft_llama_lora_ts", "peft_vit_lora"]  # fmt: skip


@pytest.mark.parametrize("name", JOURNEYS)
def test_insert_fill_and_extract_take_a_checkpoint_to_pytorch_s_output_and_back(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    case = CASES[name]
    model = tmp_path / "adapted.onnx"
    insert = ("insert", case.base, "--adapter", case.adapter, "--name", "fr", "-o", model)
    assert _document(capsys, *insert)["verified"] is True
    file = tmp_path / "adapted.fr.safetensors"
    assert _names(tmp_path) == ["adapted.fr.safetensors", "adapted.onnx"]
    fed = run(model, {**case.inputs(), **oa.load_adapter(file).feeds()})
    assert case.distance(fed) < case.tolerance
    assert cli(capsys, "check", str(model), str(file))[0] == 0

    french, again = tmp_path / "french.onnx", tmp_path / "again.safetensors"
    assert cli(capsys, "fill", str(model), str(file), "-o", str(french))[0] == 0
    assert case.distance(run(french, case.inputs())) < case.tolerance
    assert cli(capsys, "extract", str(french), "--name", "fr", "-o", str(again))[0] == 0
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", JOURNEYS[:3])
def test_a_baked_insert_computes_pytorch_s_output_alone(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    case = CASES[name]
    model = tmp_path / "baked.onnx"
    insert = ("insert", case.base, "--adapter", case.adapter, "--baked", "-o", model)
    assert _document(capsys, *insert)["adapter"] is None
    assert _names(tmp_path) == ["baked.onnx"]
    assert case.distance(run(model, case.inputs())) < case.tolerance


# insert --adapter


def test_insert_writes_beside_the_model_by_default(work: Path, capsys: Capture) -> None:
    code, out, err = cli(
        capsys, "insert", str(work / "model.onnx"), "--adapter", str(work / "fr")
    )
    assert code == 0
    assert {"model.adapted.onnx", "model.adapted.fr.safetensors"} <= set(_names(work))
    assert "fc1" in out
    assert "fc2" in out
    assert "model.adapted.fr.safetensors" in err


@pytest.mark.parametrize("suffix", ["safetensors", "onnx_adapter", "npz"])
def test_the_format_of_the_weights_is_chosen(suffix: str, work: Path, capsys: Capture) -> None:
    args = ("insert", work / "model.onnx", "--adapter", work / "fr", "-o", work / "a.onnx")
    found = _document(capsys, *args, "--format", suffix)
    keys = {"output", "adapter", "size", "data", "weights_in", "verified", "slots"}
    assert found.keys() == keys | {"warnings", "widened", "unfused"}
    assert found["adapter"] == str(work / f"a.fr.{suffix}")
    assert found["output"] == str(work / "a.onnx")
    assert {slot["name"] for slot in found["slots"]} == {"fc1", "fc2"}
    feeds = oa.load_adapter(found["adapter"]).feeds()
    _close(run(work / "a.onnx", {"x": X, **feeds})["y"], lora_on(X, lora()))


@pytest.mark.parametrize(
    "name",
    [
        *("../evil", "../../../evil", "/evil", "..", ".", "/", "a/b", "a\\..\\b", "~/x"),
        *("a\x1b[31m", "a\nb", ".hidden", "-o", "x.onnx", "日本", "a b"),
    ],
)
def test_an_adapter_s_name_never_leads_out_of_the_folder(
    name: str, work: Path, capsys: Capture
) -> None:
    out = work / "out"
    out.mkdir()
    before = set(work.rglob("*"))
    args = ("insert", work / "model.onnx", "--adapter", work / "fr", "-o", out / "a.onnx")
    found = _document(capsys, *args, f"--name={name}")
    written = set(work.rglob("*")) - before
    assert written == {out / "a.onnx", Path(found["adapter"])}
    assert Path(found["adapter"]).parent == out
    assert Path(found["adapter"]).name.startswith("a.")
    assert oa.load_adapter(found["adapter"]).name == name


def test_the_same_insert_writes_the_same_bytes_every_time(work: Path) -> None:
    base = oa.open_model(work / "model.onnx")
    found = set()
    for _ in range(8):
        checkpoint = oa.load_checkpoint(work / "fr", base)
        oa.save_model(oa.insert_checkpoint(base, checkpoint), work / "a.onnx")
        found.add((work / "a.onnx").read_bytes())
    assert len(found) == 1


def test_the_output_is_not_the_input_unless_forced(work: Path, capsys: Capture) -> None:
    model = work / "model.onnx"
    before = model.read_bytes()
    args = ("insert", model, "--adapter", work / "fr", "-o", model)
    assert "--force" in _refused(capsys, *args)
    assert (model.read_bytes(), _names(work)) == (before, ["de", "fr", "model.onnx"])
    assert cli(capsys, *map(str, args), "--force")[0] == 0
    feeds = oa.load_adapter(work / "model.fr.safetensors").feeds()
    _close(run(model, {"x": X, **feeds})["y"], lora_on(X, lora()))


def test_either_after_or_adapter_is_needed_and_not_both(work: Path, capsys: Capture) -> None:
    for extra in ((), ("--adapter", work / "fr", "--after", "fc1")):
        assert "--after" in _refused(capsys, "insert", work / "model.onnx", *extra)
    assert _names(work) == ["de", "fr", "model.onnx"]


# convert


def test_two_adapters_for_one_model_are_swapped_in_one_session(
    work: Path, capsys: Capture
) -> None:
    model, file = work / "a.onnx", work / "de.onnx_adapter"
    insert = ("insert", work / "model.onnx", "--adapter", work / "fr", "-o", model)
    _document(capsys, *insert, "--format", "onnx_adapter")
    before = model.read_bytes()
    found = _document(capsys, "convert", work / "de", "--for", model, "-o", file)
    slots = ["fc1", "fc2"]
    assert found == {"output": str(file), "name": "de", "slots": slots, "replaced": []}
    assert model.read_bytes() == before
    assert cli(capsys, "check", str(model), str(file), str(work / "a.fr.onnx_adapter"))[0] == 0

    loaded = {}
    for name, path in (("fr", work / "a.fr.onnx_adapter"), ("de", file)):
        loaded[name] = ort.LoraAdapter()
        loaded[name].Load(str(path))
    plain = lora_on(X, {})
    wanted = {"fr": lora_on(X, lora()), "de": lora_on(X, lora(seed=5, rank=3), alpha=9)}
    assert min(np.abs(value - plain).max() for value in wanted.values()) > 0.1
    session = session_of(model)
    for name in ("fr", "de", "", "de", "fr", ""):
        options = ort.RunOptions()
        if name:
            options.add_active_adapter(loaded[name])
        _close(session.run(None, {"x": X}, options)[0], wanted.get(name, plain))


@pytest.fixture
def model(work: Path, capsys: Capture) -> Path:
    """A model with slots for `fr`."""
    args = ("insert", work / "model.onnx", "--adapter", work / "fr", "-o", work / "a.onnx")
    _document(capsys, *args)
    return work / "a.onnx"


def test_convert_to_a_library_is_the_way_back(
    work: Path, model: Path, capsys: Capture
) -> None:
    file, back = work / "a.fr.safetensors", work / "back"
    args = ("convert", file, "--for", model, "--to", "peft", "-o", back)
    found = _document(capsys, *args, "--map", "fc1=body.fc1")
    expected = {"output": str(back), "name": "fr", "slots": ["fc1", "fc2"], "replaced": []}
    assert found == expected
    config = json.loads((back / "adapter_config.json").read_text())
    assert config["target_modules"] == ["body.fc1", "fc2"]
    again = work / "again.safetensors"
    names = ("--name", "fr", "--map", "body.fc1=fc1")
    _document(capsys, "convert", back, "--for", model, "-o", again, *names)
    for key, value in oa.load_adapter(file).feeds().items():
        _close(oa.load_adapter(again).feeds()[key], value)
    assert "has adapter_" in _refused(capsys, *args)


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (("--to", "keras"), "'keras' is not one of"),
        (("--to", "peft", "--part", "fc1"), "--part is not for --to"),
        (("--to", "peft", "--allow-partial"), "--allow-partial is not for --to"),
        (("--to", "kohya"), "is no .safetensors file, and kohya loads one"),
        (("--to", "adapterhub"), "of none of the model types that AdapterHub has"),
        (("--to", "peft", "--map", "fc3=x"), "no module of the checkpoint begins with 'fc3'"),
    ],
)
def test_convert_to_a_library_refuses_what_it_cannot_do_and_writes_nothing(
    rest: tuple[str, ...], said: str, work: Path, model: Path, capsys: Capture
) -> None:
    before = _names(work)
    file = work / "a.fr.safetensors"
    err = _refused(capsys, "convert", file, "--for", model, "-o", work / "out", *rest)
    assert said in err
    assert _names(work) == before


def test_a_checkpoint_that_needs_other_slots_is_refused(
    work: Path, model: Path, capsys: Capture
) -> None:
    before = _names(work)
    ia3 = {"base_model.model.fc1.ia3_l": np.ones((4, 1), np.float32)}
    peft_folder(work / "ia3", ia3, peft_type="IA3", feedforward_modules=[])
    args = ("convert", work / "ia3", "--for", model, "-o", work / "x.safetensors")
    err = _refused(capsys, *args)
    assert "'fc1'" in err
    assert "scale" in err
    assert "insert --adapter" in err
    whole = {**lora(), "base_model.model.fc2.bias": B2 + 1}
    err = _refused(capsys, "convert", peft_folder(work / "h", whole), *args[2:])
    assert "base.fc2.bias" in err
    assert _names(work) == sorted([*before, "ia3", "h"])


def test_a_checkpoint_that_leaves_slots_empty_needs_allow_partial(
    work: Path, model: Path, capsys: Capture
) -> None:
    half = peft_folder(work / "half", lora(modules=["fc1"]))
    args = ("convert", half, "--for", model, "-o", work / "x.safetensors")
    err = _refused(capsys, *args)
    assert "'fc2'" in err
    assert "--allow-partial" in err
    assert _document(capsys, *args, "--allow-partial")["slots"] == ["fc1"]
    feeds = oa.load_adapter(work / "x.safetensors").feeds()
    _close(run(model, {"x": X, **feeds})["y"], lora_on(X, lora(modules=["fc1"])))


def test_an_adapter_for_a_model_with_a_trained_head_carries_the_head(
    work: Path, capsys: Capture
) -> None:
    heads = {n: {**lora(), "base_model.model.fc2.weight": n * W2} for n in (2, 3)}
    for n, tensors in heads.items():
        peft_folder(work / f"head{n}", tensors)
    model, file = work / "a.onnx", work / "b.safetensors"
    _document(capsys, "insert", work / "model.onnx", "--adapter", work / "head2", "-o", model)
    found = _document(capsys, "convert", work / "head3", "--for", model, "-o", file)
    assert found["replaced"] == ["base.fc2.weight"]
    feeds = oa.load_adapter(file).feeds()
    _close(run(model, {"x": X, **feeds})["y"], lora_on(X, lora(), w2=3 * W2))
    assert "base.fc2.weight" in _refused(
        capsys, "convert", work / "fr", "--for", model, "-o", file
    )


# fill, extract, check


def test_fill_writes_beside_the_model_and_says_so(
    work: Path, model: Path, capsys: Capture
) -> None:
    before = model.read_bytes()
    found = _document(capsys, "fill", model, work / "a.fr.safetensors")
    path = str(work / "a.filled.onnx")
    assert found == {"output": path, "adapter": "fr", "slots": ["fc1", "fc2"]}
    assert model.read_bytes() == before
    _close(run(Path(path), {"x": X})["y"], lora_on(X, lora()))
    assert session_of(Path(path)).get_overridable_initializers()
    _document(capsys, "fill", model, work / "a.fr.safetensors", "--baked", "-o", path)
    assert not session_of(Path(path)).get_overridable_initializers()
    _close(run(Path(path), {"x": X})["y"], lora_on(X, lora()))


def test_extract_of_empty_slots_is_refused(work: Path, model: Path, capsys: Capture) -> None:
    before = _names(work)
    assert "empty" in _refused(capsys, "extract", model, "-o", work / "x.npz")
    assert _names(work) == before


def test_check_answers_with_its_exit_status(work: Path, model: Path, capsys: Capture) -> None:
    good = work / "a.fr.safetensors"
    found = _document(capsys, "check", model, good)
    assert found == {
        "passed": True,
        "problems": {str(model): [], str(good): []},
        "unchecked": {},
        "overlaps": [],
        "notes": {},
    }
    whole = oa.load_adapter(good)
    half = replace(whole, weights={"fc1": whole.weights["fc1"]}, activations={})
    bad = oa.save_adapter(half, work / "half.npz")
    code, out, _ = cli(capsys, "check", str(model), str(good), str(bad), "--json")
    found = json.loads(out)
    assert (code, found["passed"]) == (1, False)
    assert found["problems"][str(good)] == []
    assert "'fc2'" in found["problems"][str(bad)][0]
    assert "'fr'" in found["overlaps"][0]
    assert cli(capsys, "check", str(model), str(bad), "--allow-partial")[0] == 0
    assert "missing.npz" in _refused(capsys, "check", model, work / "missing.npz")


def test_what_check_says_to_do_next_works_on_a_baked_model(
    work: Path, model: Path, capsys: Capture
) -> None:
    path, weights = work / "baked.onnx", work / "a.fr.safetensors"
    cli(capsys, "fill", str(model), str(weights), "--baked", "-o", str(path))
    _, _, err = cli(capsys, "check", str(path), str(weights))
    words = shlex.split(err.splitlines()[-1])
    assert words[:3] == ["next:", "onnx-adapt", "fill"]
    assert cli(capsys, *words[2:])[0] == 0


def test_a_trained_adapter_s_folder_is_not_a_file_but_can_be_made_one(
    work: Path, model: Path, capsys: Capture
) -> None:
    (work / "trained").mkdir()
    assert "onnx-adapt convert" in _refused(capsys, "check", model, work / "trained")


@pytest.mark.parametrize("suffix", ["safetensors", "onnx_adapter", "npz"])
def test_check_and_fill_refuse_an_adapter_of_another_base(
    suffix: str, work: Path, model: Path, capsys: Capture
) -> None:
    other = two_layers()
    other.graph.initializer[2].raw_data = (B2 + 1).tobytes()
    saved_model(work / "other.onnx", other)
    args = ("insert", work / "other.onnx", "--adapter", work / "fr", "-o", work / "o.onnx")
    file = _document(capsys, *args, "--format", suffix)["adapter"]
    assert cli(capsys, "check", str(work / "o.onnx"), file)[0] == 0
    code, out, _ = cli(capsys, "check", str(model), file)
    assert code == 1
    assert "another base model" in out
    before = _names(work)
    assert "another base model" in _refused(capsys, "fill", model, file)
    assert _names(work) == before


COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "convert": lambda w: ("convert", w / "de", "--for", w / "a.onnx", "-o",
                          w / "de/adapter_model.safetensors"),
    "fill over the model": lambda w: ("fill", w / "a.onnx", w / "a.fr.safetensors", "-o",
                                      w / "a.onnx"),
    "fill over the adapter": lambda w: ("fill", w / "a.onnx", w / "a.fr.safetensors", "-o",
                                        w / "a.fr.safetensors"),
    "extract": lambda w: ("extract", w / "a.onnx", "-o", w / "a.onnx"),
}  # fmt: skip


@pytest.mark.parametrize("what", COMMANDS)
def test_no_command_replaces_a_file_it_reads(
    what: str, work: Path, model: Path, capsys: Capture
) -> None:
    files = [path for path in work.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    _refused(capsys, *COMMANDS[what](work))
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["fill", "extract", "check", "convert"])
def test_a_model_without_slots_is_refused(command: str, work: Path, capsys: Capture) -> None:
    file = oa.save_adapter(oa.Adapter("a", {}, {"base.x": B2}), work / "a.npz")
    base, out = work / "model.onnx", work / "out.npz"
    args = {
        "fill": (base, file),
        "extract": (base, "-o", out),
        "check": (base, file),
        "convert": (work / "fr", "--for", base, "-o", out),
    }
    err = _refused(capsys, command, *args[command])
    assert "model.onnx has no slots" in err
    assert "onnx-adapt insert" in err
    assert not out.exists()


def test_a_second_checkpoint_with_the_same_trained_weight_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, checkpoint = trained(tmp_path)
    oa.save_model(oa.insert_checkpoint(base, checkpoint), tmp_path / "one.onnx")
    command = ("insert", str(tmp_path / "one.onnx"), "--adapter", str(tmp_path / "fr"))
    code, _, err = cli(capsys, *command, "-o", str(tmp_path / "two.onnx"), "--no-verify")
    assert code == 2
    assert "base.fc2." in err
    assert "onnx-adapt convert" in err
    assert not (tmp_path / "two.onnx").exists()


def test_recorded_shapes_of_means_and_variances_are_not_stale() -> None:
    case = CASES["ah_bert_opset14_seq_bn"]
    base = oa.open_model(case.base)
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(case.adapter, base))
    recorded = onnx.shape_inference.infer_shapes(adapted.proto)
    flagged = [line for line in damages(replace(adapted, proto=recorded)) if "sqrt" in line]
    assert flagged == []
