"""Operators of ONNX Runtime that ONNX does not know: width and type are what comes out."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from sites_models import over, weight

import onnx_adapt as oa
from onnx_adapt.graph.sites import survey_model
from onnx_adapt.graph.stand_ins import STAND_INS

_SIZES = {"b": 2, "s": 3, "l": 5, "t": 6, "one": 1}


def _value(name: str, text: str) -> onnx.ValueInfoProto:
    """A tensor such as `x float b s 8`."""
    dtype, *dims = text.split()
    shape = [int(dim) if dim.isdigit() else dim for dim in dims]
    return helper.make_tensor_value_info(name, getattr(TensorProto, dtype.upper()), shape)


def _model(node: str, inputs: str, weights: str, opset: int = 17) -> onnx.ModelProto:
    """One node whose outputs are called y, y1, ...; no shape of an output is recorded."""
    ins = [_value(*item.strip().split(" ", 1)) for item in inputs.split(",") if item.strip()]
    text = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]> g () => () '
    proto = onnx.parser.parse_model(text + "{ " + node + " }")
    proto.graph.input.extend(ins)
    proto.graph.initializer.extend(weight(w.strip()) for w in weights.split(",") if w.strip())
    made = [name for name in proto.graph.node[-1].output if name]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    return proto


def _fed(value: onnx.ValueInfoProto) -> np.ndarray:
    tensor = value.type.tensor_type
    shape = [dim.dim_value or _SIZES[dim.dim_param] for dim in tensor.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return np.ones(shape, dtype)


def _run(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in proto.graph.output]
    feeds = {value.name: _fed(value) for value in proto.graph.input}
    return dict(zip(names, session.run(names, feeds), strict=True))


def _sites(model: oa.Model) -> dict[str, oa.Site]:
    """The sites by tensor; where nothing tells the axis, a user says that it is the last."""
    survey = survey_model(model)
    return {
        site.tensor: survey.on_axis(site, -1) if site.axis is None else site
        for site in survey.sites
    }


RUN = """
BiasGelu | y = com.microsoft.BiasGelu(x, w) | x float b s 8 | w 8
FastGelu | y = com.microsoft.FastGelu(x, w) | x float b s 8 | w 8
FastGelu bare | y = com.microsoft.FastGelu(x) | x float b s 8 |
QuickGelu | y = com.microsoft.QuickGelu(x) | x float b s 8 |
Gelu | y = com.microsoft.Gelu(x) | x float b s 8 |
skip norm | y, m, i, y3 = com.microsoft.SkipLayerNormalization(x, s, g, h, c) | x float b s 8, s float b s 8 | g 8, h 8, c 8
skip norm sum | y, , , y3 = com.microsoft.SkipLayerNormalization(x, s, g) | x float b s 8, s float b s 8 | g 8
skip simple norm | y, , , y3 = com.microsoft.SkipSimplifiedLayerNormalization(x, s, g) | x float b s 8, s float b s 8 | g 8
simple norm | y = SimplifiedLayerNormalization(x, g) | x float b s 8 | g 8
embeddings | y, , y2 = com.microsoft.EmbedLayerNormalization<epsilon=0.1>(i, , w, p, , g, h, , ) | i int32 b s | w 9 8, p 7 8, g 8, h 8
Attention | y = com.microsoft.Attention<num_heads=2>(x, w, c) | x float b s 8 | w 8 24, c 24
Attention narrow | y = com.microsoft.Attention<num_heads=2, qkv_hidden_sizes=[8, 8, 4]>(x, w, c) | x float b s 8 | w 8 20, c 20
multi head | y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v) | q float b s 8, k float b l 8, v float b l 8 |
multi head narrow | y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v) | q float b s 8, k float b l 8, v float b l 4 |
cross attention | y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v) | q float b s 8, k float b 2 l 4, v float b 2 l 4 |
one token | y = com.microsoft.DecoderMaskedMultiHeadAttention<num_heads=2>(q, k, v) | q float b one 8, k float b one 8, v float b one 8 |
grouped | c = Constant<value_ints=[2]>() t = Cast<to=6>(c) y, y1, z2 = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, p, p2, n, t) | q float b one 32, k float b one 16, v float b one 16, p float b 2 one 8, p2 float b 2 one 8, n int32 b |
grouped packed | c = Constant<value_ints=[2]>() t = Cast<to=6>(c) y, y1, z2 = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, , , p, p2, n, t) | q float b one 64, p float b 2 one 8, p2 float b 2 one 8, n int32 b |
LSTM | y = com.microsoft.DynamicQuantizeLSTM<hidden_size=4>(x, w, r, , , , , , e, z, e, z) | x float s b 8 | w 1 8 16 int8, r 1 4 16 int8, e 1, z 1 int8
QMoE | y = com.microsoft.QMoE<k=1, expert_weight_bits=4>(x, r, w, e, , v, f) | x float t 32, r float t 2 | w 2 16 16 uint8, e 2 16, v 2 32 8 uint8, f 2 32
QAttention | y = com.microsoft.QAttention<num_heads=2>(x, w, c, e, f, , o, z) | x uint8 b s 8 | w 8 24 int8, c 24, e, f, o uint8, z int8
rotary | y = com.microsoft.RotaryEmbedding(x, p, c, d) | x float b s 8, p int64 b s | c 9 4, d 9 4
MoE | y = com.microsoft.MoE<k=1>(x, r, w, , v) | x float t 8, r float t 2 | w 2 16 8, v 2 8 16
FusedMatMul | y = com.microsoft.FusedMatMul<alpha=2.0>(x, w) | x float b s 8 | w 8 6
FusedMatMul turned | y = com.microsoft.FusedMatMul<transB=1>(x, w) | x float b s 8 | w 6 8
FusedGemm | y = com.microsoft.FusedGemm<activation="Relu">(x, w, c) | x float b 8 | w 8 6, c 6
FusedConv | y = com.microsoft.FusedConv<activation="Relu">(x, w, c) | x float b 3 5 5 | w 6 3 3 3, c 6
4 bits | y = com.microsoft.MatMulNBits<K=32, N=6, bits=4, block_size=32>(x, q, e) | x float b s 32 | q 6 1 16 uint8, e 6
bnb4 | y = com.microsoft.MatMulBnb4<K=32, N=6, block_size=16, quant_type=1>(x, q, e) | x float b s 32 | q 96 uint8, e 12
dynamic | y = com.microsoft.DynamicQuantizeMatMul(x, q, e, z) | x float b s 8 | q 8 6 int8, e 6, z 6 int8
to float | y = com.microsoft.MatMulIntegerToFloat(x, q, e, f) | x uint8 b s 8 | q 8 6 uint8, e, f
quantised rows | y = com.microsoft.GatherBlockQuantized<gather_axis=0, quantize_axis=1, block_size=16, bits=4>(q, i, e) | i int64 b s | q 9 16 uint8, e 9 2
a16 | y = com.microsoft.DequantizeLinear(x, e, z) | x uint16 b s 8 | e, z uint16
"""  # noqa: E501 -- a row for each operator


SAID = """
BiasAdd | y = com.microsoft.BiasAdd(x, w, s) | x float b s 8, s float b s 8 | w 8 | 3 8
BiasSplitGelu | y = com.microsoft.BiasSplitGelu(x, w) | x float b s 8 | w 8 | 3 4
BiasSoftmax | y = com.microsoft.BiasSoftmax(x, w) | x float b s 8 | w 8 | 3 8
BiasDropout | y = com.microsoft.BiasDropout(x, w) | x float b s 8 | w 8 | 3 8
packed heads | y = com.microsoft.MultiHeadAttention<num_heads=2>(q) | q float b s 2 3 4 | | 3 8
packed pair | y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k) | q float b s 8, k float b l 2 2 4 | | 3 8
without padding | y = com.microsoft.PackedAttention<num_heads=2>(x, w, c, o, u) | x float t 8, o int32 b s, u int32 l | w 8 24, c 24 | 2 8
heads without padding | y = com.microsoft.PackedMultiHeadAttention<num_heads=2>(q, k, v, , o, u) | q float t 8, k float t 8, v float t 4, o int32 b s, u int32 l | | 2 4
packed, no padding | y = com.microsoft.PackedMultiHeadAttention<num_heads=2>(q, , , , o, u) | q float t 2 3 4, o int32 b s, u int32 l | | 2 8
sparse | y = com.microsoft.SparseAttention<num_heads=4, kv_num_heads=2>(q) | q float b s 64 | | 3 32
paged | y = com.microsoft.PagedAttention<num_heads=4, kv_num_heads=2>(q) | q float t 64 | | 2 32
self | y = com.microsoft.DecoderMaskedSelfAttention<num_heads=2>(x, w, c) | x float b one 8 | w 8 24, c 24 | 3 8
decoder | y = com.microsoft.DecoderAttention<num_heads=2>(q, k, w, v, c) | q float s b 8, k float l b 8 | w 8 8, v 8 16, c 24 | 3 8
long | y = com.microsoft.LongformerAttention<num_heads=2, window=2>(x, w, c) | x float b s 8 | w 8 24, c 24 | 3 8
groups | y = com.microsoft.GroupNorm<groups=2, activation=1>(x, g, h) | x float b 5 5 8 | g 8, h 8 | 4 8
skip groups | y, y1 = com.microsoft.SkipGroupNorm<groups=2, activation=1>(x, g, h, s) | x float b 5 5 8, s float b 5 5 8 | g 8, h 8 | 4 8
gemma | y, y1 = com.microsoft.GemmaRotaryEmbedding(e, q, k, r, u) | e float b s 8, q float16 b 2 s 8, k float16 b 2 s 8, r float16 b 2 s 8, u float16 b 2 s 8 | | 4 8
old product | y = com.microsoft.TransposeMatMul<transB=1>(x, w) | x float b s 8 | w 6 8 | 3 6
with Gelu | y = com.microsoft.GemmFastGelu(x, w) | x float b s 8 | w 8 6 | 3 6
"""  # noqa: E501
"""Operators without a CPU kernel: rank and width as ONNX Runtime's documentation has them."""


