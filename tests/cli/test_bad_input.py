"""Bad input: one error line, one hint line, exit status 2, and every file as it was."""

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from disk_models import (
    GRAPH,
    adapted,
    chunk,
    dense,
    external,
    files,
    process,
    refused,
    run,
    several,
    weight,
    write,
)
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save as save_tensors

import onnx_adapt as oa
from onnx_adapt.slot.manifest import KEY

CASES = Path(__file__).parent.parent / "cases"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder the commands run in, holding m.onnx."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m.onnx", several())
    return tmp_path


def _zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"\x80\x02}q\x00.")
    return file.getvalue()


def _tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("m.onnx"), io.BytesIO())
    return file.getvalue()


def _array() -> bytes:
    file = io.BytesIO()
    np.save(file, weight(4, 4))
    return file.getvalue()


def _text(text: str) -> bytes:
    return text.encode() + b" " * 9000


OTHERS = {
    "ORT": (b"\x18\0\0\0ORTM" + bytes(900), "an .ort file", "convert_onnx_models_to_ort"),
    "an adapter": (b"\x18\0\0\0TORT" + bytes(900), "an .onnx_adapter", "run MODEL.onnx"),
    "TFLite": (b"\x1c\0\0\0TFL3" + bytes(900), "TensorFlow Lite", "--tflite m.onnx"),
    "gzip": (gzip.compress(dense().SerializeToString(), mtime=0), "gzip", "gunzip < m.onnx"),
    "zip": (_zipped("m.onnx"), "a zip archive", "unzip m.onnx"),
    "tar": (_tarred(), "a tar archive", "tar -xf m.onnx"),
    "PyTorch": (_zipped("archive/data.pkl"), "a PyTorch file", "torch.onnx.export"),
    "old PyTorch": (
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + b"\x80\x02M\xe9\x03.",
        "a PyTorch file",
        "torch.onnx.export",
    ),
    "pickle": (pickle.dumps({"w": 1}, protocol=4), "a pickle", "torch.onnx.export"),
    "npz": (_zipped("x.npy"), "an .npz archive", "--inputs"),
    "npy": (_array(), "an array of numpy", ".onnx file"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(900), "a GGUF file", "optimum-cli export onnx"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(900), "HDF5", "--keras m.onnx"),
    "safetensors": (
        save_tensors({"fc.weight": weight(4, 4)}),
        "a safetensors file",
        "torch.onnx.export",
    ),
    "PEFT": (
        save_tensors({"base_model.model.fc.lora_A.weight": weight(4, 4)}),
        "the weights of a PEFT or AdapterHub adapter",
        "insert MODEL.onnx --adapter FOLDER",
    ),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "Git LFS", "lfs pull"),
    "HTML": (_text("<!DOCTYPE html>\n<title>404</title>"), "a web page", "/resolve/"),
    "OpenVINO": (_text('<?xml version="1.0"?>\n<net name="m">'), "OpenVINO", ".onnx file"),
    "ONNX text": (GRAPH.encode(), "ONNX text", "onnx.parser"),
    "JSON": (_text('{\n  "peft_type": "LORA"'), "a JSON file", "folder"),
}
"""Other kinds of file: what they are called, and what is to be done."""

NO_MODELS = {
    "empty": (b"", "empty"),
    "zeros": (bytes(9000), "not a whole ONNX model"),
    "noise": (np.random.default_rng(0).bytes(9000), "not a whole ONNX model"),
    "text in UTF-8": ("naïve ".encode() * 100, "is a text file"),
    "a tensor": (numpy_helper.from_array(weight(64, 64)).SerializeToString(), "m.onnx"),
    "broken in a node": (b"\x08\x08" + chunk(7, chunk(1, b"\xff")), "not a whole ONNX model"),
    "no graph": (helper.make_model(onnx.GraphProto()).SerializeToString(), "no ONNX graph"),
    "first half": (several().SerializeToString()[:300], "not a whole ONNX model"),
    "all but a byte": (several().SerializeToString()[:-1], "not a whole ONNX model"),
}
COMMANDS = [
    ["sites", "m.onnx"],
    ["slots", "m.onnx"],
    ["insert", "m.onnx", "--after", "first"],
    ["remove", "m.onnx"],
    ["verify", "m.onnx", "good.onnx"],
    ["verify", "good.onnx", "m.onnx"],
]


