"""The check before a training sees a quantised model with its bounds, without its steps."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients import table
from onnx_adapt.training.settings import Settings
from onnx_adapt.training.train import Trained
from onnx_adapt.training.unrounded import cut_off_alone

RNG = np.random.default_rng(0)
SAMPLES = {
    "x": RNG.standard_normal((24, 4)).astype(np.float32),
    "labels": RNG.standard_normal((24, 4)).astype(np.float32) / 2,
}


def quantised(scale: str = "float s = {0.4}, uint8 z = {125}") -> oa.Model:
    """A layer whose output is rounded to 0.4, far too coarse for differences."""
    proto = parser.parse_model(f"""
    <ir_version: 8, opset_import: ["": 17]>
    g (float[n, 4] x) => (float[n, 4] y)
    <float[4, 4] w, {scale}> {{
      a = MatMul(x, w)
      q = QuantizeLinear <axis: int = 1> (a, s, z)
      d = DequantizeLinear <axis: int = 1> (q, s, z)
      y = Tanh(d)
    }}
    """)
    weight = RNG.standard_normal((4, 4)).astype(np.float32)
    proto.graph.initializer.insert(0, numpy_helper.from_array(weight, "w"))
    proto.graph.node[0].name = "a"
    return oa.Model(proto)


def train() -> Trained:
    model = oa.insert(quantised(), after="a")
    return oa.train(model, SAMPLES, loss="mse", settings=Settings(epochs=1, batch_size=8))


def test_a_coarsely_rounded_model_passes_the_check_and_trains() -> None:
    checks = train().checks
    assert {item.weight.rpartition(".")[2] for item in checks} == {"down", "up"}
    assert all(item.agrees for item in checks)


def test_a_wrong_gradient_behind_the_rounding_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(table.RULES, "Tanh", table.RULES["Sigmoid"])
    with pytest.raises(GradientError, match="the gradient of"):
        train()


def test_what_is_cut_off_stays_cut_off() -> None:
    model = quantised()
    smooth = cut_off_alone(model)
    assert smooth is not None
    x = np.concatenate([SAMPLES["x"], 1000 * SAMPLES["x"]])
    (weight,) = (numpy_helper.to_array(t) for t in model.proto.graph.initializer[:1])
    between = np.clip(x @ weight, (-0.5 - 125) * 0.4, (255.5 - 125) * 0.4)
    np.testing.assert_allclose(run(smooth, {"x": x})[0], np.tanh(between), atol=1e-6)


def test_a_range_for_each_channel_is_left_as_it_is() -> None:
    each = "float[4] s = {0.4, 0.5, 0.6, 0.7}, uint8[4] z = {1, 2, 3, 4}"
    model = quantised(each)
    onnx.checker.check_model(model.proto)
    assert cut_off_alone(model) is None