@over("node inputs weights", RUN)
def test_a_contrib_operator_is_as_wide_as_what_onnx_runtime_gives(
    node: str, inputs: str, weights: str
) -> None:
    proto = _model(node, inputs, weights)
    sites = _sites(oa.Model(proto))
    found = _run(proto)
    for name in [name for name in ("y", "y2", "y3") if name in found]:
        site, value = sites[name], found[name]
        assert site.rank == value.ndim
        assert site.dtype == str(value.dtype)
        assert site.width == value.shape[site.axis]


@over("node inputs weights expected", SAID)
def test_a_contrib_operator_of_a_gpu_is_as_wide_as_its_documentation_says(
    node: str, inputs: str, weights: str, expected: str
) -> None:
    proto = _model(node, inputs, weights)
    first = helper.tensor_dtype_to_np_dtype(
        proto.graph.input[-1 if "Gemma" in node else 0].type.tensor_type.elem_type
    )
    site = _sites(oa.Model(proto))["y"]
    assert [site.rank, site.width] == [int(number) for number in expected.split()]
    assert site.dtype == str(first)


def test_every_operator_of_the_table_is_tried() -> None:
    rows = [row.split("|") for row in (RUN + SAID).splitlines() if row.strip()]
    tried = {_model(row[1], row[2], row[3]).graph.node[-1].op_type for row in rows}
    by_name_in_onnx = {"Dropout", "GroupNormalization", "LayerNormalization"}
    by_name_in_onnx |= {"RMSNormalization", "MeanVarianceNormalization", "QuantizeLinear"}
    by_name_in_onnx |= {"GreaterOrEqual", "LessOrEqual"}
    assert STAND_INS.keys() - tried == by_name_in_onnx


