"""An operator without a rule is named, with what trains all the same."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

import onnx_adapt as oa
from onnx_adapt.errors import GradientError
from onnx_adapt.training.gradient_proof import check_gradient_nodes

LOOP = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y)
<float[4] one = {1, 1, 1, 1}, int64 three = {3}> {
  a = Gemm(x, w, one)
  b = Loop(three, , a) <body = inside (int64 i, bool c, float[n, 4] s)
    => (bool d, float[n, 4] t) { d = Identity(c) t = Tanh(s) }>
  e = Gemm(b, v, one)
  y = Tanh(e)
}
"""
DATA = {"x": np.ones((8, 4), np.float32), "labels": np.ones((8, 4), np.float32)}


def _base(text: str) -> oa.Model:
    proto = parser.parse_model(text)
    matrix = np.eye(4, dtype=np.float32)
    proto.graph.initializer.extend(numpy_helper.from_array(matrix, name) for name in "wv")
    return oa.Model(proto)


def test_a_loop_is_named_with_the_layers_behind_it() -> None:
    adapted = oa.insert(_base(LOOP), after="a")
    with pytest.raises(GradientError, match="no gradient for operator Loop") as caught:
        oa.train(adapted, DATA, loss="mse")
    assert "slots behind it train, such as at 'e'" in caught.value.hint


def test_the_slots_that_train_are_named() -> None:
    adapted = oa.insert(_base(LOOP), after=["a", "e"])
    last = oa.list_slots(adapted)[1].name
    with pytest.raises(GradientError, match="Loop") as caught:
        oa.train(adapted, DATA, loss="mse")
    assert f"without the others train {last!r}" in caught.value.hint


def test_nothing_behind_an_operator_without_a_rule_is_said() -> None:
    text = LOOP.replace("e = Gemm(b, v, one)", "e = Identity(b)").replace(
        "float[4, 4] v, ", ""
    )
    with pytest.raises(GradientError, match="Loop") as caught:
        oa.train(oa.insert(_base(text), after="a"), DATA, loss="mse")
    assert "no layer is behind it" in caught.value.hint


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_a_slot_before_steps_is_refused_by_training_and_by_the_proof(kind: str) -> None:
    proto = parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        g ({kind}[n, 4] x) => ({kind}[n, 4] y) {{ a = MatMul(x, w) y = Round(a) }}
    """)
    matrix = np.eye(4, dtype=np.float32 if kind == "float" else np.float16)
    proto.graph.initializer.append(numpy_helper.from_array(matrix, "w"))
    adapted = oa.insert(oa.Model(proto), after="a")
    with pytest.raises(GradientError, match="made of steps"):
        oa.train(adapted, DATA, loss="mse")
    check = check_gradient_nodes(adapted)
    assert not check.passed
    assert "made of steps" in check.detail
