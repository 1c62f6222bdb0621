"""Fused nodes that are written out: hard neighbours, refusals, damage, and the way back."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from onnx import numpy_helper
from sites_models import model, over
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.edit.unfuse import unfused_nodes
from onnx_adapt.errors import SiteRefusedError, SlotError
from onnx_adapt.graph.fused_draft import FusedPlace
from onnx_adapt.graph.written_out import unfuse

WEIGHTS = ("w 4 8", "v 4 8", "b 8", "g 8", "qkv 24")
TWO = """g (float[n,3,4] x) => (float[n,3,8] y, float[n,3,8] z) {
    [one] h = MatMul(x, w)  y = com.microsoft.BiasGelu(h, b)
    [two] k = MatMul(x, v)  z = com.microsoft.BiasGelu(k, b) }"""
NORM = """g (float[n,3,4] x, float[n,3,8] s) => (float[n,3,8] y) { [fc] h = MatMul(x, w)
    y = com.microsoft.SkipLayerNormalization<epsilon = 0.1>(h, s, g, g, b) }"""


def ops(made: oa.Model) -> list[str]:
    """The operators of the base and of what stands for them, in order."""
    names = (node.op_type for node in made.proto.graph.node if "adapter." not in node.name)
    return list(names)


def test_of_two_nodes_that_share_a_bias_one_is_written_out() -> None:
    base = model(TWO, *WEIGHTS)
    adapted = oa.insert(base, after="one")
    assert ops(adapted) == ["MatMul", "Add", "Gelu", "MatMul", "BiasGelu"]
    oa.verify(base, adapted).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto


def test_a_node_is_fused_again_when_the_last_slot_that_needs_it_goes() -> None:
    base = model(TWO, *WEIGHTS)
    adapted = oa.insert(base, after=["one", "two", "two"])
    less = oa.remove(adapted, slots="one")
    assert ops(less) == ["MatMul", "BiasGelu", "MatMul", "Add", "Gelu"]
    assert ops(oa.remove(less, slots="two")) == ops(less)
    oa.verify(base, less).raise_for_mismatch()
    assert oa.remove(less).proto == base.proto


def test_a_node_is_fused_again_below_a_slot_that_does_not_need_it() -> None:
    base = model(TWO, *WEIGHTS)
    adapted = oa.insert(oa.insert(base, after="one"), after="main:y")
    less = oa.remove(adapted, slots="one")
    assert ops(less) == ["MatMul", "BiasGelu", "MatMul", "BiasGelu"]
    assert less.proto == oa.insert(base, after="main:y").proto
    assert oa.remove(less).proto == base.proto


def test_a_fused_node_with_a_slot_on_it_already_is_written_out_below_the_slot() -> None:
    base = model(TWO, *WEIGHTS)
    adapted = oa.insert(oa.insert(base, after="main:y"), after=["one", "main:h"])
    oa.verify(base, adapted).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto


def test_a_module_with_a_slot_on_its_product_gets_the_next_behind_the_bias() -> None:
    base = model(TWO, *WEIGHTS)
    base.proto.graph.node[0].name = "/one/MatMul"
    adapted = oa.insert(oa.insert(base, after="main:h"), after="one")
    assert [slot.tensor for slot in oa.list_slots(adapted)] == ["h", "unfused:y:bias"]
    (add,) = (n for n in adapted.proto.graph.node if n.op_type == "Add" and "b" in n.input)
    assert add.name.startswith("/one/")
    oa.verify(base, adapted).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto


def test_a_tensor_that_is_named_is_adapted_before_the_bias_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = model(TWO, *WEIGHTS)
    with caplog.at_level(logging.WARNING):
        adapted = oa.insert(base, after="main:h")
    assert not unfused_nodes(adapted)
    assert "main:h: the slot is on the product; it is before its bias 'b'" in caplog.text
    caplog.clear()
    oa.insert(base, after=["one", "main:y"])
    assert not caplog.text


def test_a_node_in_a_body_is_written_out_there() -> None:
    base = model(
        """g (float[n,3,4] x, bool c) => (float[n,3,O] y) { y = If(c) <
        then_branch = t () => (float[n,3,8] p)
        { [one] h = MatMul(x, w)  p = com.microsoft.BiasGelu(h, b) },
        else_branch = e () => (float[n,3,8] q)
        { [two] h2 = MatMul(x, v)  q = com.microsoft.MultiHeadAttention<num_heads = 2>(
          h2, h2k, h2v, qkv) }> }""".replace("h2k, h2v", "s, s").replace(
            "bool c)", "bool c, float[n,3,8] s)"
        ),
        *WEIGHTS,
    )
    adapted = oa.insert(base, after=["one", "two"])
    labels = [item.label for item in unfused_nodes(adapted)]
    assert len(labels) == len(set(labels)) == 2
    oa.verify(base, adapted).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto
    assert oa.remove(oa.remove(adapted, slots="one")).proto == base.proto


def test_a_bias_that_is_fed_is_added_before_the_slot() -> None:
    base = model(
        """g (float[n,3,4] x, float[8] b) => (float[n,3,8] y)
        { [fc] h = MatMul(x, w)  y = com.microsoft.BiasGelu(h, b) }""",
        "w 4 8",
    )
    adapted = oa.insert(base, after="fc")
    assert ops(adapted) == ["MatMul", "Add", "Gelu"]
    oa.verify(base, adapted).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto


def test_a_node_whose_bias_was_taken_out_is_written_out_further_as_a_part_of_it() -> None:
    base = model(NORM, *WEIGHTS)
    first = oa.insert(base, after="fc")
    slots, known = oa.list_slots(first), unfused_nodes(first)
    place = FusedPlace("main", "y", "unfused:y:bias", residual=True)
    _, records = unfuse(first, [place], slots, known)
    (record,) = records
    (at_once,) = unfuse(base, [FusedPlace("main", "y", "h", residual=True)])[1]
    assert record == at_once


UNSEEN = """
group norm | y = M.SkipGroupNorm<groups = 2, activation = 0>(h, g, g, s, b) | 4
packed     | y = M.PackedMultiHeadAttention<num_heads = 2>(h, s, s, qkv, t, t) | 3
decoder    | y = M.DecoderMaskedMultiHeadAttention<num_heads = 2>(h, s, s,,,,,,,, qkv) | 10
"""


@over("node position", UNSEEN)
def test_a_node_without_a_kernel_here_keeps_all_but_its_bias(node: str, position: str) -> None:
    """ONNX Runtime runs these on GPUs alone, or within a whole decoder."""
    base = model(
        f"""g (float[n,{"" if "Packed" in node else "3,"}4] x, int32[n,3] t,
        float[n,{"" if "Packed" in node else "3,"}8] s) => (float[n,3,O] y)
        {{ [fc] h = MatMul(x, w)  [act] {node.replace("M.", "com.microsoft.")} }}""",
        *WEIGHTS,
    )
    adapted = oa.insert(base, after="fc")
    (slot,) = oa.list_slots(adapted)
    before, now = base.proto.graph.node[-1], adapted.proto.graph.node[-1]
    assert (now.op_type, now.name, now.attribute) == (before.op_type, "act", before.attribute)
    assert slot.tensor in now.input
    bias = before.input[int(position)]
    assert bias not in now.input
    added = [
        n for n in adapted.proto.graph.node if n.op_type == "Add" and "adapter" not in n.name
    ]
    stored = {t.name: numpy_helper.to_array(t) for t in adapted.proto.graph.initializer}
    parts = [stored[node.input[1]] for node in added]
    np.testing.assert_array_equal(np.concatenate(parts), stored[bias])
    assert oa.remove(adapted).proto == base.proto


@over(
    "node reason",
    """
    channels first | y = M.SkipGroupNorm<channels_last = 0>(h, g, g, s, b)         | channels
    packed values  | y = M.MultiHeadAttention<num_heads = 2>(h, , , qkv)           | packed
    computed  | a = Abs(qkv) y = M.MultiHeadAttention<num_heads = 2>(h, s, s, a) | no constant
    flattened | y = M.BiasSoftmax<axis = 2>(h, b)                                  | its bias
    of others | k = MatMul(x, v) y = M.SkipLayerNormalization(h, k, g, g, b) | nothing tells
    moved     | r = Reshape(h, to) y = M.BiasGelu(r, b)                            | its bias
    """,
)
def test_a_node_that_cannot_be_written_out_is_refused_by_name(node: str, reason: str) -> None:
    base = model(
        f"""g (float[n,3,4] x, float[n,3,8] s) => (float[n,3,O] y)
        <int64[3] to = {{0, 0, 8}}>
        {{ [fc] h = MatMul(x, w)  {node.replace("M.", "com.microsoft.")} }}""",
        *WEIGHTS,
    )
    base.proto.graph.node[-1].name = "act"
    with pytest.raises(SiteRefusedError, match=reason) as caught:
        oa.insert(base, after="fc")
    assert "act" in str(caught.value)
    assert caught.value.hint


def test_an_attention_with_a_changed_part_is_no_proof_of_the_base() -> None:
    """The bias of keys moves no output: a softmax does not see what is added to all scores."""
    base = model(
        """g (float[n,3,4] x, float[n,3,8] s) => (float[n,3,8] y) { [fc] h = MatMul(x, w)
        y = com.microsoft.MultiHeadAttention<num_heads = 2>(h, s, s, qkv) }""",
        *WEIGHTS,
    )
    adapted = oa.insert(base, after="fc")
    feeds = {"x": np.ones((1, 3, 4), np.float32), "s": np.ones((1, 3, 8), np.float32)}
    before = run(adapted, feeds)
    for tensor in adapted.proto.graph.initializer:
        if tensor.name == "unfused:y:k_bias":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(8, np.float32), tensor.name))
    np.testing.assert_allclose(run(adapted, feeds), before, rtol=1e-6)
    failed = [check for check in oa.verify(base, adapted).checks if not check.passed]
    assert [check.name for check in failed] == ["graph"]
    assert "MultiHeadAttention" in failed[0].detail


def test_another_function_than_the_fused_one_is_more_than_rounding() -> None:
    base = model(TWO, *WEIGHTS)
    adapted = oa.insert(base, after="one")
    assert "fused" in {check.name for check in oa.verify(base, adapted).checks}
    for node in adapted.proto.graph.node:
        if node.op_type == "Gelu":
            node.op_type = "FastGelu"  # an approximation of it
    checks = oa.verify(base, adapted).checks
    failed = {check.name: check.detail for check in checks if not check.passed}
    assert failed.keys() == {"graph", "fused"}
    assert "outside of the base's own roundings" in failed["fused"]


def test_parts_that_another_tool_took_or_moved_are_damage() -> None:
    base = model(TWO, *WEIGHTS)
    adapted = oa.insert(base, after="one")
    nodes = adapted.proto.graph.node
    assert not damages(adapted)
    gelu = next(i for i, node in enumerate(nodes) if node.op_type == "Gelu")
    nodes.append(nodes[gelu])
    del nodes[gelu]
    with pytest.raises(SlotError, match="BiasGelu at 'main:y' are gone"):
        oa.remove(adapted)
    for node in nodes:
        del node.metadata_props[:]
    assert any("BiasGelu at 'main:y'" in line for line in damages(adapted))
