"""Normalisations that older exports spell out, against what ONNX Runtime computes."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper
from sites_models import model
from slot_formula import WIDTH, run_nodes, slot_of_case

import onnx_adapt as oa
from onnx_adapt.graph.index import index_model
from onnx_adapt.graph.norms import BaseNorm, find_norms

X = np.random.default_rng(3).standard_normal((2, 3, 8)).astype(np.float32) * 3 + 1
CONSTANTS = """
  two = Constant<value = float {2}>()
  one = Constant<value = float {1}>()
  e = Constant<value = float {0.01}>()
"""
MEAN = "m = ReduceMean<axes = [-1]>(x)\n c = Sub(x, m)\n"
VARIANCE = "s = Pow(c, two)\n v = ReduceMean<axes = [-1]>(s)\n"
ROOT = "a = Add(v, e)\n r = Sqrt(a)\n d = Div(c, r)\n"
FORMS = {
    "TorchScript": MEAN + VARIANCE + ROOT + "p = Mul(d, g)\n y = Add(p, b)",
    "the other way round": MEAN
    + VARIANCE
    + "a = Add(e, v)\n r = Sqrt(a)\n d = Div(c, r)\n p = Mul(g, d)\n y = Add(b, p)",
    "a square by Mul": MEAN
    + "s = Mul(c, c)\n v = ReduceMean<axes = [2]>(s)\n"
    + ROOT
    + "p = Mul(d, g)\n y = Add(p, b)",
    "centred twice": MEAN
    + "n = ReduceMean<axes = [-1]>(x)\n k = Sub(x, n)\n s = Pow(k, two)\n"
    + "v = ReduceMean<axes = [-1]>(s)\n"
    + ROOT
    + "p = Mul(d, g)\n y = Add(p, b)",
    "without a bias": MEAN + VARIANCE + ROOT + "y = Mul(d, g)",
    "RMSNorm": "s = Pow(x, two)\n v = ReduceMean<axes = [-1]>(s)\n a = Add(v, e)\n"
    "r = Sqrt(a)\n q = Reciprocal(r)\n d = Mul(x, q)\n y = Mul(g, d)",
    "RMSNorm by a quotient": "s = Mul(x, x)\n v = ReduceMean<axes = [-1]>(s)\n"
    "a = Add(v, e)\n r = Sqrt(a)\n q = Div(one, r)\n d = Mul(q, x)\n y = Mul(d, g)",
    "one node": "y = LayerNormalization<axis = -1, epsilon = 0.01>(x, g, b)",
}
OTHERS = {
    "over another axis": FORMS["TorchScript"].replace("[-1]", "[1]"),
    "over two axes": FORMS["TorchScript"].replace("[-1]", "[1, 2]"),
    "of a cube": FORMS["TorchScript"].replace("Pow(c, two)", "Pow(c, one)"),
    "of another tensor": FORMS["TorchScript"].replace("Pow(c, two)", "Pow(x, two)"),
    "without a root": FORMS["TorchScript"].replace("Sqrt(a)", "Identity(a)"),
    "a plain scale": "y = Mul(x, g)",
    "a quotient": "d = Div(x, two)\n y = Mul(d, g)",
    "two over the root": FORMS["RMSNorm by a quotient"].replace("Div(one, r)", "Div(two, r)"),
}


def _model(body: str) -> oa.Model:
    text = f"g (float[2,3,8] x) => (float[2,3,8] y) {{{CONSTANTS}{body}\n}}"
    return model(text, "g 8", "b 8")


def _norms(body: str) -> list[BaseNorm]:
    made = _model(body)
    return list(find_norms(made, index_model(made).main))


@pytest.mark.parametrize("form", FORMS)
def test_a_normalisation_is_found_however_it_is_written(form: str) -> None:
    (norm,) = _norms(FORMS[form])
    assert (norm.read, norm.output) == ("x", "y")
    weights = np.arange(8, dtype=np.float64) % 7 + 1
    centred = "RMS" not in form
    assert (norm.weight_tensor, norm.centred) == ("g", centred)
    assert norm.epsilon == pytest.approx(0.01)
    biased = form not in ("without a bias", "RMSNorm", "RMSNorm by a quotient")
    assert norm.bias_tensor == ("b" if biased else "")
    session = ort.InferenceSession(_model(FORMS[form]).proto.SerializeToString())
    x = X.astype(np.float64) - (X.mean(-1, keepdims=True) if centred else 0)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.01) * weights
    expected += weights if biased else 0
    np.testing.assert_allclose(session.run(None, {"x": X})[0], expected, 1e-5, 1e-5)


@pytest.mark.parametrize("form", OTHERS)
def test_arithmetic_that_only_looks_like_a_normalisation_is_none(form: str) -> None:
    assert _norms(OTHERS[form]) == []


@pytest.mark.parametrize("opset", [11, 14, 17])
@pytest.mark.parametrize("attributes", [{}, {"axis": -1, "epsilon": 1e-4}])
def test_a_normalisation_without_a_bias_means_the_same_in_every_opset(
    attributes: dict[str, Any], opset: int
) -> None:
    """Optimised models have the operator in opsets before its first."""
    rng = np.random.default_rng(7)
    shapes = {"t": (2, 4, WIDTH), "g": (WIDTH,), "down": (WIDTH, 3), "up": (3, WIDTH)}
    t, g, down, up = (rng.standard_normal(s).astype(np.float32) for s in shapes.values())
    t *= np.float32(0.003)  # a variance of about epsilon
    node = helper.make_node("LayerNormalization", ["s", "g"], ["n"], "ln", **attributes)
    feeds = {"t": t, "g": g, "adapter.s.down": down, "adapter.s.up": up}
    centred = t.astype(np.float64) - t.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    read = centred / np.sqrt(variance + attributes.get("epsilon", 1e-5)) * g
    got = run_nodes(slot_of_case("base_norm"), opset, feeds, node)
    np.testing.assert_allclose(got, t + np.maximum(read @ down, 0) @ up, 1e-4, 1e-5)
