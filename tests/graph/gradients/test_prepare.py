"""What is differentiated computes what the model does, raised and with fused nodes lowered."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from exact_options import exact_options
from onnx import parser

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.export import require_feeds
from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients.opsets import raise_opset
from onnx_adapt.graph.gradients.prepare import prepare
from onnx_adapt.ort import CPU
from onnx_adapt.proof.inputs import inputs_for
from onnx_adapt.proof.runner import Runner
from onnx_adapt.training.session import TrainingSession
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_model import make_step

PIPELINES = Path(__file__).parents[2] / "pipelines"


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("phi3/genai/model.onnx", "GroupQueryAttention"),
        ("bert/ort_all/model.onnx", "Attention"),
        ("bert/qattention/model.onnx", "QAttention"),
        ("bert/qoperator/model.onnx", "QLinearMatMul"),
        ("gpt2/optimum_o2/model.onnx", "Attention"),
    ],
)
def test_a_lowered_model_computes_the_same(name: str, fused: str) -> None:
    base = oa.open_model(PIPELINES / name)
    first = next(s for s in oa.find_sites(base) if s.refused is None and s.width)
    adapted = oa.insert(base, after=first.address)
    output = next(v.name for v in base.proto.graph.output if v.name not in ("present",))
    weights = [oa.list_slots(adapted)[0].weight(part) for part in ("down", "up")]
    prepared = prepare(require_feeds(adapted), [output], weights)
    read = {item for node in prepared.proto.graph.node for item in node.input}
    left = [node for node in prepared.proto.graph.node if node.op_type == fused]
    assert not any(node.output[0] in read for node in left)
    for feeds in inputs_for(base):
        wanted = Runner(base, CPU, optimised=True).run(feeds, [output])[output]
        made = Runner(prepared, CPU, optimised=True).run(feeds, [output])[output]
        np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


OLD = """
<ir_version: 4, opset_import: ["": 9]>
g (float[2, 3, 4, 4] x) => (float[a, b] y)
<float[3] s = {1, 2, 3}, float[3] t = {0.5, 0.1, 0.2}, float[4] up = {1, 1, 2, 2}> {
  a = BatchNormalization <momentum = 0.9> (x, s, t, t, s)
  b = Clip <min = -1.0, max = 1.5> (a)
  c = Pad <pads = [0, 0, 1, 0, 0, 0, 0, 2], value = 0.5> (b)
  d = Slice <axes = [2, 3], starts = [0, 1], ends = [-1, 5]> (c)
  e = Upsample <mode = "nearest"> (d, up)
  f, g = Split <axis = 1, split = [1, 2]> (e)
  h = ReduceSum <axes = [1], keepdims = 0> (g)
  i = Unsqueeze <axes = [1]> (h)
  j = Add (f, i)
  k = Dropout <ratio = 0.3> (j)
  l = Softmax <axis = 2> (k)
  m, n = TopK <axis = 3, k = 2> (l)
  o = Squeeze <axes = [1]> (m)
  y = Flatten (o)
}
"""


def _run(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> Array:
    options = exact_options()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, dict(feeds))[0])


def test_a_raised_model_computes_the_same() -> None:
    proto = parser.parse_model(OLD)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    raised = raise_opset(oa.Model(proto))
    assert raised.proto.opset_import[0].version == 17
    onnx.checker.check_model(raised.proto)
    np.testing.assert_allclose(_run(raised.proto, {"x": x}), _run(proto, {"x": x}), rtol=1e-6)


@pytest.mark.parametrize(
    ("opset", "attribute", "words"),
    [
        (6, "momentum = 0.9", "uses opset 6"),
        (8, "spatial = 0", "statistics for each position"),
    ],
)
def test_what_cannot_be_raised_is_said(opset: int, attribute: str, words: str) -> None:
    text = OLD.replace('"": 9', f'"": {opset}').replace("momentum = 0.9", attribute)
    with pytest.raises(GradientError, match=words):
        raise_opset(oa.Model(parser.parse_model(text)))


# Gradients of a float16 model, whose loss is multiplied by a small number.


def _gradients(name: str, scale: float) -> dict[str, Array]:
    base = oa.open_model(PIPELINES / "bert" / name / "model.onnx")
    places = ("0.intermediate.dense", "1.output.dense", "0.attention.self.query")
    adapted = oa.insert(
        base, after=[f"bert.encoder.layer.{place}" for place in places], activation="gelu"
    )
    names = sorted(weights_to_train(adapted, 4, None, 0))
    step = make_step(
        adapted,
        names,
        loss=lambda tape, output, _: tape.times(
            tape.add("ReduceMean", tape.add("Mul", output, output), keepdims=0), scale
        ),
    )
    rng = np.random.default_rng(3)
    shapes = weights_to_train(adapted, 4, None, 0)
    weights = {key: rng.standard_normal(shapes[key].shape) * 0.02 for key in names}
    ids = rng.integers(1, 60, (4, 6))
    feeds = {key: ids * 0 + (key != "token_type_ids") for key in step.inputs}
    feeds |= {"input_ids": ids, **weights, step.labels: np.zeros((4, 3))}
    found = TrainingSession(step.model, CPU).run(feeds, list(step.grads.values()), "a batch")
    return {weight: found[output] for weight, output in step.grads.items()}


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_small_gradients_of_a_float16_model_are_not_lost(scale: float) -> None:
    wanted, made = _gradients("optimum", scale), _gradients("optimum_fp16", scale)
    for key, grad in made.items():
        assert grad.dtype == np.float32
        apart = np.linalg.norm(grad - wanted[key]) / np.linalg.norm(wanted[key])
        assert apart < 0.01, key


def test_a_layer_before_recurrent_ones_gets_gradients() -> None:
    """Their optional inputs are left out; an old opset and an unknown rank are on the way."""
    base = oa.open_model(Path(__file__).parents[3] / "models/plcmos.onnx")
    adapted = oa.insert(base, after="input")
    weights = list(weights_to_train(adapted, 4, None, 0))
    step = make_step(adapted, weights, loss="mse")
    assert list(step.grads) == weights
