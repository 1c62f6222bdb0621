"""Types and shapes follow from inputs and weights; what a model records never decides."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper
from sites_models import every, layers, weight

import onnx_adapt as oa
from onnx_adapt.graph.index import index_model
from onnx_adapt.proof.checker import complaints, new_complaints


def _model(graph: str, *weights: str, opset: int = 17, ir: int = 8) -> onnx.ModelProto:
    """A model that need not pass the checker."""
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    proto = onnx.parser.parse_model(head + graph)
    proto.graph.initializer.extend(map(weight, weights))
    return proto


def _proven(proto: onnx.ModelProto, *after: str) -> oa.Model:
    """Insert, verify, remove."""
    before = proto.SerializeToString()
    base = oa.Model(proto)
    adapted = oa.insert(base, after=after)
    assert [(c.name, c.detail) for c in oa.verify(base, adapted).checks if not c.passed] == []
    assert oa.remove(adapted).proto.SerializeToString() == before
    return adapted


STALE = {
    "batch made dynamic": "float[1,4,6] h",
    "classes changed": "float[b,4,10] h",
    "rank wrong": "float[b,6] h",
    "symbols collide": "float[b,b,b] h",
}


@pytest.mark.parametrize("record", STALE.values(), ids=STALE)
def test_a_wrong_record_changes_neither_the_site_nor_the_proof(record: str) -> None:
    proto = _model(
        f"""g (float[b,4,8] x) => (float[b,4,3] y) <{record}>
        {{ [fc] h = MatMul(x, w)  [two] y = MatMul(h, v) }}""",
        "w 8 6",
        "v 6 3",
    )
    if "b,6" in record or "10" in record:  # ONNX Runtime does not load these
        site = layers(oa.Model(proto))["h"]
    else:
        site = layers(oa.insert(oa.Model(proto), after="two"))["h"]
        _proven(proto, "fc", "two")
    assert (site.width, site.rank, site.dtype) == (6, 3, "float32")


def test_a_record_of_the_wrong_type_is_not_used() -> None:
    proto = _model(
        """g (float[b,8] x) => (float[b,6] y) <float16[b,6] h>
        { [fc] h = MatMul(x, w)  y = Relu(h) }""",
        "w 8 6",
    )
    assert layers(oa.Model(proto))["h"].dtype == "float32"


def test_the_width_of_an_output_is_the_weights_and_not_the_record() -> None:
    proto = _model("g (float[b,8] x) => (float[b,10] y) { [fc] y = MatMul(x, w) }", "w 8 6")
    assert layers(oa.Model(proto))["y"].width == 6
    _proven(proto, "fc")


def test_wrong_records_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    proto = _model(
        """g (float[b,8] x) => (float[b,6] y) <float[1,6] h, float[b,10] k>
        { [fc] h = MatMul(x, w)  k = Relu(h)  y = Tanh(k) }""",
        "w 8 6",
    )
    with caplog.at_level(logging.WARNING):
        oa.insert(oa.Model(proto), after="fc")
    (said,) = caplog.messages
    assert "float32[1, 6] for 'main:h'" in said
    assert "float32[b, 6]" in said
    assert "1 more" in said


@pytest.mark.parametrize("record", ["float[b,6] h", "float[n,6] h", "float[?,6] h"])
def test_records_that_can_be_true_are_not_complained_of(
    record: str, caplog: pytest.LogCaptureFixture
) -> None:
    graph = f"""g (float[b,8] x) => (float[m,6] y) <{record}>
    {{ [fc] h = MatMul(x, w)  y = Relu(h) }}"""
    with caplog.at_level(logging.WARNING):
        oa.find_sites(oa.Model(_model(graph, "w 8 6")))
    assert caplog.messages == []


def test_the_record_of_an_operator_that_nobody_knows_is_used_for_what_follows() -> None:
    proto = _model(
        """g (float[b,8] x) => (float[b,6] y) <float[b,6] h>
        { h = nobody.Knows(x)  k = Relu(h)  y = Tanh(k) }"""
    )
    proto.opset_import.add(domain="nobody", version=1)
    assert every(oa.Model(proto))["k"].width == 6


def test_a_wrong_record_in_a_branch_changes_nothing() -> None:
    proto = _model(
        """g (float[b,8] x, bool c) => (float[b,6] y) {
        [if] y = If(c) <then_branch = t () => (float[1,6] p)
          <float[1,6] q> { [one] q = MatMul(x, w)  p = Relu(q) },
          else_branch = e () => (float[1,6] r) { [other] r = MatMul(x, w) }> }""",
        "w 8 6",
    )
    adapted = _proven(proto, "one", "other", "if")
    shapes = {view.type_of("y").shape for view in index_model(adapted).views.values()}
    assert shapes == {("b", 6)}


def test_branches_that_use_the_same_names_are_told_apart() -> None:
    """ONNX takes the numbers in a shape by name, and those of one branch for the other's."""
    branch = """a () => (p) { s = Shape(x)  i = Constant<value_int = %d>()
      d = Gather(s, i)  u = Unsqueeze(d, zero)  k = Concat<axis = 0>(u, minus)
      p = Reshape(x, k) }"""
    proto = _model(
        f"""g (float[b,4,6] x, bool c) => (y) {{
        y = If(c) <then_branch = {branch % 1}, else_branch = {branch % 2}> }}""",
    )
    proto.graph.initializer.extend(
        [helper.make_tensor("zero", 7, [1], [0]), helper.make_tensor("minus", 7, [1], [-1])]
    )
    types = [view.type_of("p").shape for view in index_model(oa.Model(proto)).views.values()]
    assert [shape[0] for shape in types[1:] if shape] == [4, 6]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21, 23])
