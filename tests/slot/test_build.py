"""The standalone adapter: `build_adapter` and `onnx-adapt build`."""

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from slot_models import assert_sound, cli, passes, run

import onnx_adapt as oa
from onnx_adapt.errors import SlotError
from onnx_adapt.slot.activations import ACTIVATIONS

X = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)


def _weights(model: oa.Model) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}


def _with_random_weights(model: oa.Model) -> dict[str, np.ndarray]:
    """Replace every weight in place; return them by shape and order: down, up, biases."""
    rng = np.random.default_rng(2)
    found = {}
    for tensor in model.proto.graph.initializer:
        value = rng.standard_normal(tensor.dims).astype(np.float32)
        found[tensor.name] = value
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return found


def test_an_adapter_is_a_sound_model() -> None:
    model = oa.build_adapter(8)
    assert_sound(model)
    assert (model.payloads, model.path) == ((), None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_fresh_adapter_is_the_identity(activation: str, bias: bool) -> None:
    model = oa.build_adapter(8, 3, activation=activation, bias=bias)
    assert_sound(model)
    assert run(model, {"input": X})[0].tobytes() == X.tobytes()


def test_input_and_output_are_batch_by_hidden() -> None:
    graph = oa.build_adapter(8).proto.graph
    for value, name in ((graph.input[0], "input"), (graph.output[0], "output")):
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert (value.name, dims) == (name, ["batch", 8])
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert (len(graph.input), len(graph.output)) == (1, 1)


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"identity"}))
def test_the_layers_have_the_promised_names(activation: str) -> None:
    name = f"{activation}_adapter"
    model = oa.build_adapter(8, 3, activation=activation, name=name)
    nodes = [node.name for node in model.proto.graph.node]
    assert len(nodes) == len(set(nodes))
    assert all(node.startswith(f"{name}_") for node in nodes)
    wanted = [f"{name}_{layer}" for layer in ("down", "act", "up", "residual")]
    assert [node for node in nodes if node in wanted] == wanted


@pytest.mark.parametrize("bias", [True, False])
def test_with_weights_it_computes_the_bottleneck(bias: bool) -> None:
    model = oa.build_adapter(8, 3, bias=bias)
    values = _with_random_weights(model)
    by_shape = {v.shape: v for v in values.values()}
    assert set(by_shape) == {(8, 3), (3, 8)} | ({(3,), (8,)} if bias else set())
    hidden = np.maximum(X @ by_shape[8, 3] + by_shape.get((3,), 0), 0)
    wanted = X + hidden @ by_shape[3, 8] + by_shape.get((8,), 0)
    np.testing.assert_allclose(run(model, {"input": X})[0], wanted, 1e-4, 1e-4)


def test_gelu_is_the_exact_one() -> None:
    model = oa.build_adapter(8, 3, activation="gelu", bias=False)
    down, up = (v for _, v in sorted(_with_random_weights(model).items()))
    gelu = np.vectorize(lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)))
    np.testing.assert_allclose(
        run(model, {"input": X})[0], X + gelu(X @ down) @ up, 1e-4, 1e-4
    )


def test_the_defaults_are_64_relu_and_biases() -> None:
    model = oa.build_adapter(8)
    assert sorted(v.shape for v in _weights(model).values()) == [(8,), (8, 64), (64,), (64, 8)]
    assert "Relu" in [node.op_type for node in model.proto.graph.node]


def test_only_down_is_random_and_the_seed_decides_it() -> None:
    one, again, other = (_weights(oa.build_adapter(8, 3, seed=s)) for s in (1, 1, 2))
    assert {n: v.tobytes() for n, v in one.items()} == {
        n: v.tobytes() for n, v in again.items()
    }
    random = [name for name, value in one.items() if value.any()]
    (name,) = random
    assert one[name].shape == (8, 3)
    assert not np.array_equal(one[name], other[name])
    assert np.abs(one[name]).max() <= 1 / math.sqrt(8)


def test_an_adapter_is_no_model_with_slots() -> None:
    model = oa.build_adapter(8)
    assert oa.list_slots(model) == ()
    assert not any(node.metadata_props for node in model.proto.graph.node)


def test_an_adapter_takes_slots_itself() -> None:
    model = oa.build_adapter(8, 3)
    adapted = oa.insert(model, after="adapter_residual")
    passes(model, adapted)
    assert oa.remove(adapted).proto == model.proto


@pytest.mark.parametrize(
    ("args", "options", "message", "hint"),
    [
        ((0,), {}, "hidden size of 0", "1 or more"),
        ((-4,), {}, "hidden size of -4", "1 or more"),
        ((8, 0), {}, "bottleneck of 0", "1 or more"),
        ((8, -1), {}, "bottleneck of -1", "1 or more"),
        ((8,), {"activation": "rleu"}, "'rleu'", "relu"),
    ],
)
def test_an_impossible_adapter_is_refused(
    args: tuple[int, ...], options: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(SlotError, match=message) as caught:
        oa.build_adapter(*args, **options)
    assert hint in caught.value.hint


def test_the_command_writes_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fr.onnx"
    options = ["--bottleneck", "3", "--activation", "gelu", "--name", "fr", "--no-bias"]
    code, out, err = cli(capsys, "build", "8", *options, "--seed", "5", "-o", str(path))
    assert (code, out) == (0, "")
    assert str(path) in err
    model = oa.build_adapter(8, 3, activation="gelu", name="fr", bias=False, seed=5)
    assert onnx.load(path) == model.proto
    onnx.checker.check_model(path, full_check=True)


def test_the_command_names_the_file_after_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli(capsys, "build", "8", "--name", "fr", "--json")
    document = json.loads(out)
    assert code == 0
    assert Path(document["output"]) == tmp_path / "fr.onnx"
    assert document["size"] == (tmp_path / "fr.onnx").stat().st_size
    assert {"fr_down", "fr_act", "fr_up", "fr_residual"} <= set(document["nodes"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["0"], "hidden size of 0"),
        (["8", "--bottleneck", "-2"], "bottleneck of -2"),
        (["8", "--activation", "rleu"], "'rleu'"),
        (["eight"], "eight"),
        ([], "HIDDEN_SIZE"),
        (["8", "-o", "no/such/folder/a.onnx"], "folder"),
    ],
)
def test_the_command_refuses_with_2_and_writes_nothing(
    args: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(capsys, "build", *args)
    assert (code, out) == (2, "")
    error, hint = err.strip().splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert list(tmp_path.iterdir()) == []
