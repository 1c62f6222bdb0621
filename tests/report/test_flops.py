"""Operations are counted as by hand, whatever ONNX Runtime makes of a node."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from slot_models import cli, dense, model_of, saved

import onnx_adapt as oa
from onnx_adapt.report.overview import overview
from onnx_adapt.report.trace import trace

RNG = np.random.default_rng(3)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def bytes_of(*shape: int) -> np.ndarray:
    return RNG.integers(0, 4, shape).astype(np.uint8)


ONE, ZERO = np.float32(1), np.uint8(0)
MICROSOFT = {"domain": "com.microsoft"}

# A node, its inputs (None: left out), and what it does, counted by hand.
COUNTED: dict[str, tuple[str, dict[str, Any], list[Any], int]] = {
    # (4, 5, 3) by (3, 7): each of 4 * 5 * 7 elements has 3 multiply-adds.
    "MatMul": ("MatMul", {}, [floats(4, 5, 3), floats(3, 7)], 2 * 4 * 5 * 7 * 3),
    "MatMul of vectors": ("MatMul", {}, [floats(3), floats(3)], 2 * 3),
    "MatMul of a batch": ("MatMul", {}, [floats(2, 1, 5, 3), floats(4, 3, 6)], 2 * 240 * 3),
    "Gemm": ("Gemm", {}, [floats(5, 3), floats(3, 7)], 2 * 5 * 7 * 3),
    "Gemm with bias": ("Gemm", {}, [floats(5, 3), floats(3, 7), floats(7)], 2 * 105 + 35),
    "Gemm transposed": (
        "Gemm",
        {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0},
        [floats(3, 5), floats(7, 3), floats(5, 1)],
        2 * 5 * 7 * 3 + 5 * 7,
    ),
    "FusedGemm": (
        "FusedGemm",
        {"activation": "Relu", "transB": 1, **MICROSOFT},
        [floats(5, 3), floats(7, 3), floats(7)],
        2 * 5 * 7 * 3 + 5 * 7,
    ),
    "FusedMatMul": (
        "FusedMatMul",
        {"transA": 1, "transB": 1, **MICROSOFT},
        [floats(2, 3, 5), floats(2, 7, 3)],
        2 * 2 * 5 * 7 * 3,
    ),
    "FusedMatMul of turned batches": (
        "FusedMatMul",
        {"transA": 1, "transBatchA": 1, **MICROSOFT},
        [floats(3, 2, 5), floats(2, 3, 7)],
        2 * 2 * 5 * 7 * 3,
    ),
    "MatMulInteger": ("MatMulInteger", {}, [bytes_of(5, 3), bytes_of(3, 7)], 2 * 5 * 7 * 3),
    "QLinearMatMul": (
        "QLinearMatMul",
        {},
        [bytes_of(5, 3), ONE, ZERO, bytes_of(3, 7), ONE, ZERO, ONE, ZERO],
        2 * 5 * 7 * 3,
    ),
    "DynamicQuantizeMatMul": (
        "DynamicQuantizeMatMul",
        MICROSOFT,
        [floats(5, 3), bytes_of(3, 7), ONE, ZERO, floats(7)],
        2 * 5 * 7 * 3 + 5 * 7,
    ),
    "MatMulIntegerToFloat": (
        "MatMulIntegerToFloat",
        MICROSOFT,
        [bytes_of(5, 3), bytes_of(3, 7), ONE, ONE, ZERO, ZERO, floats(7)],
        2 * 5 * 7 * 3 + 5 * 7,
    ),
    # Four bits each: 7 columns of 2 blocks of 16.
    "MatMulNBits": (
        "MatMulNBits",
        {"K": 32, "N": 7, "bits": 4, "block_size": 16, **MICROSOFT},
        [floats(5, 32), bytes_of(7, 2, 8), floats(7, 2)],
        2 * 5 * 7 * 32,
    ),
    # 2 channels in, 4 out in 2 groups, 3 places each of 5 outputs.
    "Conv": ("Conv", {"group": 2}, [floats(1, 2, 7), floats(4, 1, 3)], 2 * 4 * 5 * 1 * 3),
    # 3 pictures of 8x8 places, 6 channels out of 4, a 3x3 window, a bias for each place.
    "Conv with bias": (
        "Conv",
        {"pads": [1, 1, 1, 1]},
        [floats(3, 4, 8, 8), floats(6, 4, 3, 3), floats(6)],
        2 * 3 * 6 * 64 * 4 * 9 + 3 * 6 * 64,
    ),
    "Conv of one channel each": (
        "Conv",
        {"group": 4, "strides": [2, 2]},
        [floats(1, 4, 9, 9), floats(4, 1, 3, 3)],
        2 * 4 * 16 * 9,
    ),
    "FusedConv": (
        "FusedConv",
        {"activation": "Relu", **MICROSOFT},
        [floats(1, 4, 8, 8), floats(6, 4, 1, 1), floats(6)],
        2 * 6 * 64 * 4 + 6 * 64,
    ),
    "FusedConv with a sum": (
        "FusedConv",
        {"activation": "Relu", **MICROSOFT},
        [floats(1, 4, 8, 8), floats(6, 4, 1, 1), floats(6), floats(1, 6, 8, 8)],
        2 * 6 * 64 * 4 + 6 * 64 + 6 * 64,
    ),
    "ConvInteger": (
        "ConvInteger",
        {},
        [bytes_of(1, 4, 8, 8), bytes_of(6, 4, 3, 3)],
        2 * 6 * 36 * 4 * 9,
    ),
    "QLinearConv": (
        "QLinearConv",
        {},
        [
            *(bytes_of(1, 4, 8, 8), ONE, ZERO, bytes_of(6, 4, 3, 3), ONE, ZERO, ONE, ZERO),
            np.zeros(6, np.int32),
        ],
        2 * 6 * 36 * 4 * 9 + 6 * 36,
    ),
    # Each of 2x5 inputs meets 4 output channels and 3 places; 7 places come out.
    "ConvTranspose": ("ConvTranspose", {}, [floats(1, 2, 5), floats(2, 4, 3)], 2 * 10 * 4 * 3),
    "ConvTranspose with bias": (
        "ConvTranspose",
        {"strides": [2, 2], "group": 2},
        [floats(3, 4, 5, 5), floats(4, 3, 2, 2), floats(6)],
        2 * 3 * 4 * 25 * 3 * 4 + 3 * 6 * 100,
    ),
    # 7 steps of 2 rows; 4 gates of 5 units that read 3 numbers and 5 of the step before.
    "LSTM": (
        "LSTM",
        {"hidden_size": 5},
        [floats(7, 2, 3), floats(1, 20, 3), floats(1, 20, 5)],
        7 * 2 * 2 * (20 * 3 + 20 * 5),
    ),
    # Both directions, 2 * 20 numbers of bias and 3 * 5 peepholes in each.
    "LSTM both ways": (
        "LSTM",
        {"hidden_size": 5, "direction": "bidirectional"},
        [
            *(floats(7, 2, 3), floats(2, 20, 3), floats(2, 20, 5), floats(2, 40)),
            *(None, None, None, floats(2, 15)),
        ],
        7 * 2 * 2 * (2 * (20 * 3 + 20 * 5) + 40 + 2 * 15),
    ),
    "GRU": (
        "GRU",
        {"hidden_size": 5},
        [floats(7, 2, 3), floats(1, 15, 3), floats(1, 15, 5), floats(1, 30)],
        7 * 2 * (2 * (15 * 3 + 15 * 5) + 30),
    ),
    "RNN": (
        "RNN",
        {"hidden_size": 5, "direction": "reverse"},
        [floats(7, 2, 3), floats(1, 5, 3), floats(1, 5, 5)],
        7 * 2 * 2 * (5 * 3 + 5 * 5),
    ),
    "Gather": ("Gather", {}, [floats(9, 4), np.array([1, 2])], 0),
    "Transpose": ("Transpose", {}, [floats(4, 5)], 0),
    "Tanh": ("Tanh", {}, [floats(4, 5)], 20),
    "ReduceMean": ("ReduceMean", {"keepdims": 0}, [floats(4, 5)], 20),
    "GlobalAveragePool": ("GlobalAveragePool", {}, [floats(1, 2, 4, 5)], 40),
    # 2 channels of 3x3 places, each of a 2x2 window.
    "MaxPool": ("MaxPool", {"kernel_shape": [2, 2]}, [floats(1, 2, 4, 4)], 2 * 9 * 4),
    "BatchNormalization": (
        "BatchNormalization",
        {},
        [floats(2, 3, 4), *(floats(3) for _ in range(3)), np.ones(3, np.float32)],
        24 * 2,
    ),
    # Mean, difference, square, their sum, deviation, weight, bias.
    "LayerNormalization": (
        "LayerNormalization",
        {},
        [floats(4, 5), floats(5), floats(5)],
        140,
    ),
    "LayerNormalization without bias": (
        "LayerNormalization",
        {},
        [floats(4, 5), floats(5)],
        20 * 6,
    ),
    "SimplifiedLayerNormalization": (
        "SimplifiedLayerNormalization",
        {},
        [floats(4, 5), floats(5)],
        20 * 4,
    ),
    "SkipLayerNormalization": (
        "SkipLayerNormalization",
        MICROSOFT,
        [floats(2, 2, 5), floats(2, 2, 5), floats(5), floats(5), floats(5)],
        20 * (1 + 7 + 1),
    ),
    "SkipSimplifiedLayerNormalization": (
        "SkipSimplifiedLayerNormalization",
        MICROSOFT,
        [floats(2, 2, 5), floats(2, 2, 5), floats(5)],
        20 * (1 + 4),
    ),
    "BiasGelu": ("BiasGelu", MICROSOFT, [floats(4, 5), floats(5)], 20),
    # A product of (4, 5) and (5, 6), written otherwise.
    "Einsum of a product": (
        "Einsum",
        {"equation": "ij, jk -> ik"},
        [floats(4, 5), floats(5, 6)],
        2 * 4 * 5 * 6,
    ),
    "Einsum of heads": (
        "Einsum",
        {"equation": "...qd,...kd->...qk"},
        [floats(2, 3, 4, 5), floats(2, 3, 6, 5)],
        2 * 2 * 3 * 4 * 6 * 5,
    ),
    "Einsum without arrow": (
        "Einsum",
        {"equation": "ij,jk"},
        [floats(4, 5), floats(5, 6)],
        2 * 4 * 5 * 6,
    ),
    "Einsum of no sum": ("Einsum", {"equation": "i,j->ij"}, [floats(4), floats(5)], 20),
    "Einsum of a transpose": ("Einsum", {"equation": "ij->ji"}, [floats(4, 5)], 0),
    "Einsum of a sum": ("Einsum", {"equation": "ij->i"}, [floats(4, 5)], 20),
    # 2 heads of 4; 5 queries, 5 keys; 12 numbers in.
    "Attention of Microsoft": (
        "Attention",
        {"num_heads": 2, **MICROSOFT},
        [floats(3, 5, 12), floats(12, 24), floats(24)],
        3 * 5 * (2 * 12 * 24 + 24) + 2 * 3 * 5 * 5 * (8 + 8),
    ),
    # 7 keys are from before.
    "Attention with a past": (
        "Attention",
        {"num_heads": 2, **MICROSOFT},
        [floats(3, 5, 12), floats(12, 24), floats(24), None, floats(2, 3, 2, 7, 4)],
        3 * 5 * (2 * 12 * 24 + 24) + 2 * 3 * 5 * (5 + 7) * (8 + 8),
    ),
    "MultiHeadAttention": (
        "MultiHeadAttention",
        {"num_heads": 2, **MICROSOFT},
        [floats(3, 5, 8), floats(3, 6, 8), floats(3, 6, 8)],
        2 * 3 * 5 * 6 * (8 + 8),
    ),
    "MultiHeadAttention with bias": (
        "MultiHeadAttention",
        {"num_heads": 2, **MICROSOFT},
        [floats(3, 5, 8), floats(3, 6, 8), floats(3, 6, 8), floats(24)],
        2 * 3 * 5 * 6 * (8 + 8) + 3 * (5 * 8 + 6 * 8 + 6 * 8),
    ),
    # 4 heads of 8 share the keys of 2: queries and keys meet by head of the queries.
    "GroupQueryAttention": (
        "GroupQueryAttention",
        {"num_heads": 4, "kv_num_heads": 2, **MICROSOFT},
        [
            *(floats(1, 5, 32), floats(1, 5, 16), floats(1, 5, 16)),
            *(floats(1, 2, 7, 8), floats(1, 2, 7, 8)),
            *(np.array([11], np.int32), np.array(12, np.int32)),
        ],
        2 * 5 * 12 * (32 + 32),
    ),
    # 6 rows, each with 2 of 4 experts: 8 numbers to 16 and back.
    "MoE": (
        "MoE",
        {"k": 2, "activation_type": "relu", **MICROSOFT},
        [floats(6, 8), floats(6, 4), floats(4, 16, 8), None, floats(4, 8, 16)],
        2 * 6 * 2 * (8 * 16 + 16 * 8),
    ),
}
OUTPUTS = {"GroupQueryAttention": 3, "Attention with a past": 2}


def _model(case: str, *, constant: bool, opset: int = 17) -> tuple[oa.Model, dict[str, Any]]:
    op, attributes, values, _ = COUNTED[case]
    named = {f"i{i}": np.asarray(v) for i, v in enumerate(values) if v is not None}
    fed = dict(list(named.items())[:1]) if constant else named
    outputs = [f"y{i}" for i in range(OUTPUTS.get(case, 1))]
    names = [f"i{i}" if v is not None else "" for i, v in enumerate(values)]
    node = helper.make_node(op, names, outputs, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(
                n, helper.np_dtype_to_tensor_dtype(v.dtype), [None] * v.ndim
            )
            for n, v in fed.items()
        ],
        [helper.make_empty_tensor_value_info(outputs[0])],
        [numpy_helper.from_array(v, n) for n, v in named.items() if n not in fed],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return oa.Model(helper.make_model(graph, opset_imports=opsets, ir_version=8)), fed


@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
@pytest.mark.parametrize("case", COUNTED)
def test_operations_are_counted_as_by_hand(case: str, constant: bool) -> None:
    ran = trace(*_model(case, constant=constant))
    assert all(item.counted for item in ran)
    assert sum(item.flops for item in ran) == COUNTED[case][-1]


@pytest.mark.parametrize("heads_apart", [False, True])
def test_onnx_s_own_attention_is_counted_in_both_its_forms(heads_apart: bool) -> None:
    """2 rows, 4 heads of 8 for queries and 2 for keys, 5 queries by 6 keys."""
    shapes = [(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)]
    if not heads_apart:
        shapes = [(2, 5, 32), (2, 6, 16), (2, 6, 16)]
    heads = {} if heads_apart else {"q_num_heads": 4, "kv_num_heads": 2}
    COUNTED["own"] = ("Attention", heads, [floats(*s) for s in shapes], 0)
    (ran,) = trace(*_model("own", constant=False, opset=23))
    assert ran.flops == 2 * 2 * 5 * 6 * (32 + 32)


def test_an_operator_that_nobody_knows_is_named_and_counted_by_element() -> None:
    model = model_of(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,8,1] x) => (float[1,5,2] y) { y = DFT<axis=1, onesided=1>(x) }"""
    )
    (ran,) = trace(model, {"x": np.ones((1, 8, 1), "f4")})
    assert (ran.op, ran.counted, ran.flops) == ("DFT", False, 10)


