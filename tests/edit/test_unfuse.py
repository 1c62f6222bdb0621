"""Fused nodes that are written out for slots: the same numbers, and the same bytes again."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from sites_models import HEADER, over
from slot_models import cli, run

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.edit.unfuse import unfused_nodes
from onnx_adapt.errors import ManifestError, SiteRefusedError, SlotError

RNG = np.random.default_rng(2)
S = RNG.standard_normal((2, 3, 8)).astype(np.float32)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
PICTURE = RNG.standard_normal((2, 4, 5, 5)).astype(np.float32)
ARRAYS = {
    "w": RNG.standard_normal((4, 8)),
    "b": RNG.standard_normal(8),
    "g": RNG.standard_normal(8),
    "qkv": RNG.standard_normal(24),
    "kernel": RNG.standard_normal((8, 4, 3, 3)),
    "m": RNG.standard_normal((3, 8)),
}


def _model(text: str) -> oa.Model:
    proto = onnx.parser.parse_model(HEADER.format(ir=8, opset=17) + text)
    used = {name for node in _nodes(proto.graph) for name in node.input}
    for name in used & ARRAYS.keys():
        stored = numpy_helper.from_array(ARRAYS[name].astype(np.float32), name)
        proto.graph.initializer.append(stored)
    return oa.Model(proto)


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    bodies = [item.g for node in graph.node for item in node.attribute if item.HasField("g")]
    return [*graph.node, *(node for body in bodies for node in _nodes(body))]


def _linear(behind: str) -> oa.Model:
    """A Linear called fc, and the node that swallowed its bias."""
    inputs = "float[n,3,4] x, float[n,3,8] s"
    return _model(f"g ({inputs}) => (float[n,3,8] y) {{[fc] h = MatMul(x, w) {behind}}}")


@over(
    "behind",
    """
    Gelu        | y = com.microsoft.BiasGelu(h, b)
    fast Gelu   | y = com.microsoft.FastGelu(h, b)
    norm        | y = com.microsoft.SkipLayerNormalization(h, s, g, g, b)
    skip        | y = com.microsoft.SkipLayerNormalization<epsilon = 0.1>(s, h, g, g, b)
    its sum     | p,a,c,q = com.microsoft.SkipLayerNormalization(h, s, g, g, b) y = Mul(p, q)
    simple      | y = com.microsoft.SkipSimplifiedLayerNormalization(h, s, g, b)
    heads       | y = com.microsoft.MultiHeadAttention<num_heads=2>(h, s, s, qkv)
    values      | y = com.microsoft.MultiHeadAttention<num_heads=2>(s, s, h, qkv)
    """,
)
def test_a_base_that_is_written_out_computes_the_same(behind: str) -> None:
    base = _linear(behind)
    adapted = oa.insert(base, after="fc")
    (slot,) = oa.list_slots(adapted)
    feeds = {"x": X, "s": S}
    oa.verify(base, adapted, inputs=feeds).raise_for_mismatch()
    np.testing.assert_allclose(*run(adapted, feeds), *run(base, feeds), rtol=1e-4, atol=1e-5)
    tapped = oa.Model(onnx.ModelProto.FromString(adapted.proto.SerializeToString()))
    tapped.proto.graph.output.add().name = slot.inner
    part = {"values": 16}.get("values" if "s, s, h" in behind else "", 0)
    bias = ARRAYS["qkv"][part : part + 8] if "qkv" in behind else ARRAYS["b"]
    np.testing.assert_allclose(
        run(tapped, feeds)[1], X @ ARRAYS["w"] + bias, rtol=1e-5, atol=1e-5
    )
    assert oa.remove(adapted).proto == base.proto


@over(
    "fused",
    """
    Relu       | activation = "Relu"                                     | 0
    leaky      | activation = "LeakyRelu", activation_params = [0.3]     | 0
    Clip       | activation = "Clip", activation_params = [-0.5, 0.7]    | 0
    hard       | activation = "HardSigmoid", activation_params = [0.3, 0.6] | 0
    """.replace("| 0", ""),
)
def test_a_convolution_with_its_activation_is_written_out(fused: str) -> None:
    base = _model(
        "g (float[n,4,5,5] x) => (float[n,8,3,3] y) "
        f"{{[c] y = com.microsoft.FusedConv<{fused}>(x, kernel, b)}}"
    )
    base.proto.graph.node[0].name = "/conv/Conv"
    adapted = oa.insert(base, after="conv")
    feeds = {"x": PICTURE}
    oa.verify(base, adapted, inputs=feeds).raise_for_mismatch()
    np.testing.assert_allclose(*run(adapted, feeds), *run(base, feeds), rtol=1e-4, atol=1e-5)
    assert adapted.proto.graph.node[0].op_type == "Conv"
    assert oa.remove(adapted).proto == base.proto


@over(
    "fused",
    """
    Tanh   | activation = "Tanh", transB = 0
    leaky  | activation = "LeakyRelu", activation_alpha = 0.3
    scaled | activation = "Relu", alpha = 0.5, beta = 2.0
    """,
)
def test_a_linear_with_its_activation_is_written_out(fused: str) -> None:
    base = _model(
        f"g (float[n,4] x) => (float[n,8] y) {{y = com.microsoft.FusedGemm<{fused}>(x, w, b)}}"
    )
    base.proto.graph.node[0].name = "fused /fc/Gemm"  # as ONNX Runtime names it
    adapted = oa.insert(base, after="fc")
    feeds = {"x": X[0]}
    oa.verify(base, adapted, inputs=feeds).raise_for_mismatch()
    np.testing.assert_allclose(*run(adapted, feeds), *run(base, feeds), rtol=1e-4, atol=1e-5)
    assert oa.remove(adapted).proto == base.proto


BRANCHES = """g (float[n,3,4] x, bool c) => (float[n,3,8] y) {
    y = If (c) <
        then_branch = t () => (float[n,3,8] a) {
            [one] h = MatMul(x, w) a = com.microsoft.BiasGelu(h, b) },
        else_branch = e () => (float[n,3,8] a) {
            [two] h = MatMul(x, w) a = com.microsoft.BiasGelu(h, b) }> }"""


def test_nodes_of_the_same_names_in_two_branches_are_told_apart() -> None:
    base = _model(BRANCHES)
    adapted = oa.insert(base, after=["one", "two"])
    assert len(unfused_nodes(adapted)) == 2
    inputs = [{"x": X, "c": np.array(c)} for c in (True, False)]
    oa.verify(base, adapted, inputs=inputs).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto
    alone = oa.insert(base, after="two")
    assert [item.op for item in unfused_nodes(alone)] == ["BiasGelu"]
    assert oa.remove(alone).proto == base.proto


TWO = "k = com.microsoft.BiasGelu(h, b) [up] z = MatMul(k, u) y = com.microsoft.BiasGelu(z, b)"


def _two() -> oa.Model:
    base = _linear(TWO.replace("u)", "v)"))
    stored = RNG.standard_normal((8, 8)).astype(np.float32)
    base.proto.graph.initializer.append(numpy_helper.from_array(stored, "v"))
    return base


def test_what_stays_when_one_of_two_slots_is_removed_still_works() -> None:
    base = _two()
    adapted = oa.insert(base, after=["fc", "up"])
    feeds = {"x": X, "s": S}
    left = oa.remove(adapted, slots="fc")
    assert [slot.name for slot in oa.list_slots(left)] == ["up"]
    oa.verify(base, left, inputs=feeds).raise_for_mismatch()
    assert oa.remove(left).proto == base.proto


def test_a_node_is_written_out_behind_a_slot_that_is_there() -> None:
    base = _two()
    once = oa.insert(base, after=["main:h", "main:k"])
    twice = oa.insert(once, after=["fc", "up"])
    assert len(oa.list_slots(twice)) == 4
    oa.verify(base, twice, inputs={"x": X, "s": S}).raise_for_mismatch()
    assert oa.remove(twice).proto == base.proto
    again = oa.insert(twice, after="fc")
    assert len(unfused_nodes(again)) == 2
    assert oa.remove(again).proto == base.proto


def test_half_precision_is_written_out_in_half_precision() -> None:
    text = (
        "g (float16[n,3,4] x, float16[n,3,8] s) => (float16[n,3,8] y) "
        "{[fc] h = MatMul(x, w) y = com.microsoft.SkipLayerNormalization(h, s, g, g, b)}"
    )
    base = _model(text)
    for tensor in base.proto.graph.initializer:
        value = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    adapted = oa.insert(base, after="fc")
    (slot,) = oa.list_slots(adapted)
    assert slot.dtype == "float16"
    feeds = {"x": X.astype(np.float16), "s": S.astype(np.float16)}
    oa.verify(base, adapted, inputs=feeds).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto


def test_a_mean_that_something_reads_keeps_a_residual_sum_inside() -> None:
    from onnx_adapt.graph.fused_draft import FusedPlace
    from onnx_adapt.graph.index import index_model
    from onnx_adapt.graph.unfusing import write_out

    base = _linear(
        "y, mean = com.microsoft.SkipLayerNormalization(h, s, g, g, b) q = Relu(mean)"
    )
    index = index_model(base)
    with pytest.raises(SiteRefusedError, match="its mean or its deviation"):
        write_out(index, index.main, FusedPlace("main", "y", "h", residual=True))


@pytest.mark.parametrize("damage", ["gone", "record"])
def test_damage_of_what_stands_for_a_node_is_told(damage: str) -> None:
    adapted = oa.insert(_linear("y = com.microsoft.BiasGelu(h, b)"), after="fc")
    expected: Any = SlotError
    if damage == "gone":
        for node in adapted.proto.graph.node:
            kept = [e for e in node.metadata_props if e.key != "pkg.onnx_adapt.unfused"]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
        assert any("stand for the base's BiasGelu" in line for line in damages(adapted))
    else:
        expected = ManifestError
        (entry,) = adapted.proto.metadata_props
        entry.value = entry.value.replace('"node": "', '"node": "zz', 1)
        entry.value = entry.value.replace('"node":"', '"node":"zz')
    with pytest.raises(expected) as caught:
        oa.remove(adapted)
    assert caught.value.hint


def test_insert_and_slots_say_what_was_written_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(_linear("y = com.microsoft.BiasGelu(h, b)").proto, tmp_path / "m.onnx")
    made = str(tmp_path / "a.onnx")
    code, _, err = cli(capsys, "insert", str(tmp_path / "m.onnx"), "--after", "fc", "-o", made)
    assert code == 0
    assert "wrote out 1 fused node of m.onnx (BiasGelu at 'main:y')" in err
    code, out, _ = cli(capsys, "slots", made, "--json")
    assert '"op": "BiasGelu"' in out
    code, _, err = cli(capsys, "verify", str(tmp_path / "m.onnx"), made)
    assert code == 0
