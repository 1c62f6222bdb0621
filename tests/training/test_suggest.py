"""`suggest`: the gradient of a slot at every site, from one pass."""

import json
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper
from slot_models import cli, saved

import onnx_adapt as oa
from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients import table
from onnx_adapt.training.choosing import choose_places
from onnx_adapt.training.places import usual_places
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.suggest import RANK, suggest

# The first layer goes on, the second is read by nothing that matters, the third is the output.
TEXT = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 3] y, float[n, 4] other)
<float[4, 4] w, float[4, 3] v> {
  a = MatMul(x, w)
  t = Softsign(a)
  other = MatMul(x, w)
  y = MatMul(t, v)
}
"""
BERT = Path(__file__).parents[1] / "cases/bases/bert_headless/base.onnx"
RNG = np.random.default_rng(0)
W, V, X = RNG.standard_normal((4, 4)), RNG.standard_normal((4, 3)), RNG.standard_normal((8, 4))
DATA = {"x": X.astype(np.float32), "labels": np.zeros((8, 3), np.float32)}


def _base() -> oa.Model:
    proto = onnx.parser.parse_model(TEXT)
    for name, value in (("w", W), ("v", V)):
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return oa.Model(proto)


def test_the_norm_is_that_of_a_slot_that_is_off() -> None:
    base = _base()
    found = {item.node: item for item in suggest(base, DATA, loss="mse", output="y")}
    hidden = X @ W / (1 + np.abs(X @ W))
    y = hidden @ V
    back = 2 * y / y.size
    grads = {"y": (y, back), "a": (X @ W, back @ V.T / (1 + np.abs(X @ W)) ** 2)}
    weights = weights_to_train(
        oa.insert(base, after=["a", "y"], activation="identity"), RANK, None, 0
    )
    for node, (value, grad) in grads.items():
        down = weights[f"adapter.{node}.down"].astype(np.float64)
        wanted = np.linalg.norm((value @ down).T @ grad)
        assert found[node].norm == pytest.approx(wanted, rel=1e-4)
        assert found[node].parameters == 16 * 2 * value.shape[1]
    assert found["other"].norm == 0
    assert list(found)[-1] == "other"


def test_sites_before_an_operator_without_a_gradient_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(table.RULES, "Softsign")
    found = {item.node: item for item in suggest(_base(), DATA, loss="mse", output="y")}
    assert "Softsign" in found["a"].refused
    assert found["y"].norm > 0
    monkeypatch.delitem(table.RULES, "MatMul")
    with pytest.raises(GradientError, match="MatMul"):
        suggest(_base(), DATA, loss="mse", output="y")


def test_a_base_without_blocks_gets_slots_where_the_gradients_are_largest() -> None:
    choice = choose_places(_base(), DATA, loss="mse", output="y")
    assert choice.places == ("main:a", "main:y")
    assert choice.reason == "those with the largest gradients"
    flat = {**DATA, "x": np.zeros_like(DATA["x"])}
    with pytest.raises(GradientError, match="zero at every site"):
        choose_places(_base(), flat, loss="mse", output="y")


def test_blocks_are_taken_if_a_gradient_reaches_them() -> None:
    base = oa.open_model(BERT)
    ids = np.random.default_rng(0).integers(1, 60, (16, 6))
    data = {name: np.ones_like(ids) for name in ("attention_mask", "token_type_ids")}
    data |= {"input_ids": ids, "labels": ids[:, 0] % 2}
    head = {"classes": 2, "output": "last_hidden_state"}
    choice = choose_places(base, data, loss="cross_entropy", head=head)
    assert [place in choice.places for place in usual_places(base)] == [True, True]
    assert choice.reason == "the output layer of each block"


def test_the_command_ranks_sites_and_says_which_have_a_slot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", **DATA)
    adapted = saved(oa.insert(_base(), after="a"), tmp_path / "adapted.onnx")
    given = ["--data", str(tmp_path / "data.npz"), "--loss", "mse", "--on", "y"]
    code, out, _ = cli(capsys, "suggest", str(adapted), *given, "--json")
    sites = json.loads(out)["sites"]
    assert code == 0
    assert [site["node"] for site in sites if site["taken"]] == ["a"]
    code, out, err = cli(capsys, "suggest", str(adapted), *given)
    assert code == 0
    assert "100%" in out
    assert "onnx-adapt insert" in err
    np.savez(tmp_path / "short.npz", x=DATA["x"])
    given[1] = str(tmp_path / "short.npz")
    code, _, err = cli(capsys, "suggest", str(adapted), *given)
    assert (code, "no 'labels'" in err) == (2, True)