@pytest.mark.parametrize("kind", NO_MODELS)
def test_a_file_that_is_no_model_is_refused_by_every_command(kind: str) -> None:
    data, message = NO_MODELS[kind]
    write(Path("m.onnx"), data)
    write(Path("good.onnx"), several())
    for command in COMMANDS:
        assert message in refused(*command).error


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_file_is_named_and_what_to_do_with_it(kind: str) -> None:
    data, what, hint = OTHERS[kind]
    write(Path("m.onnx"), data)
    write(Path("good.onnx"), several())
    np.savez("x.npz", x=weight(1, 8))
    ran = [] if kind == "ORT" else [["run", "m.onnx", "--inputs", "x.npz"]]  # it loads those
    for command in COMMANDS + ran:
        result = refused(*command)
        assert "m.onnx is " in result.error
        assert what in result.error
        assert hint in result.hint


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx_adapter", ".npz", ".bin", ".pt"])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_file_is_no_adapter(kind: str, suffix: str) -> None:
    own = {"safetensors": ".safetensors", "an adapter": ".onnx_adapter", "npz": ".npz"}
    if own.get(kind) == suffix:
        return
    run("insert", "m.onnx", "--after", "first", "--no-verify")
    file = Path(f"fr{suffix}")
    write(file, OTHERS[kind][0])
    for command in (["check", "m.adapted.onnx", file], ["fill", "m.adapted.onnx", file]):
        result = refused(*map(str, command))
        assert OTHERS[kind][1] in result.error
        assert any(
            word in result.hint
            for word in ("onnx-adapt convert", "unpack", "end in", "git lfs", "/resolve/")
        ) or kind in ("TFLite", "OpenVINO", "ONNX text", "npy")


def test_a_model_is_no_adapter() -> None:
    run("insert", "m.onnx", "--after", "first", "--no-verify")
    shutil.copy("m.onnx", "fr.safetensors")
    for file in ("m.onnx", "fr.safetensors"):
        result = refused("check", "m.adapted.onnx", file)
        assert f"{file} is an ONNX model" in result.error


def test_the_bare_weights_of_a_checkpoint_ask_for_their_configuration() -> None:
    Path("trained").mkdir()
    weights = Path("trained/adapter_model.safetensors")
    write(weights, OTHERS["PEFT"][0])
    for place in (weights, "trained"):
        result = refused("insert", "m.onnx", "--adapter", str(place))
        assert (
            "put the adapter_config.json that was saved with them beside them" in result.hint
        )
    write(Path("trained/adapter_config.json"), b"{}")
    assert (
        "give its folder, trained"
        in refused("insert", "m.onnx", "--adapter", str(weights)).hint
    )
    run("insert", "m.onnx", "--after", "first", "--no-verify")
    for command in (["check", "m.adapted.onnx", str(weights)], ["sites", str(weights)]):
        assert "the weights of a PEFT or AdapterHub adapter" in refused(*command).error
    assert "onnx-adapt convert" in refused("check", "m.adapted.onnx", "trained").hint


@pytest.mark.parametrize(
    ("inside", "hint"),
    [
        ("a.onnx", "name the .onnx file in it: a.onnx"),
        ("adapter_config.json", "insert MODEL.onnx --adapter FOLDER"),
        ("saved_model.pb", "tf2onnx.convert --saved-model sub"),
        ("config.json", "optimum-cli export onnx"),
    ],
)
def test_a_folder_in_place_of_a_model_says_which_file_of_it_to_name(
    inside: str, hint: str
) -> None:
    write(Path("sub") / inside, b"{}")
    assert hint in refused("sites", "sub").hint


def test_a_model_that_is_not_there_has_neighbours() -> None:
    assert "nearest beside it: m.onnx" in refused("sites", "n.onnx").hint


def test_data_beside_a_model_that_is_a_git_lfs_pointer_is_named() -> None:
    external(Path("e.onnx"), "w.bin")
    write(Path("w.bin"), OTHERS["LFS"][0])
    result = refused("sites", "e.onnx")
    assert "w.bin is a Git LFS pointer" in result.error
    assert "git lfs pull" in result.hint


