"""One row says all about an operator with weights: no other table has to be told."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from sites_models import layers, model
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.checkpoints.modules.weights import read_bias, read_matrix
from onnx_adapt.graph.layers import is_module_call
from onnx_adapt.graph.operations import NodeRun
from onnx_adapt.graph.operators import OPERATORS, Operator, WeightLayout
from onnx_adapt.graph.sites import survey_model
from onnx_adapt.report.flops import flops, is_free

BLOCK_MATMUL = replace(
    OPERATORS["Gemm"], weight=2, data=1, bias=3, layout=WeightLayout.BY_TRANS_B
)
"""An operator that nobody has: ids of something, the data, the weight, a bias."""


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "BlockMatMul", BLOCK_MATMUL)


def _graph(call: str) -> oa.Model:
    return model(
        f"g (float[B,S,4] x) => (float[B,S,D] out) {{h = com.microsoft.{call} y = Add(h, a) "
        "out = com.microsoft.QuickGelu(y)}",
        *("w 6 4", "v 4 6", "b 6", "a 6"),
    )


def test_an_operator_that_is_not_in_the_table_is_no_layer() -> None:
    assert layers(_graph("BlockMatMul<transB=1>(x, x, w)")) == {}


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("call", ["BlockMatMul<transB=1>(x, x, w)", "BlockMatMul(x, x, v)"])
def test_a_new_row_makes_sites_with_width_axis_and_bias(call: str) -> None:
    (site,) = layers(_graph(call)).values()
    assert (site.op, site.tensor, site.width, site.axis) == ("BlockMatMul", "y", 6, -1)
    assert (site.dtype, site.refused) == ("float32", None)


@pytest.mark.usefixtures("_known")
def test_a_new_row_with_a_bias_inside_has_none_behind() -> None:
    (site,) = layers(_graph("BlockMatMul<transB=1>(x, x, w, b)")).values()
    assert (site.tensor, site.reason) == ("h", None)


@pytest.mark.usefixtures("_known")
def test_a_new_row_can_be_the_call_of_a_module() -> None:
    made = _graph("BlockMatMul<transB=1>(x, x, w, b)")
    survey = survey_model(made)
    node = survey.index.main.nodes[0]
    assert is_module_call(survey.index.main, node)
    call = survey.call(survey.index.main, node)
    assert (call.source, call.weight, call.output) == ("x", "w", "h")
    assert (call.sizes, call.stored_in_out) == ((4, 6), False)
    stored = {tensor.name: tensor for tensor in made.proto.graph.initializer}
    np.testing.assert_array_equal(read_matrix(made, call), numpy_helper.to_array(stored["w"]))
    np.testing.assert_array_equal(read_bias(made, call), numpy_helper.to_array(stored["b"]))


@pytest.mark.usefixtures("_known")
def test_the_operations_of_a_new_row_are_counted() -> None:
    shapes = ((5, 4), (5, 4), (6, 4), (6,))
    attributes: dict[str, Any] = {"transB": 1}
    ran = NodeRun("BlockMatMul", "com.microsoft", attributes, shapes, ((5, 6),))
    assert flops(ran) == 2 * 5 * 6 * 4 + 5 * 6


def test_a_row_with_a_column_missing_is_an_error() -> None:
    columns = {field.name: getattr(BLOCK_MATMUL, field.name) for field in fields(Operator)}
    for name in columns:
        with pytest.raises(TypeError, match=name):
            Operator(**{key: value for key, value in columns.items() if key != name})


@pytest.mark.parametrize("op", OPERATORS)
def test_every_row_counts_its_operations(op: str) -> None:
    attributes = {"equation": "abc,abc->abc"} if op == "Einsum" else {}
    count = 2 if op == "Einsum" else 9
    ran = NodeRun(op, "com.microsoft", attributes, ((2, 3, 4),) * count, ((2, 3, 4),))
    found = flops(ran)
    assert found is not None
    assert (found == 0) == is_free(op, "com.microsoft")


@pytest.mark.parametrize("layout", WeightLayout)
def test_every_layout_tells_the_width_of_what_is_made_or_that_it_cannot(
    layout: WeightLayout,
) -> None:
    attributes = {"K": 12, "N": 6, "hidden_size": 6, "group": 2, "equation": "abk,kj->abj"}
    node = helper.make_node("Any", ["x", "w"], ["y"], **attributes)
    dims = {
        WeightLayout.IN_OUT: (12, 6),
        WeightLayout.BY_TRANS_B: (12, 6),
        WeightLayout.BY_EQUATION: (12, 6),
        WeightLayout.CONV: (6, 6, 3),
        WeightLayout.CONV_TRANSPOSED: (12, 3, 3),
        WeightLayout.TABLE: (12, 6),
        WeightLayout.VECTOR: (6,),
    }.get(layout, ())
    reads, makes = replace(BLOCK_MATMUL, layout=layout).sizes(node, dims)
    silent = layout in (WeightLayout.GROUPS, WeightLayout.PACKED_TABLE)
    assert makes == (None if silent else 6)
    assert reads in (12, None) or layout is WeightLayout.VECTOR


def test_the_weight_of_a_transposed_fused_matmul_is_read_as_pytorch_has_it() -> None:
    text = "g (float[2,4] x) => (float[2,6] y) {y = com.microsoft.FusedMatMul<transB=1>(x, w)}"
    made = model(text, "w 6 4")
    survey = survey_model(made)
    call = survey.call(survey.index.main, survey.index.main.nodes[0])
    matrix = read_matrix(made, call)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(run(made, {"x": x})[0], x @ matrix.T)
    assert call.sizes == (4, 6)
