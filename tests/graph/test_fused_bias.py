"""A layer whose bias an optimiser moved into a later node: written out, or refused."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from sites_models import chosen, every, layers, model, over
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.edit.unfuse import unfused_nodes
from onnx_adapt.errors import SiteRefusedError
from onnx_adapt.graph.resolve import find_sites

WRITTEN_OUT = """
Gelu       | y = com.microsoft.BiasGelu(h, b)                                        | h
fast Gelu  | y = com.microsoft.FastGelu(h, b)                                        | h
split      | y = com.microsoft.BiasSplitGelu(h, b)                                   | h
add        | y = com.microsoft.BiasAdd(h, b, s)                                      | h
dropout    | y = com.microsoft.BiasDropout(h, b, s)                                  | h
norm       | y = com.microsoft.SkipLayerNormalization(h, s, g, g, b)                 | h
skip       | y = com.microsoft.SkipLayerNormalization(s, h, g, g, b)                 | h
simple     | y = com.microsoft.SkipSimplifiedLayerNormalization(h, s, g, b)          | h
query      | y = com.microsoft.MultiHeadAttention<num_heads=2>(h, s, s, qkv)         | h
value      | y = com.microsoft.MultiHeadAttention<num_heads=2>(s, s, h, qkv)         | h
"""
KEPT = """
softmax    | y = com.microsoft.BiasSoftmax<axis = 2, is_inner_broadcast = 1>(h, b)   | h
reshaped   | r = Reshape(h, to) y = com.microsoft.BiasGelu(r, b)                     | h
cast       | r = Cast<to = 1>(h) y = com.microsoft.BiasGelu(r, b)                     | h
"""
WEIGHTS = ("w 4 8", "b 8", "g 8", "qkv 24")


def _fused(node: str) -> oa.Model:
    """A Linear called fc, and what swallowed its bias."""
    results = "float[n,3,O] y, float[n,3,O] z" if "z =" in node else "float[n,3,O] y"
    return model(
        f"""g (float[n,3,4] x, float[n,3,8] s) => ({results})
        <int64[3] to = {{0, 0, 8}}, float[8] zero = {{0, 0, 0, 0, 0, 0, 0, 0}},
         float[24] for_keys = {{{", ".join(["0"] * 8 + ["1"] * 8 + ["0"] * 8)}}}>
        {{ [fc] h = MatMul(x, w)  {node} }}""",
        *WEIGHTS,
    )


def _named(made: oa.Model, **names: str) -> oa.Model:
    """Name nodes by their first output: the text of a model has no place for a slash."""
    for node in made.proto.graph.node:
        node.name = names.get(node.output[0], node.name)
    return made


@over("node tensor", KEPT)
def test_a_layer_is_refused_before_its_bias_and_the_tensor_is_not(
    node: str, tensor: str
) -> None:
    made = _fused(node)
    with pytest.raises(SiteRefusedError, match=r"before its bias 'b'") as caught:
        oa.insert(made, after="fc")
    assert "as it was exported" in str(caught.value.hint)
    assert f"--after 'main:{tensor}'" in str(caught.value.hint)
    for name in (f"main:{tensor}", tensor):
        (slot,) = oa.list_slots(oa.insert(made, after=name))
        assert (slot.tensor, slot.width) == ("h", 8)


@over("node tensor", WRITTEN_OUT)
def test_a_layer_gets_its_slot_behind_its_bias_and_the_tensor_before_it(
    node: str, tensor: str
) -> None:
    made = _fused(node)
    assert layers(made)["h"].reason is None
    adapted = oa.insert(made, after="fc")
    (slot,) = oa.list_slots(adapted)
    assert slot.width == 8
    (add,) = (node for node in adapted.proto.graph.node if slot.inner in node.output)
    assert add.op_type == "Add"
    assert "h" in add.input
    assert oa.remove(adapted).proto == made.proto
    for name in (f"main:{tensor}", tensor):
        literal = oa.insert(made, after=name)
        assert [slot.tensor for slot in oa.list_slots(literal)] == ["h"]
        assert not unfused_nodes(literal)


@over(
    "node",
    """
    no bias     | y = com.microsoft.FastGelu(h)
    norm alone  | y = com.microsoft.SkipLayerNormalization(h, s, g, g)
    another     | y = com.microsoft.SkipLayerNormalization(s, s, g, g, b) z = Relu(h)
    read twice  | y = com.microsoft.BiasGelu(h, b) z = Tanh(h)
    zeros       | y = com.microsoft.BiasGelu(h, zero)
    fed         | y = com.microsoft.BiasGelu(h, s)
    zero query  | y = com.microsoft.MultiHeadAttention<num_heads=2>(h, s, s, for_keys)
    """,
)
def test_a_layer_that_keeps_its_output_is_not_refused(node: str) -> None:
    made = _fused(node)
    assert layers(made)["h"].reason is None
    assert [choice.site.tensor for choice in chosen(made, "fc")] == ["h"]


def test_a_layer_with_a_bias_of_its_own_is_not_refused() -> None:
    made = model(
        """g (float[n,4] x) => (float[n,8] y)
        { [fc] h = Gemm(x, w, b)  y = com.microsoft.BiasGelu(h, b) }""",
        *WEIGHTS,
    )
    assert layers(made)["h"].reason is None


def test_what_a_quantised_product_is_rescaled_to_is_no_output_of_its_module() -> None:
    made = model(
        """g (float[n,4] x) => (float[n,8] y) {
        q, e, z = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, z)  c = Cast<to = 1>(i)
        f = Mul(e, d)  h = Mul(c, f)  y = com.microsoft.BiasGelu(h, b) }""",
        "w 4 8 int8",
        "d",
        "b 8",
    )
    _named(made, q="/up/Q", i="/up/M", c="/up/C", f="/up/S", h="/up/R", y="/act/G")
    (slot,) = oa.list_slots(oa.insert(made, after="up"))
    assert slot.tensor == "unfused:y:bias"
    (slot,) = oa.list_slots(oa.insert(made, after="h"))
    assert slot.tensor == "h"


def test_a_glob_leaves_out_the_layers_before_their_bias(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = model(
        """g (float[n,4] x) => (float[n,8] y) {
        h = MatMul(x, w)  k = com.microsoft.BiasSoftmax<axis = 1, is_inner_broadcast = 1>(h, b)
        y = MatMul(k, v) }""",
        "w 4 8",
        "b 8",
        "v 8 8",
    )
    _named(made, h="a.fc", y="b.fc")
    with caplog.at_level(logging.WARNING):
        (slot,) = oa.list_slots(oa.insert(made, after="*.fc"))
    assert slot.tensor == "y"
    assert "before its bias 'b'" in caplog.text


def test_the_table_of_sites_says_why() -> None:
    made = _fused("y = com.microsoft.BiasSoftmax<axis = 2, is_inner_broadcast = 1>(h, b)")
    (row,) = [site.as_dict() for site in find_sites(made) if site.tensor == "h"]
    assert "before its bias 'b'" in str(row["refused"])
    assert every(made)["y"].reason is None


def test_a_module_whose_activation_is_in_its_node_has_its_output_written_out() -> None:
    made = model(
        """g (float[n,4] x) => (float[n,8] y)
        { y = com.microsoft.FusedGemm<activation = "Relu">(x, w, b) }""",
        *WEIGHTS,
    )
    _named(made, y="/fc/Gemm")
    adapted = oa.insert(made, after="fc")
    ops = [node.op_type for node in adapted.proto.graph.node]
    assert (ops[0], ops[-1]) == ("Gemm", "Relu")
    assert oa.remove(adapted).proto == made.proto
    literal = oa.insert(made, after="/fc/Gemm")
    assert not unfused_nodes(literal)


def test_a_module_whose_activation_nobody_knows_has_no_output_of_its_own() -> None:
    made = model(
        """g (float[n,4] x) => (float[n,8] y)
        { y = com.microsoft.FusedGemm<activation = "Mystery">(x, w, b) }""",
        *WEIGHTS,
    )
    _named(made, y="/fc/Gemm")
    with pytest.raises(SiteRefusedError, match="its activation is 'Mystery'") as caught:
        oa.insert(made, after="fc")
    assert caught.value.hint


def test_what_onnx_runtime_fused_takes_an_adapter_behind_the_bias(tmp_path: Path) -> None:
    """ONNX Runtime's own fusions, run here on a model with a known place for each bias."""
    made = model(
        """g (float[n,3,4] x) => (float[n,3,8] y) {
        two = Constant<value_float = 1.4142135>()  one = Constant<value_float = 1.0>()
        half = Constant<value_float = 0.5>()  h = MatMul(x, w)  a = Add(h, b)
        q = Div(a, two)  e = Erf(q)  o = Add(e, one)  m = Mul(a, o)  y = Mul(m, half) }""",
        "w 4 8",
        "b 8",
    )
    _named(made, h="/fc/MatMul", a="/fc/Add")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    place = tmp_path / "fused.onnx"
    options.optimized_model_filepath = str(place)
    ort.InferenceSession(
        made.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    fused = oa.open_model(place)
    assert "BiasGelu" in {node.op_type for node in fused.proto.graph.node}
    adapted = oa.insert(fused, after="fc")
    oa.verify(fused, adapted).raise_for_mismatch()
    numbers = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    outputs = []
    for one in (adapted, oa.insert(made, after="fc")):
        (slot,) = oa.list_slots(one)
        parts = {"down": numbers[0], "up": numbers[1]}
        outputs += run(one, {"x": x, **{slot.weight(p): v for p, v in parts.items()}})
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    assert oa.remove(adapted).proto == fused.proto