@pytest.mark.parametrize("command", ["sites", "slots", "insert", "remove"])
@pytest.mark.parametrize("path", ["missing.onnx", ".", "/", "", "m.onnx/x", "loop", "\udcff"])
def test_a_path_that_is_no_file_is_refused_by_every_command(path: str, command: str) -> None:
    Path("loop").symlink_to("loop")
    after = ["--after", "first"] if command == "insert" else []
    refused(command, path, *after)


def test_missing_and_cut_and_outside_data_is_refused_by_every_command() -> None:
    write(Path("good.onnx"), several())
    external(Path("sub/m.onnx"), "w.bin")
    data = Path("sub/w.bin").rename("w.bin").read_bytes()
    commands = [[a.replace("m.onnx", "sub/m.onnx") for a in command] for command in COMMANDS]
    for command in commands:
        result = refused(*command)
        assert "needs the data file 'w.bin'" in result.error
        assert "copy the data file beside the model" in result.hint
    Path("sub/w.bin").symlink_to("../w.bin")
    for command in commands:
        assert "outside the model's folder" in refused(*command).error
    Path("sub/w.bin").unlink()
    write(Path("sub/w.bin"), data[:-1])
    for command in commands:
        result = refused(*command)
        assert "needs bytes 0 to 16384 of 'w.bin', which has 16383" in result.error
        assert "cut off" in result.hint


