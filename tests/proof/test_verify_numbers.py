"""The numbers of `verify`: right models pass for the right reason, wrong ones do not."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from slot_models import MLP, MODELS, dense, model_of, node_of, passes

import onnx_adapt as oa
from onnx_adapt.edit.weights import fill_weights
from onnx_adapt.model.file import Model


def _everywhere(base: Model) -> list[str]:
    sites = oa.find_sites(base, all_tensors=True)
    return [site.address for site in sites if site.refused is None]


def _off(report: oa.Report) -> str:
    return next(check.detail for check in report.checks if check.name == "off")


@pytest.mark.parametrize("name", ["plcmos", "silero-vad-ifless"])
def test_slots_at_every_site_of_a_real_model_at_once_are_the_formula(name: str) -> None:
    base = oa.open_model(MODELS / f"{name}.onnx")
    after = _everywhere(base)
    report = passes(base, oa.insert(base, after=after))
    assert len(report.slots) == len(after) > 40
    assert all(0 <= slot.ratio <= 1 for slot in report.slots)


def test_an_output_near_zero_is_no_difference() -> None:
    """Each output is a difference of equal sums: what is left is rounding."""
    width = 64
    w = np.random.default_rng(0).standard_normal((width, 1)).astype(np.float32)
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[3,{2 * width}] x) => (float[3,1] y)
    <float[{2 * width},1] w = {{{", ".join(["1"] * 2 * width)}}}> {{
      [first] y = MatMul(x, w) }}""")
    base.proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.concatenate([w, -w]), "w")
    )
    half = np.random.default_rng(1).standard_normal((3, width)).astype(np.float32)
    x = np.concatenate([half, half * np.float32(1 + 1e-6)], 1)
    report = passes(base, oa.insert(base, after="first"), inputs={"x": x})
    assert report.slots[0].ratio <= 1


def test_rows_of_minus_infinity_in_an_embedding_are_the_bases_own() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (int64[n] ids) => (float[n,4] y) <{dense("w1")}, float[3,4] table = {{
      {", ".join(["0.5", "-1", "2", "0.25"] * 3)}}}> {{
      [first] e = Gather(table, ids)  [second] a = MatMul(e, w1)  y = Exp(a) }}""")
    table = next(t for t in base.proto.graph.initializer if t.name == "table")
    rows = numpy_helper.to_array(table).copy()
    rows[1] = -np.inf
    table.CopyFrom(numpy_helper.from_array(rows, "table"))
    adapted = oa.insert(base, after=["first", "second"])
    report = passes(base, adapted, inputs={"ids": np.array([0, 1, 2])})
    assert all(slot.ratio is not None for slot in report.slots)
    nothing = oa.verify(base, adapted, inputs={"ids": np.array([1, 1])})
    assert not nothing.passed
    assert "reads no finite number" in nothing.warnings[0]


def test_a_slot_behind_the_root_of_what_random_weights_make_negative_is_judged_alone() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}> {{
      [first] a = Mul(x, x)  r = Sqrt(a)  [second] b = MatMul(r, w1)  y = Tanh(b) }}""")
    adapted = oa.insert(base, after=["first", "second"])
    report = passes(base, adapted)
    assert all(slot.ratio <= 1 for slot in report.slots)
    node_of(adapted, "adapter.second/act").op_type = "Abs"
    wrong = oa.verify(base, adapted)
    assert "'second'" in next(c.detail for c in wrong.checks if c.name == "on")
    assert wrong.slots[1].ratio > 10


@pytest.mark.parametrize("bounds", [-30, 30])
def test_a_weight_in_the_graph_a_few_bounds_off_fails(bounds: int) -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first", parts=("down", "up", "gain"))
    report = passes(base, adapted)
    tensor = numpy_helper.from_array(
        np.float32([1 + bounds * report.slots[0].tolerance]), "moved"
    )
    adapted.proto.graph.initializer.append(tensor)
    place = list(adapted.proto.graph.node).index(node_of(adapted, "adapter.first/gained"))
    node = adapted.proto.graph.node[place]
    scaled = onnx.helper.make_node("Mul", [node.input[0], "moved"], ["moving"], "moving")
    adapted.proto.graph.node.insert(place, scaled)
    adapted.proto.graph.node[place + 1].input[0] = "moving"
    wrong = oa.verify(base, adapted)
    assert "on" in {check.name for check in wrong.checks if not check.passed}
    assert wrong.slots[0].ratio > 1


def _cnn() -> Model:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float16[n,3,16,16] x) => (float16[n,8,16,16] y) {
      [one] a = Conv<pads = [1,1,1,1]>(x, w1, b)  r = Relu(a)
      [two] c = Conv<pads = [1,1,1,1]>(r, w2, b)  s = Add(c, r)  y = Sigmoid(s) }""")
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (8, 3, 3, 3)), ("w2", (8, 8, 3, 3)), ("b", (8,))):
        value = (rng.standard_normal(shape) / 4).astype(np.float16)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return Model(proto)


def test_a_float16_network_of_convolutions_is_among_the_roundings_of_its_base() -> None:
    base = _cnn()
    adapted = oa.insert(base, after=["one", "two"])
    report = passes(base, adapted)
    assert _off(report).startswith("float16: ")
    assert all(0 < slot.ratio <= 1 for slot in report.slots)


def test_a_float16_model_that_is_more_than_rounding_off_fails() -> None:
    base = _cnn()
    adapted = oa.insert(base, after=["one", "two"])
    tensor = next(t for t in adapted.proto.graph.initializer if t.name == "b")
    value = numpy_helper.to_array(tensor) + np.float16(0.05)
    tensor.CopyFrom(numpy_helper.from_array(value, "b"))
    report = oa.verify(base, adapted)
    assert {"off", "graph"} <= {check.name for check in report.checks if not check.passed}
    assert "roundings, which are only" in _off(report)


QUANTISED = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,4] y) <{dense("w1")}, {dense("w2", seed=1)},
  float scale = {{0.05}}, int8 zero = {{0}}> {{
  q = QuantizeLinear(x, scale, zero)  d = DequantizeLinear(q, scale, zero)
  [first] a = MatMul(d, w1)  r = Relu(a)  p = QuantizeLinear(r, scale, zero)
  e = DequantizeLinear(p, scale, zero)  [second] y = MatMul(e, w2) }}"""


def test_a_quantised_model_one_step_off_fails() -> None:
    base = model_of(QUANTISED)
    adapted = oa.insert(base, after="first")
    assert "unoptimised" in _off(passes(base, adapted))
    tensor = next(t for t in adapted.proto.graph.initializer if t.name == "scale")
    tensor.CopyFrom(numpy_helper.from_array(np.float32(0.0501), "scale"))
    report = oa.verify(base, adapted)
    assert "where not one bit may differ" in _off(report)


def test_what_is_the_same_is_said_without_a_limit() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first")
    assert _off(passes(base, adapted)) == "float32: bit for bit, unoptimised and optimised"
    filled = fill_weights(adapted, {"first": {"down": np.ones((4, 2)), "up": np.ones((2, 4))}})
    assert _off(passes(base, filled)) == "float32: bit for bit, unoptimised and optimised"
