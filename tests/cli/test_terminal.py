"""Names that would rewrite the terminal: every command prints them escaped."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from adapter_models import bumped, lora, peft_folder, two_layers, weights
from disk_models import Result, run, write

import onnx_adapt as oa

WILD = "\n\r\x1b[31m\x9b2J\u202e\x7f"
HIDDEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")


def _named() -> onnx.ModelProto:
    """`two_layers` with controls in the name of everything that can have one."""
    model = two_layers()
    graph = model.graph
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    for node in graph.node:
        node.name = f"{node.name}{WILD}"
        node.input[:] = [name + WILD for name in node.input]
        node.output[:] = [name + WILD for name in node.output]
    for item in (*graph.input, *graph.output, *graph.initializer):
        assert item.name in names
        item.name += WILD
    return model


def _escaped(result: Result, status: int = 0) -> Result:
    """The result of a command whose output obeys no name."""
    assert result.status == status, result
    for text in (result.out, result.err):
        assert HIDDEN.findall(text) == []
        assert not any(line.startswith("\\r") for line in text.splitlines())
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m.onnx", _named())
    np.savez(tmp_path / "x.npz", **{f"x{WILD}": np.ones((2, 4), np.float32)})
    model = oa.insert(oa.open_model("m.onnx"), after=[f"a{WILD}", f"y{WILD}"])
    oa.save_model(model, "s.onnx")
    adapter = {slot.name: weights(seed=i) for i, slot in enumerate(oa.list_slots(model))}
    assert len(adapter) == 2
    oa.save_adapter(oa.make_adapter(model, f"fr{WILD}", adapter), "fr.safetensors")
    oa.save_model(oa.fill(model, oa.load_adapter("fr.safetensors")), "f.onnx")
    odd = oa.Adapter(f"odd{WILD}", {f"other{WILD}": weights()})
    oa.save_adapter(odd, "odd.npz")
    return tmp_path


COMMANDS: dict[str, tuple[int, list[str]]] = {
    "sites": (0, ["sites", "m.onnx", "--all"]),
    "sites of a pattern": (2, ["sites", "m.onnx", f"nowhere{WILD}"]),
    "insert": (0, ["insert", "m.onnx", "--after", f"a{WILD}"]),
    "insert nowhere": (2, ["insert", "m.onnx", "--after", f"b{WILD}{WILD}"]),
    "insert a glob": (0, ["insert", "m.onnx", "--after", "*"]),
    "slots": (0, ["slots", "s.onnx"]),
    "verify": (0, ["verify", "m.onnx", "s.onnx"]),
    "verify itself": (0, ["verify", "s.onnx", "s.onnx"]),
    "check": (0, ["check", "s.onnx", "fr.safetensors"]),
    "check another": (1, ["check", "s.onnx", "odd.npz", "fr.safetensors"]),
    "fill": (0, ["fill", "s.onnx", "fr.safetensors"]),
    "fill another": (2, ["fill", "s.onnx", "odd.npz"]),
    "extract nothing": (2, ["extract", "s.onnx", "-o", "out.npz"]),
    "extract": (0, ["extract", "f.onnx", "-o", "out.npz", "--name", f"n{WILD}"]),
    "convert": (2, ["convert", "peft", "--for", "s.onnx", "-o", "out.npz"]),
    "run": (0, ["run", "s.onnx", "--inputs", "x.npz", "--adapter", "fr.safetensors"]),
    "run another": (2, ["run", "s.onnx", "--inputs", "x.npz", "--adapter", "odd.npz"]),
    "run nothing": (2, ["run", "s.onnx", "--inputs", "x.npz", "--adapter", f"no{WILD}"]),
    "run a blend": (2, ["run", "s.onnx", "--inputs", "x.npz", "--blend", f"a{WILD}"]),
    "remove": (0, ["remove", "s.onnx"]),
    "remove another": (2, ["remove", "s.onnx", "--slot", f"no{WILD}"]),
    "build": (0, ["build", "4", "--name", f"n{WILD}", "-o", "built.onnx"]),
    "build another": (2, ["build", "4", "--activation", f"no{WILD}"]),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_no_command_prints_a_name_as_it_is(what: str, folder: Path) -> None:
    status, arguments = COMMANDS[what]
    peft_folder(folder / "peft", lora(modules=[f"other{WILD}"]))
    result = _escaped(run(*arguments), status)
    again = _escaped(run(*arguments, "--json"), status)
    if status < 2:
        assert json.loads(again.out)
        assert result.out or result.err


def test_names_in_json_are_the_real_ones(folder: Path) -> None:
    found = json.loads(_escaped(run("sites", "m.onnx", "--all", "--json")).out)
    assert {f"a{WILD}", f"y{WILD}"} <= {site["tensor"] for site in found["sites"]}


def test_a_model_with_such_names_is_adapted_all_the_same(folder: Path) -> None:
    adapter = oa.load_adapter("fr.safetensors")
    x = np.ones((2, 4), np.float32)
    with oa.AdapterSession("s.onnx", adapters={"fr": adapter}) as session:
        (found,) = session.run({f"x{WILD}": x}, adapter="fr").values()
    named = dict(zip(("fc1", "fc2"), adapter.weights.values(), strict=True))
    np.testing.assert_allclose(found, bumped(x, oa.Adapter("fr", named)), 1e-4, 1e-4)
    oa.save_model(oa.remove(oa.open_model("s.onnx")), "back.onnx")
    assert Path("back.onnx").read_bytes() == Path("m.onnx").read_bytes()