LOOP = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[a,4] x, int64 n) => (float[b,4] y) <{dense("w")}, bool yes = {{1}}> {{
  y = Loop(n, yes, x) <body = b (int64 i, bool go, float[c,4] t)
    => (bool on, float[d,4] v) {{ on = Identity(go)  u = MatMul(t, w)
      v = Concat<axis=0>(u, t) }}> }}"""
SCAN = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,3,4] x) => (float[n,3,4] y) <{dense("w")}> {{
  y = Scan<num_scan_inputs = 1, body = b (float[3,4] t) => (float[3,4] u) {{
    u = MatMul(t, w) }}>(x) }}"""
FUNCTION = f"""<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (float[n,4] x) => (float[n,4] y) <{dense("w")}> {{ y = own.Twice(x, w) }}
<domain: "own", opset_import: ["" : 17]> Twice (t, v) => (u) {{
  s = MatMul(t, v)  u = MatMul(s, v) }}"""


def test_every_turn_of_a_loop_counts_with_the_shapes_it_has() -> None:
    """Rows double: 2, 4 and 8 of them are multiplied."""
    ran = trace(model_of(LOOP), {"x": np.ones((2, 4), "f4"), "n": np.array(3)})
    assert [item.flops for item in ran] == [2 * rows * 4 * 4 for rows in (2, 4, 8)]
    assert trace(model_of(LOOP), {"x": np.ones((2, 4), "f4"), "n": np.array(0)}) == ()