def test_stale_records_do_no_harm_at_any_opset(opset: int) -> None:
    proto = _model(
        """g (float[b,4,8] x) => (float[1,4,3] y) <float[1,4,6] h>
        { [fc] h = MatMul(x, w)  [two] y = MatMul(h, v) }""",
        "w 8 6",
        "v 6 3",
        opset=opset,
    )
    _proven(proto, "fc", "two")


def test_weights_that_had_to_be_inputs_keep_their_width_beside_a_stale_record() -> None:
    proto = _model(
        """g (float[b,8] x, float[8,6] w) => (float[1,6] y) <float[1,6] h>
        { [fc] h = MatMul(x, w)  y = Relu(h) }""",
        "w 8 6",
        opset=8,
        ir=3,
    )
    assert layers(oa.Model(proto))["h"].width == 6
    _proven(proto, "fc")


def test_nodes_out_of_order_take_slots() -> None:
    proto = _model(
        """g (float[b,8] x) => (float[b,6] y) {
        [fc] h = MatMul(c, w)  [r] r = Relu(h)  y = Cast<to = 1>(r)  c = Cast<to = 10>(x) }""",
        "w 8 6 float16",
    )
    adapted = _proven(proto, "fc", "r")
    assert {slot.dtype for slot in oa.list_slots(adapted)} == {"float16"}


def test_a_body_whose_weights_are_its_inputs_takes_slots_inside_and_behind() -> None:
    proto = _model(
        """g (float[b,6] x) => (float[b,6] y) {
        [loop] y = Loop(n, , x) <body = body (int64 i, bool c, float[b,6] v) =>
          (bool d, float[b,6] z) { [in] m = MatMul(v, w)  z = Tanh(m)  d = Identity(c) }> }""",
        "n 1 int64",
        opset=11,
        ir=4,
    )
    body = proto.graph.node[0].attribute[0].g
    body.initializer.append(weight("w 6 6"))
    body.input.append(helper.make_tensor_value_info("w", 1, [6, 6]))
    _proven(proto, "in", "loop")


def test_an_if_of_contrib_operators_takes_slots() -> None:
    proto = _model(
        """g (float[b,8] x, bool c) => (float[b,6] y) {
        [if] h = If(c) <then_branch = t () => (p) { p = com.microsoft.FusedMatMul(x, w) },
          else_branch = e () => (q) { q = com.microsoft.FusedMatMul(x, w) }>
        y = Relu(h) }""",
        "w 8 6",
    )
    adapted = _proven(proto, "if", "main/if.then_branch:p")
    recorded = [v for v in adapted.proto.graph.value_info if v.name == "adapter.if/target"]
    assert [value.type.tensor_type.elem_type for value in recorded] == [1]


def test_taps_see_what_the_model_computes_for_a_batch_it_does_not_record() -> None:
    """By hand: ones give 8 six times, and 48 from the adapter, six times behind it."""
    proto = _model(
        """g (float[b,2,8] x) => (float[1,2,3] y) <float[1,2,6] h, float[1,2,6] q>
        { [fc] h = MatMul(x, w)  q = Reshape(h, s)  [two] y = MatMul(q, v) }""",
    )
    for name, dims in (("w", (8, 6)), ("v", (6, 3))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(dims, "f"), name))
    proto.graph.initializer.append(helper.make_tensor("s", 7, [3], [-1, 2, 6]))
    adapted = _proven(proto, "fc")
    weights = {"down": np.ones((6, 1), "f"), "up": np.ones((1, 6), "f")}
    session = oa.AdapterSession(
        adapted, adapters={"a": oa.make_adapter(adapted, "a", {"fc": weights})}
    )
    with session:
        (y,) = session.run({"x": np.ones((3, 2, 8), "f")}, adapter="a").values()
    assert y.shape == (3, 2, 3)
    assert np.all(y == 6 * (8 + 48))


def test_a_complaint_about_a_record_is_the_same_when_it_moves_to_the_slot() -> None:
    proto = _model("g (float[b,8] x) => (float[b,10] y) { [fc] y = MatMul(x, w) }", "w 8 6")
    base = oa.Model(proto)
    adapted = oa.insert(base, after="fc")
    slots = oa.list_slots(adapted)
    (before,), (after,) = complaints(base), complaints(adapted, slots)
    assert "adapter.fc/" in after.words
    assert before.fault == after.fault
    assert new_complaints(base, adapted, slots) == []


def test_another_fault_at_the_same_place_is_new() -> None:
    proto = _model("g (float[b,8] x) => (float[b,10] y) { [fc] y = MatMul(x, w) }", "w 8 6")
    base = oa.Model(proto)
    adapted = oa.insert(base, after="fc")
    for value in adapted.proto.graph.input:
        if value.name == "adapter.fc.down":
            value.type.tensor_type.shape.dim[0].dim_value = 7
    assert new_complaints(base, adapted, oa.list_slots(adapted)) != []


def test_a_weight_without_a_type_is_a_complaint_and_no_traceback() -> None:
    proto = _model("g (float[b,8] x) => (float[b,6] y) { [fc] y = MatMul(x, w) }", "w 8 6")
    proto.graph.node.add(op_type="Constant", output=["k"]).attribute.append(
        helper.make_attribute("value", onnx.TensorProto(dims=[1]))
    )
    assert any("strict" in item.asked for item in complaints(oa.Model(proto)))
