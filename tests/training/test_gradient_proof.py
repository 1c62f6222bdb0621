"""`verify --gradients`: right gradients agree with differences in float64, others do not."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from gradient_checks import differences
from onnx import helper, numpy_helper, parser
from slot_models import cli, run, saved

import onnx_adapt as oa
from onnx_adapt.graph.gradients import table
from onnx_adapt.graph.gradients.rule import Grads, Step
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.training.double import double_name, in_double
from onnx_adapt.training.gradient_proof import check_gradient_nodes

CASE = Path(__file__).parents[1] / "cases/peft_bert_lora_default_ts"
AFTER = ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.output.dense"]


@pytest.fixture(scope="module")
def model() -> oa.Model:
    return oa.insert(oa.open_model(CASE / "base.onnx"), after=AFTER, activation="gelu")


def test_right_gradients_agree_with_differences(model: oa.Model) -> None:
    check = check_gradient_nodes(model)
    assert check.passed
    assert check.detail.startswith("4 weights within")
    assert check.warnings == ()


@pytest.mark.parametrize("factor", [1.1, 0.0])
def test_a_wrong_rule_fails_the_check(
    factor: float, model: oa.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 loses the gradient that goes through attention; what is left looks plausible."""
    right = table.RULES["Softmax"]

    def wrong(tape: Tape, step: Step) -> Grads:
        return [tape.times(str(grad), factor) for grad in right(tape, step)]

    monkeypatch.setitem(table.RULES, "Softmax", wrong)
    check = check_gradient_nodes(model)
    assert not check.passed
    assert "differences in float64" in check.detail


def test_the_command_adds_the_check_to_the_report(
    model: oa.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(saved(model, tmp_path / "adapted.onnx"))
    code, out, _ = cli(
        *(capsys, "verify", str(CASE / "base.onnx"), path, "--gradients", "--json")
    )
    check = json.loads(out)["checks"][-1]
    assert (code, check["name"], check["passed"]) == (0, "gradients", True)


def test_an_operator_without_a_rule_fails_the_check_by_name(
    model: oa.Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(table.RULES, "MatMul")
    path = str(saved(model, tmp_path / "adapted.onnx"))
    code, out, _ = cli(capsys, "verify", str(CASE / "base.onnx"), path, "--gradients")
    assert code == 1
    assert "no gradient for operator MatMul" in out


QUANTISED = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y)
<float[4, 4] w, float s = {0.05}, int8 z = {0}> {
  a = MatMul(x, w)
  q = QuantizeLinear(a, s, z)
  d = DequantizeLinear(q, s, z)
  y = Tanh(d)
}
"""


def _quantised() -> oa.Model:
    proto = parser.parse_model(QUANTISED)
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    proto.graph.initializer.insert(0, numpy_helper.from_array(weight, "w"))
    proto.graph.node[0].name = "a"
    return oa.Model(proto)


def test_roundings_of_a_quantised_model_are_left_out_and_said() -> None:
    check = check_gradient_nodes(oa.insert(_quantised(), after="a"))
    assert check.passed
    assert "1 rounding of activations left out" in check.detail


def test_a_model_that_moves_in_steps_is_not_passed() -> None:
    base = _quantised()
    base.proto.graph.node[1].CopyFrom(
        helper.make_node("DynamicQuantizeLinear", ["a"], ["q", "ds", "dz"], "rounds")
    )
    base.proto.graph.node[2].CopyFrom(
        helper.make_node("DequantizeLinear", ["q", "ds", "dz"], ["d"], "back")
    )
    check = check_gradient_nodes(oa.insert(base, after="a"))
    assert not check.passed
    assert "DynamicQuantizeLinear 'rounds' rounds" in check.detail


def test_what_is_widened_agrees_with_a_reference_in_float64() -> None:
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[2, 3] x, float[3, 3] w) => (float loss) {
      h = MatMul(x, w)
      e = Erf(h)
      t = Tanh(e)
      loss = ReduceSum <keepdims: int = 0> (t)
    }
    """
    proto = parser.parse_model(text)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3)), rng.standard_normal((3, 3))
    wide = in_double(oa.Model(proto), "loss", ["w"])
    feeds = {"x": x.astype(np.float32), double_name("w"): w}
    (found,) = run(wide.proto, feeds)
    assert found.dtype == np.float64
    for value in proto.graph.input:
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    grad = differences(proto, {"x": feeds["x"].astype(np.float64), "w": w}, "w")
    moved = run(wide.proto, {**feeds, double_name("w"): w + 1e-3 * grad})[0]
    assert moved - found == pytest.approx(1e-3 * float((grad**2).sum()), rel=2e-2)