def test_every_step_of_a_scan_and_the_nodes_of_functions_count() -> None:
    ran = trace(model_of(SCAN), {"x": np.ones((5, 3, 4), "f4")})
    assert sum(item.flops for item in ran) == 5 * 2 * 3 * 4 * 4
    ran = trace(model_of(FUNCTION), {"x": np.ones((3, 4), "f4")})
    assert sum(item.flops for item in ran) == 2 * 2 * 3 * 4 * 4


def test_nodes_without_names_are_told_apart() -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,2] y)
    <{dense("w")}, float[4,2] v = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{
      a = MatMul(x, w)  b = MatMul(a, v)  y = Relu(b) }}"""
    ran = trace(model_of(text), {"x": np.ones((3, 4), "f4")})
    assert [item.flops for item in ran] == [2 * 3 * 4 * 4, 2 * 3 * 2 * 4, 6]


def test_nothing_is_counted_of_nothing() -> None:
    ran = trace(*_model("Gemm with bias", constant=True))
    assert sum(item.flops for item in ran) == 2 * 105 + 35
    model, _ = _model("Gemm with bias", constant=True)
    assert [item.flops for item in trace(model, {"i0": floats(0, 3)})] == [0]


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_element_types_make_no_difference(dtype: str) -> None:
    """ONNX Runtime puts casts around what it has no kernel for."""
    model = model_of(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g ({dtype}[n,4] x) => ({dtype}[n,4] y) {{ y = MatMul(x, x) }}"""
    )
    (ran,) = trace(model, {"x": np.ones((4, 4), dtype)})
    assert ran.flops == 2 * 4 * 4 * 4