@pytest.mark.parametrize("opset", [7, 9, 13, 16])
def test_layer_norms_before_onnx_knew_them_have_a_width(opset: int) -> None:
    proto = _model("y = LayerNormalization(x, g)", "x float b s 8", "g 8", opset)
    site = _sites(oa.Model(proto))["y"]
    assert (site.width, site.rank, site.dtype) == (8, 3, "float32")


def test_what_stands_behind_contrib_operators_is_known_too() -> None:
    """The classes of a model that was optimised: nothing records anything between."""
    proto = _model(
        "a = com.microsoft.BiasGelu(x, w) s, , , t = com.microsoft.SkipLayerNormalization"
        "(a, x, g) r = Reshape(t, k) y = Tanh(r)",
        "x float b 6 8",
        "w 8, g 8, k 1 int64",
    )
    proto.graph.initializer[-1].CopyFrom(helper.make_tensor("k", 7, [3], [0, 3, -1]))
    site = _sites(oa.Model(proto))["y"]
    assert (site.width, site.rank) == (16, 3)


def test_an_operator_of_a_domain_that_nobody_knows_is_not_taken_for_one_of_the_same_name() -> (
    None
):
    proto = _model("y = com.microsoft.BiasGelu(x, w)", "x float b s 8", "w 8")
    proto.graph.node[0].domain = "nobody.knows"
    proto.opset_import.add(domain="nobody.knows", version=1)
    assert _sites(oa.Model(proto))["y"].width is None


def test_a_function_of_the_same_name_is_what_its_body_makes() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[b,s,8] x) => (float[b,s,4] y) { y = com.microsoft.Gelu(x) }
    <domain: "com.microsoft", opset_import: ["" : 17]>
    Gelu (a) => (c) { k = Constant<value_ints=[0]>() e = Constant<value_ints=[4]>()
      ax = Constant<value_ints=[2]>() c = Slice(a, k, e, ax) }"""
    assert _sites(oa.Model(onnx.parser.parse_model(text)))["y"].width == 4


def test_contrib_operators_inside_a_function_do_not_hide_its_width() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1, "local" : 1]>
    g (float[b,s,8] x) => (float[b,s,5] z) { y = local.act(x) z = Tanh(y) }
    <domain: "local", opset_import: ["" : 17, "com.microsoft" : 1, "local" : 1]>
    act (a) => (c) { b = com.microsoft.QuickGelu(a) c = local.twice(b) }
    <domain: "local", opset_import: ["" : 17, "com.microsoft" : 1, "local" : 1]>
    twice (a) => (c) { b = Add(a, a) c = com.microsoft.Gelu(b) }"""
    assert _sites(oa.Model(onnx.parser.parse_model(text)))["z"].width == 8