PLACES = {
    "unknown": (["--after", "frist"], "'frist'", "first"),
    "near": (["--after", "las"], "'las'", "nearest: last"),
    "blank": (["--after", ""], "''", ""),
    "glob": (["--after", "nothing.*"], "'nothing.*'", ""),
    "one of two": (["--after", "last", "--after", "missing"], "'missing'", ""),
    "ambiguous": (["--after", "twin"], "'twin' means 2 places: main:t1, main:t2", "address"),
    "integer": (["--after", "best"], "int64", "sites"),
    "unknown width": (["--after", "pick"], "width", "sites"),
    "globbed integer": (["--after", "bes*"], "int64", "sites"),
    "an input": (["--after", "x"], "'x' is an input", "node"),
    "a weight": (["--after", "W"], "'W' is a weight", "node"),
    "later source": (["--after", "first", "--source", "act"], "computed after", "before"),
    "other shape": (["--after", "last", "--source", "lift"], "source 'up'", "axes"),
    "integer source": (["--after", "last", "--source", "best"], "source 'top'", "type"),
    "no such source": (["--after", "last", "--source", "lsat"], "'lsat'", "last"),
    "twin source": (["--after", "last", "--source", "twin"], "means 2 places", "address"),
    "bottleneck 0": (["--after", "first", "--bottleneck", "0"], "bottleneck of 0", "1"),
    "negative": (["--after", "first", "--bottleneck", "-4"], "bottleneck of -4", "1"),
    "huge": (["--after", "first", "--bottleneck", "9" * 14], "bottleneck", ""),
    "vast": (["--after", "first", "--bottleneck", "9" * 30], "bottleneck", ""),
    "words": (["--after", "first", "--bottleneck", "many"], "'many'", "--help"),
    "seed": (["--after", "first", "--bottleneck", "4", "--seed", "-1"], "seed", ""),
    "activation": (["--after", "first", "--activation", "rleu"], "'rleu'", "relu"),
    "nowhere": ([], "--after", ""),
    "no option": (["--aftr", "first"], "--aftr", "--help"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_slot_that_makes_no_sense_is_refused(case: str) -> None:
    arguments, message, hint = PLACES[case]
    result = refused("insert", "m.onnx", *arguments)
    assert message in result.error
    assert hint in result.hint


INPUTS = {
    "missing": ({}, "missing.npz"),
    "no archive": ({}, "e.onnx"),
    "another name": ({"z": weight(2, 64)}, "'x'"),
    "another type": ({"x": np.zeros((2, 64), np.int64)}, "x"),
    "another width": ({"x": weight(2, 63)}, "x"),
    "another rank": ({"x": weight(64)}, "x"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_do_not_fit_are_refused(case: str) -> None:
    arrays, message = INPUTS[case]
    write(Path("e.onnx"), dense())
    np.savez("in.npz", **arrays)
    file = message if not arrays else "in.npz"
    assert message in refused("insert", "e.onnx", "--after", "dense", "--inputs", file).error
    run("insert", "e.onnx", "--after", "dense", "--no-verify")
    assert message in refused("verify", "e.onnx", "e.adapted.onnx", "--inputs", file).error


@pytest.mark.parametrize("name", ["m.onnx", "./m.onnx", "sub/../m.onnx", "hard", "soft"])
def test_the_input_is_not_replaced_under_any_name(name: str) -> None:
    Path("sub").mkdir()
    os.link("m.onnx", "hard")
    Path("soft").symlink_to("m.onnx")
    insert = ["insert", "m.onnx", "--after", "first", "--no-verify"]
    result = refused(*insert, "-o", name)
    assert "would replace the input" in result.error
    assert "--force" in result.hint
    assert run(*insert).status == 0
    refused("remove", "m.adapted.onnx", "-o", "m.adapted.onnx")


@pytest.mark.parametrize("name", ["sub/w.bin", "hard", "soft"])
def test_the_data_of_the_input_is_not_replaced_even_by_force(name: str) -> None:
    external(Path("e.onnx"), "sub/w.bin")
    os.link("sub/w.bin", "hard")
    Path("soft").symlink_to("sub/w.bin")
    result = refused("insert", "e.onnx", "--after", "dense", "-o", name, "--force")
    assert "would replace 'sub/w.bin', which holds weights of e.onnx" in result.error
    assert "-o" in result.hint


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize(
    ("data", "command"),
    [
        ("w.bin", "report lender.onnx a.onnx -o"),
        ("w.bin", "verify a.onnx a.onnx --html"),
        ("w.safetensors", "extract a.onnx -o"),
        ("w.npz", "run a.onnx --inputs x.npz -o"),
    ],
    ids=["report", "verify", "extract", "run"],
)
def test_no_command_writes_over_the_weights_of_its_models(
    data: str, command: str, thin: bool
) -> None:
    """A thin model's weights are in its base's file, another's in whatever it names."""
    if thin:
        write(Path(data), dense())
        oa.save_model(adapted(Path(data)), "a.onnx", thin=True)
        write(Path("lender.onnx"), dense())
    else:
        oa.save_model(adapted(external(Path("lender.onnx"), data)), "a.onnx")
    np.savez("x.npz", x=np.ones((1, 64), "f4"))
    result = refused(*command.split(), data)
    assert f"the output would replace {data!r}, which" in result.error


@pytest.mark.parametrize("output", ["a.onnx", "sub/a.onnx"])
def test_an_adapter_is_not_written_over_the_data_of_the_base(output: str) -> None:
    Path("sub").mkdir()
    case = CASES / "peft_bert_lora_default_ts"
    proto = onnx.load(case / "base.onnx")
    onnx.save(proto, "b.onnx", save_as_external_data=True, location="a.fr.safetensors")
    options = ["--adapter", case / "adapter", "--name", "fr", "--no-verify"]
    result = refused("insert", "b.onnx", *options, "-o", output)
    assert "would replace 'a.fr.safetensors', which b.onnx needs" in result.error


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/a.onnx", "there is no folder"),
        ("m.onnx/a.onnx", "there is no folder"),
        ("sub", "not a regular file"),
        (".", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("/dev/full", "not a regular file"),
        ("loop", "loop"),
        ("x" * 300, "cannot write"),
    ],
    ids=["no folder", "a file", "a folder", "here", "null", "full", "loop", "long"],
)
def test_a_place_that_cannot_hold_the_result_is_refused(path: str, message: str) -> None:
    Path("sub").mkdir()
    Path("loop").symlink_to("loop")
    assert message in refused("insert", "m.onnx", "--after", "first", "-o", path).error
    assert message in refused("build", "8", "-o", path).error


def test_a_name_of_the_longest_length_can_be_written() -> None:
    name = "模" * 80 + ".onnx"
    assert len(name.encode()) == 245
    assert run("build", "8", "-o", name).err.startswith("wrote ")
    assert Path(name).stat().st_size > 0


@pytest.mark.parametrize("arguments", [["0"], ["-8"], ["8", "--bottleneck", "0"], ["9" * 14]])
def test_an_adapter_of_no_size_or_too_large_is_not_built(arguments: list[str]) -> None:
    refused("build", *arguments)


@pytest.mark.parametrize("target", ["new.onnx", "old.onnx", "m.onnx"])
def test_a_full_disk_leaves_everything_as_it_was(target: str) -> None:
    write(Path("m.onnx"), dense())
    write(Path("old.onnx"), b"older")
    before = files(Path())
    command = ["insert", "m.onnx", "--after", "dense", "--no-verify", "--force", "-o"]
    result = process("disk full", *command, target)
    assert "File too large" in result.error
    assert "make room" in result.hint
    assert files(Path()) == before


def test_a_full_disk_while_data_is_copied_leaves_everything_as_it_was() -> None:
    external(Path("e.onnx"), "sub/deep/w.bin")
    Path("other").mkdir()
    before = files(Path())
    command = ["insert", "e.onnx", "--after", "dense", "--no-verify", "-o", "other/e.onnx"]
    assert "File too large" in process("disk full", *command).error
    assert files(Path()) == before


def test_a_read_only_folder_is_refused() -> None:
    Path("locked").mkdir()
    Path("locked").chmod(0o555)
    before = files(Path())
    command = ["insert", "m.onnx", "--after", "first", "--no-verify", "-o", "locked/a.onnx"]
    result = process("no power", *command)
    Path("locked").chmod(0o755)
    assert "Permission denied" in result.error
    assert "choose another" in result.hint
    assert files(Path()) == before


@pytest.mark.parametrize("secret", ["e.onnx", "w.bin"])
def test_a_file_that_may_not_be_read_is_refused(secret: str) -> None:
    external(Path("e.onnx"), "w.bin")
    Path(secret).chmod(0)
    result = process("no power", "insert", "e.onnx", "--after", "dense", "-o", "a.onnx")
    assert secret in result.error
    assert result.hint
    assert not Path("a.onnx").exists()


@pytest.mark.parametrize("arguments", [["sites", "m.onnx"], ["sites", "m.onnx", "--json"]])
def test_results_that_cannot_be_written_to_stdout_are_an_error(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        result = process("plain", *arguments, stdout=full)
    assert "No space left on device" in result.error


def test_a_closed_stdout_gives_no_traceback() -> None:
    code = "from onnx_adapt.cli import main; main()"
    shell = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-c", code, "sites", "m.onnx"]
    done = subprocess.run(shell, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_a_path_that_is_not_utf8_works_or_is_refused() -> None:
    os.mkdir(b"\xff")
    write(Path(os.fsdecode(b"\xff")) / "m.onnx", dense())
    result = process("plain", "insert", b"\xff/m.onnx", "--after", "dense", "--json")
    assert "Traceback" not in result.err
    assert result.status == 0
    assert os.path.exists(b"\xff/m.adapted.onnx")
    assert len(json.loads(result.out)["slots"]) == 1


def test_no_command_shows_the_help() -> None:
    result = run()
    assert result.status == 2
    assert "\n  insert " in result.err + result.out
    assert "\\n" not in result.err


@pytest.mark.parametrize(
    "arguments",
    [["run", "m.onnx", "--inputs", "x.npz", "--adapter", "a", "--adapter=b"],
     ["insert", "m.onnx", "--after", "first", "-o", "a.onnx", "--output", "b.onnx"]],
)  # fmt: skip
def test_an_option_of_one_value_that_is_given_twice_is_refused(arguments: list[str]) -> None:
    """Not the last one taken, as if the other had not been said."""
    assert "is given more than once" in refused(*arguments).err


def test_an_option_of_many_values_may_be_given_again() -> None:
    twice = ("--after", "first", "--after", "last")
    assert run("insert", "m.onnx", *twice, "--no-verify").status == 0


def with_slots() -> oa.Model:
    return oa.insert(oa.open_model("m.onnx"), after="first")


SLOT_COMMANDS = [
    ["slots", "s.onnx"],
    ["remove", "s.onnx"],
    ["insert", "s.onnx", "--after", "last"],
    ["verify", "m.onnx", "s.onnx"],
]


def test_slots_of_a_newer_format_are_refused_by_every_command() -> None:
    model = with_slots().proto
    (entry,) = [entry for entry in model.metadata_props if entry.key == KEY]
    entry.value = json.dumps({**json.loads(entry.value), "format": 99})
    write(Path("s.onnx"), model)
    for command in SLOT_COMMANDS:
        result = refused(*command)
        assert "format 99" in result.error
        assert "upgrade" in result.hint


def test_slots_whose_inputs_were_stripped_are_refused_by_every_command() -> None:
    model = with_slots().proto
    kept = [value for value in model.graph.input if not value.name.startswith("adapter.")]
    assert len(kept) == len(model.graph.input) - 2
    del model.graph.input[:]
    model.graph.input.extend(kept)
    write(Path("s.onnx"), model)
    for command in SLOT_COMMANDS:
        result = refused(*command)
        assert "input 'adapter.first.down' was stripped" in result.error
        assert "simplifiers" in result.hint


CHAIN = "k = Identity(W)\n" + "\n".join(
    f"i{n} = Identity({'i' + str(n - 1) if n else 'k'})" for n in range(2000)
)
BROKEN = {
    "Constant without output": ("k = Constant<value = float {1.0}>()", "k"),
    "Transpose without input": ("k = Transpose(W)\n z = MatMul(x, k)", "W"),
    "Mul with one input": ("k = Mul(W, zero)\n z = MatMul(x, k)", "zero"),
    "Gather without indices": ("k = Gather(W, zero)", "zero"),
    "a circle": ("k = Identity(j)\n j = Identity(k)\n z = MatMul(x, k)", ""),
    "a long chain": (f"{CHAIN}\n z = MatMul(x, i1999)", ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_unusual_graph_gives_no_traceback(case: str) -> None:
    text, gone = BROKEN[case]
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[b,2] x) => (float[b,2] y) <float[2,2] W = {{1, 2, 3, 4}}, int64 zero = {{0}}>
        {{ {text}
           [first] y = Relu(x) }}"""
    )
    for names in (model.graph.node[0].input, model.graph.node[0].output):
        names[:] = [name for name in names if name != gone]
    write(Path("m.onnx"), model)
    assert run("sites", "m.onnx", "--all").status in (0, 2)
    assert run("insert", "m.onnx", "--after", "first", "--no-verify").status in (0, 2)


@pytest.mark.parametrize("where", ["a weight", "a layer's output", "a Constant node"])
def test_a_type_that_onnx_does_not_know_yet_gives_no_traceback(where: str) -> None:
    model = several()
    new = TensorProto(name="new", data_type=99, dims=[1], raw_data=b"1")
    if where == "a weight":
        model.graph.initializer.append(new)
    elif where == "a Constant node":
        model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=new))
        model.graph.node[2].input[1] = "k"
    else:
        model.graph.output[0].type.tensor_type.elem_type = 99
    write(Path("m.onnx"), model)
    assert run("sites", "m.onnx", "--all").status in (0, 2)
    assert run("insert", "m.onnx", "--after", "first", "--no-verify").status in (0, 2)


@pytest.mark.parametrize("name", ["first", "MatMul", "keep"])
def test_a_name_that_is_not_utf8_gives_no_traceback(name: str) -> None:
    data = several().SerializeToString()
    bad = b"\xff" * len(name)
    write(Path("m.onnx"), data.replace(name.encode(), bad))
    assert run("sites", "m.onnx", "--all").status in (0, 2)
    assert run("insert", "m.onnx", "--after", "last", "--no-verify").status in (0, 2)


def test_an_absurd_width_gives_no_traceback() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[b,1099511627776] x) => (float[b,1099511627776] y) { [first] y = Relu(x) }"""
    )
    write(Path("m.onnx"), model)
    refused("insert", "m.onnx", "--after", "first", "--bottleneck", "8", "--no-verify")


def test_control_characters_in_names_do_not_reach_the_terminal() -> None:
    model = several()
    for node in model.graph.node:
        node.name = "\x1b[31mred\r"
    write(Path("m.onnx"), model)
    assert "\x1b" not in run("sites", "m.onnx").out
    result = refused("insert", "m.onnx", "--after", "\x1b[31mred\r")
    assert "\x1b" not in result.err
    assert "\\x1b[31mred\\r" in result.error