# Reports


@pytest.mark.parametrize("fixed", [{}, {"bottleneck": 3, "baked": True}])
def test_the_same_slot_counts_the_same_swappable_and_baked(fixed: dict[str, Any]) -> None:
    base = _model("Gemm with bias", constant=True)[0]
    base.proto.graph.node[0].name = "fc"
    base.proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    model = oa.insert(base, after="fc", **fixed)
    costs = overview(base, model, inputs={"i0": floats(5, 3)}, bottleneck=3).costs
    assert costs.base_flops == 2 * 5 * 7 * 3 + 5 * 7
    assert costs.slots[0].flops == 2 * (2 * 5 * 7 * 3) + 5 * 3 + 5 * 7


def _nobias() -> oa.Model:
    """A Gemm without bias, as `torch.nn.Linear(bias=False)` is exported."""
    return model_of(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[n,4] x) => (float[n,4] y)
        <{dense("w")}> {{ [fc1] h = Gemm<transB=1>(x, w)  y = Relu(h) }}"""
    )


def _dcgan() -> oa.Model:
    """ConvTransposes with constant kernels and no bias."""
    nodes = [
        helper.make_node("ConvTranspose", ["z", "k1"], ["a"], "up1"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("ConvTranspose", ["b", "k2"], ["y"], "up2", strides=[2, 2]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("z", 1, ["n", 8, 1, 1])],
        [helper.make_tensor_value_info("y", 1, ["n", 3, 8, 8])],
        [
            numpy_helper.from_array(floats(8, 6, 4, 4), "k1"),
            numpy_helper.from_array(floats(6, 3, 2, 2), "k2"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    return oa.Model(helper.make_model(graph, opset_imports=opsets, ir_version=8))


@pytest.mark.parametrize(
    ("make", "after", "rows", "shape", "expected"),
    [
        (_nobias, "fc1", "x", (2, 4), 2 * 2 * 4 * 4 + 2 * 4),
        (
            _dcgan,
            "up1",
            "z",
            (2, 8, 1, 1),
            2 * 2 * 8 * 6 * 16 + 2 * 6 * 16 + 2 * 2 * 6 * 16 * 3 * 4,
        ),
    ],
)
def test_layers_without_bias_are_reported(
    make: Callable[[], oa.Model],
    after: str,
    rows: str,
    shape: tuple[int, ...],
    expected: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make()
    adapted = oa.insert(base, after=after)
    found = overview(base, adapted, inputs={rows: floats(*shape)})
    assert found.costs.base_flops == expected
    paths = saved(base, tmp_path / "base.onnx"), saved(adapted, tmp_path / "adapted.onnx")
    assert cli(capsys, "report", *map(str, paths))[0] == 0
    assert (tmp_path / "adapted.report.html").exists()
