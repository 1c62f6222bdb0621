"""Models off the beaten track: slots go in, are proven, and come out byte for byte."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from backend_models import Outcome, attempt, has_float_output, node_cases, stored_cases
from disk_models import chunk, sparse, weight, write
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from slot_models import adapter_feeds, bump, dense, proto_of, run

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError, SiteRefusedError

X = weight(3, 4, seed=9)


def _proven(
    proto: onnx.ModelProto, *after: str, axis: int | None = None, **options: object
) -> oa.Model:
    """Insert, verify and remove; gives the adapted model."""
    before = proto.SerializeToString()
    base = oa.Model(proto)
    adapted = oa.insert(base, after=after, axis=axis)
    report = oa.verify(base, adapted, **options)
    assert [(c.name, c.detail) for c in report.checks if not c.passed] == []
    assert not any(result.error is None for result in report.slots)
    assert oa.remove(adapted).proto.SerializeToString() == before
    assert base.proto.SerializeToString() == before
    return adapted


# ONNX's own backend tests. All of them: python benchmarks/backend_suite.py


OPERATORS = (
    *("attention", "batch_normalization", "conv", "dequantizelinear", "gelu", "gemm", "gru"),
    *("if_", "layernormalization", "loop", "lstm", "matmul", "matmulinteger"),
    *("qlinearmatmul", "reshape", "rmsnormalization", "scan", "sequence_map"),
    *("optionalhaselement", "sequenceinsert", "softmax", "split", "stft", "topk"),
)


def test_the_models_of_onnx_s_own_tests_take_slots_or_say_why_not() -> None:
    chosen = [*node_cases(OPERATORS)[::5], *list(stored_cases())[:140:7]]
    tried = [attempt(case) for case in chosen if has_float_output(case.proto)]
    kinds: dict[str, list[Outcome]] = {}
    for outcome in tried:
        kinds.setdefault(outcome.kind, []).append(outcome)
    assert kinds.get("wrong", []) == []
    assert len(kinds["adapted"]) >= 45
    assert all(outcome.reason for outcome in kinds["refused"])


# Versions.


def _of_version(opset: int, ir: int) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: {ir}, opset_import: ["" : {opset}]>
        g (float[n,4] x) => (float[n,4] y) <{dense("w1")}, {dense("w2", seed=1)}>
        {{ [first] a = MatMul(x, w1)  b = Relu(a)  [second] y = MatMul(b, w2) }}"""
    )


@pytest.mark.parametrize("opset", range(7, 27))
def test_every_opset_that_onnx_runtime_runs_takes_slots(opset: int) -> None:
    _proven(_of_version(opset, 8), "first", "second")


@pytest.mark.parametrize("ir", range(3, 14))
def test_every_ir_version_takes_slots(ir: int) -> None:
    proto = _of_version(17, ir)
    if ir < 4:  # every weight had to be an input then
        for tensor in proto.graph.initializer:
            dims = list(tensor.dims)
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, 1, dims))
    _proven(proto, "first")


# Control flow.

DEEP = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[3,4] x, bool c) => (float[3,4] y) <
  {dense("w1")}, int64 two = {{2}}, bool on = {{1}}> {{
  [n] p = MatMul(x, w1)
  [o] y = If(c) <
    then_branch = a () => (float[3,4] o) {{
      [n] m = MatMul(p, w1)
      o = Loop(two, on, m) <body = b (int64 i, bool g, float[3,4] s)
        => (bool g2, float[3,4] t) {{
        g2 = Identity(g)
        [n] q = MatMul(s, w1)
        z, t = Scan<num_scan_inputs = 1, body = k (float[3,4] u, float[4] r)
          => (float[3,4] u2, float[3,4] v) {{
            u2 = Identity(u)
            v = If(c) <
              then_branch = a () => (float[3,4] d) {{ [n] l = MatMul(u, w1)  d = Add(l, r) }},
              else_branch = a () => (float[3,4] d) {{ [n] l = MatMul(u, w1)  d = Sub(l, r) }}>
          }}>(q, q)
        zero = Constant<value_int = 0>()
        last = Gather<axis = 0>(t, zero)
      }}>
    }},
    else_branch = a () => (float[3,4] o) {{ [n] m = MatMul(x, w1)  o = Neg(m) }}>
}}"""


def _deep() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(DEEP)
    loop = next(a.g for a in proto.graph.node[1].attribute if a.name == "then_branch").node[1]
    body = loop.attribute[0].g
    # The Scan's outputs are stacked: what the Loop carries on is the first of them.
    body.output[1].name = "last"
    del body.output[1].type.tensor_type.shape.dim[:]
    for size in (3, 4):
        body.output[1].type.tensor_type.shape.dim.add(dim_value=size)
    return proto


def _all_sites(proto: onnx.ModelProto) -> list[str]:
    sites = oa.find_sites(oa.Model(proto), all_tensors=True)
    return [site.address for site in sites if site.refused is None]


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("blank", [False, True], ids=["repeated", "empty"])
def test_bodies_four_deep_with_repeated_or_empty_names_take_slots(
    blank: bool, taken: bool
) -> None:
    proto = _deep()
    if blank:
        graphs = [proto.graph]
        for graph in graphs:
            for node in graph.node:
                node.name = ""
                graphs += [a.g for a in node.attribute if a.HasField("g")]
        assert len(graphs) == 7
    base = oa.Model(proto)
    before = proto.SerializeToString()
    places = [place for place in _all_sites(proto) if place.endswith((":l", ":m", ":p", ":q"))]
    assert len({place.rpartition(":")[0] for place in places}) == 6
    assert max(place.count("/") for place in places) == 4
    adapted = oa.insert(base, after=places)
    feeds = {"x": X, "c": np.array(taken)}
    (off,), (wanted,) = run(adapted, feeds), run(base, feeds)
    assert off.tobytes() == wanted.tobytes()
    on = adapter_feeds(oa.list_slots(adapted), np.random.default_rng(0))
    (found,) = run(adapted, {**feeds, **on})
    slots = {slot.graph + ":" + slot.tensor: slot.name for slot in oa.list_slots(adapted)}
    np.testing.assert_allclose(found, _compute_deep(taken, on, slots), 1e-3, 1e-2)
    assert oa.remove(adapted).proto.SerializeToString() == before


def _compute_deep(taken: bool, on: dict[str, np.ndarray], slots: dict[str, str]) -> np.ndarray:
    w = numpy_helper.to_array(onnx.parser.parse_model(DEEP).graph.initializer[0])

    def layer(x: np.ndarray, depth: int, tensor: str, branch: str = "") -> np.ndarray:
        (name,) = [
            slot
            for place, slot in slots.items()
            if place.count("/") == depth and place.endswith(f"{branch}:{tensor}")
        ]
        return bump(x @ w, on, name)

    p = layer(X, 0, "p")
    if not taken:
        return -layer(X, 1, "m", "else_branch")
    s = layer(p, 1, "m", "then_branch")
    for _ in range(2):
        q = layer(s, 2, "q")
        s = layer(q, 4, "l", "then_branch") + q[0]
    return s


def test_functions_with_overloads_are_left_alone_or_inlined() -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
    g (float[3,4] x) => (float[3,4] y) <{dense("w1")}, {dense("w2", seed=1)}>
    {{ [one] a = local.f:plain(x, w1)  [two] y = local.f:twice(a, w2) }}
    <domain: "local", overload: "plain", opset_import: ["" : 17]>
    f (x, w) => (y) {{ [inner] y = MatMul(x, w) }}
    <domain: "local", overload: "twice", opset_import: ["" : 17]>
    f (x, w) => (y) {{ [inner] h = MatMul(x, w)  y = Add(h, h) }}"""
    proto = onnx.parser.parse_model(text)
    assert [f.overload for f in proto.functions] == ["plain", "twice"]
    _proven(proto, "main:a")
    base = oa.Model(proto)
    inlined = oa.insert(base, after=["main:a", "main:y"], inline_functions=True)
    report = oa.verify(base, inlined)
    assert report.passed, report
    assert not inlined.proto.functions


# Quantised.


def _float_mlp(folder: Path) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "act"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], "second"),
    ]
    stored = [numpy_helper.from_array(weight(64, 64, seed=i), f"w{i}") for i in (1, 2)]
    x, y = (helper.make_tensor_value_info(name, 1, ["n", 64]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    opset = helper.make_opsetid("", 17)
    return write(
        folder / "m.onnx", helper.make_model(graph, opset_imports=[opset], ir_version=8)
    )


class _Rows(CalibrationDataReader):
    def __init__(self) -> None:
        self.rows = iter([{"x": weight(8, 64, seed=i)} for i in range(3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


def _quantised(kind: str, path: Path) -> onnx.ModelProto:
    result = path.with_name("q.onnx")
    if kind == "MatMulInteger":
        quantize_dynamic(path, result)
    elif kind == "MatMulNBits":
        work = MatMulNBitsQuantizer(onnx.load(path), bits=4, block_size=32)
        work.process()
        return work.model.model
    else:
        form = QuantFormat.QDQ if kind == "DequantizeLinear" else QuantFormat.QOperator
        quantize_static(path, result, _Rows(), quant_format=form)
    return onnx.load(result)


@pytest.mark.parametrize(
    "kind", ["MatMulInteger", "MatMulNBits", "DequantizeLinear", "QLinearMatMul"]
)
def test_quantised_layers_take_slots_behind_them(kind: str, tmp_path: Path) -> None:
    proto = _quantised(kind, _float_mlp(tmp_path))
    assert kind in {node.op_type for node in proto.graph.node}
    places = _all_sites(proto)
    assert len(places) >= 1
    _proven(proto, *places)


# Types.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "double"])
def test_layers_of_other_float_types_take_slots(dtype: str) -> None:
    kind = TensorProto.DataType.Value(dtype.upper())
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[3,4] x) => (float[3,4] y) <{dense("w")}> {{
      c = Cast<to = {kind}>(x)  k = Cast<to = {kind}>(w)
      [layer] a = MatMul(c, k)  y = Cast<to = 1>(a) }}"""
    base = oa.Model(proto_of(text))
    adapted = oa.insert(base, after="layer")
    assert oa.list_slots(adapted)[0].dtype == {"double": "float64"}.get(dtype, dtype)
    assert oa.remove(adapted).proto == base.proto
    if dtype != "bfloat16":  # ONNX Runtime multiplies no bfloat16 on the CPU
        assert oa.verify(base, adapted).passed


OUTPUTS = {
    "sequence": ("s = SequenceConstruct(a, a)", "seq(float[3,4]) s"),
    "optional": ("o = Optional(a)", "optional(float[3,4]) o"),
    "text": ("", "float[3,4] a"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_other_kinds_stay_what_they_are(kind: str) -> None:
    node, output = OUTPUTS[kind]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[3,4] x) => ({output}, float[3,4] y) <{dense("w")}>
        {{ [layer] a = MatMul(x, w)  {node}  y = Relu(a) }}"""
    )
    declared = [value.type for value in proto.graph.output]
    adapted = oa.insert(oa.Model(proto), after="layer")
    assert [value.type for value in adapted.proto.graph.output] == declared
    _proven(proto, "layer")


# What else a model can hold.


def test_sparse_weights_training_and_later_fields_stay(tmp_path: Path) -> None:
    proto = _of_version(17, 8)
    proto.graph.sparse_initializer.append(sparse("unused", 3))
    training = proto.training_info.add()
    training.algorithm.CopyFrom(proto.graph)
    training.initialization_binding.add(key="w1", value="w2")
    for message in (proto, proto.graph, proto.graph.node[0], training):
        message.MergeFromString(chunk(999, b"from a later ONNX"))
    path = write(tmp_path / "m.onnx", proto)
    adapted = oa.insert(oa.open_model(path), after=["first", "second"])
    oa.save_model(adapted, tmp_path / "adapted.onnx")
    again = onnx.load(tmp_path / "adapted.onnx")
    assert again.training_info[0] == training
    assert again.graph.sparse_initializer[0] == proto.graph.sparse_initializer[0]
    assert (tmp_path / "adapted.onnx").read_bytes().count(b"from a later ONNX") == 4
    oa.save_model(oa.remove(oa.open_model(tmp_path / "adapted.onnx")), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def test_a_weight_that_is_sparse_is_no_obstacle() -> None:
    proto = _of_version(17, 8)
    values = numpy_helper.from_array(np.array([1, -2, 3], np.float32), "w2")
    indices = numpy_helper.from_array(np.array([0, 5, 10]), "")
    del proto.graph.initializer[1]
    made = helper.make_sparse_tensor(values, indices, [4, 4])
    proto.graph.sparse_initializer.append(made)
    _proven(proto, "first")


def test_operators_of_other_domains_stay_and_what_follows_them_takes_slots() -> None:
    text = f"""<ir_version: 8, opset_import:
      ["" : 17, "com.microsoft" : 1, "nobody.knows" : 3]>
    g (float[3,4] x) => (float[3,4] y) <{dense("w")}>
    {{ [g] a = com.microsoft.FastGelu(x)  [layer] y = MatMul(a, w) }}"""
    _proven(onnx.parser.parse_model(text), "layer")
    unknown = onnx.parser.parse_model(text)
    unknown.graph.node[0].domain = "nobody.knows"
    base = oa.Model(unknown)
    adapted = oa.insert(base, after="layer")
    assert oa.remove(adapted).proto == unknown
    with pytest.raises(AdaptError, match=r"nobody\.knows"):
        oa.verify(base, adapted)


@pytest.mark.parametrize(
    "untyped",
    [
        "MeanVarianceNormalization(x)",
        "ai.onnx.ml.Scaler <offset: floats = [0], scale: floats = [2]> (x)",
    ],
    ids=["MeanVarianceNormalization", "Scaler"],
)
@pytest.mark.parametrize("where", ["at the end", "recorded"])
def test_what_onnx_cannot_infer_is_recorded_for_the_slot(untyped: str, where: str) -> None:
    """No type reaches the slot's nodes by inference: the base's own record moves on."""
    after = ") { y" if where == "at the end" else ") <float[2,3,3,4] m> { m"
    rest = "" if where == "at the end" else "y = Relu(m)"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 1]>
        g (float[2,3,3,4] x) => (float[2,3,3,4] y{after} = {untyped}  {rest} }}"""
    )
    _proven(proto, "y" if where == "at the end" else "m", axis=-1)


def test_weights_in_constant_nodes_only_take_slots() -> None:
    proto = _of_version(17, 8)
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in proto.graph.initializer
    ]
    nodes = [*constants, *proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    _proven(proto, "first", "second")


@pytest.mark.parametrize("same", [True, False], ids=["equal", "different"])
def test_an_initializer_given_twice_stays_and_the_last_one_counts(
    same: bool, caplog: pytest.LogCaptureFixture
) -> None:
    proto = _of_version(17, 8)
    again = proto.graph.initializer.add()
    again.CopyFrom(proto.graph.initializer[0])
    if not same:
        again.raw_data = weight(4, 4, seed=4).tobytes()
        again.ClearField("float_data")
    adapted = _proven(proto, "second")
    assert len(adapted.proto.graph.initializer) == 5
    assert "initializer 'w1' is there more than once" in caplog.text


def test_a_tensor_made_twice_is_reported_and_not_repaired(tmp_path: Path) -> None:
    proto = _of_version(17, 8)
    proto.graph.node[1].output[0] = "a"
    proto.graph.node[2].input[0] = "a"
    base = oa.open_model(write(tmp_path / "m.onnx", proto))
    with pytest.raises(SiteRefusedError, match="'a'"):
        oa.insert(base, after="main:a")
    reasons = {s.tensor: s.refused for s in oa.find_sites(base, all_tensors=True)}
    assert "twice" in str(reasons["a"])
    adapted = oa.insert(base, after="main:y")
    assert oa.remove(adapted).proto.SerializeToString() == proto.SerializeToString()


SHAPES = {
    "0-d": ("float x", "[site] y = Neg(x)", "float y", "scalar"),
    "no width": ("float[3,0] x", "[site] y = Neg(x)", "float[3,0] y", "empty"),
    "dynamic width": ("float[3,n] x", "[site] y = Neg(x)", "float[3,n] y", "width"),
}


@pytest.mark.parametrize("shape", ["0-d", "no width", "dynamic width"])
def test_tensors_without_a_width_are_refused_with_the_reason(shape: str) -> None:
    given, nodes, output, reason = SHAPES[shape]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g ({given}) => ({output}) {{ {nodes} }}"""
    )
    with pytest.raises(SiteRefusedError, match=reason):
        oa.insert(oa.Model(proto), after="site")


def test_a_tensor_of_no_rows_takes_a_slot() -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[0,4] x) => (float[0,4] y) <{dense("w")}> {{ [layer] y = MatMul(x, w) }}"""
    )
    base = oa.Model(proto)
    adapted = oa.insert(base, after="layer")
    feeds = {"x": np.zeros((0, 4), np.float32)}
    on = adapter_feeds(oa.list_slots(adapted), np.random.default_rng(0))
    for given in (feeds, {**feeds, **on}):
        assert run(adapted, given)[0].shape == (0, 4)
    assert oa.remove(adapted).proto == proto


@pytest.mark.parametrize("name", ["value_int", "value_ints", "value_float", "value_floats"])
@pytest.mark.parametrize("kind", onnx.AttributeProto.AttributeType.values())
def test_a_constant_whose_value_is_of_another_type_is_no_obstacle(
    name: str, kind: int
) -> None:
    proto = _of_version(17, 8)
    node = proto.graph.node.add(op_type="Constant", output=["c"])
    node.attribute.add(
        name=name, type=kind, s=b"x", strings=[b"y"], f=float("nan"), floats=[float("inf")]
    )
    base = oa.Model(proto)
    assert oa.remove(oa.insert(base, after="main:y")).proto == proto


def test_an_opset_that_onnx_cannot_count_to_is_no_traceback() -> None:
    proto = _of_version(17, 8)
    proto.opset_import[0].version = 2**40
    assert oa.remove(oa.insert(oa.Model(proto), after="main:y")).proto == proto


@pytest.mark.parametrize("width", [2**61, 2**62, 2**63 - 1])
def test_a_width_that_no_array_has_is_refused(width: int) -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,{width}] x) => (float[1,{width}] y) {{ y = Relu(x) }}"""
    )
    with pytest.raises(AdaptError, match=str(width)):
        oa.insert(oa.Model(proto), after="main:y")


MALFORMED = {
    "Add with one input": ("Add", ["h"], ["z"]),
    "Add without output": ("Add", ["h", "w2"], []),
    "LayerNormalization with one input": ("LayerNormalization", ["h"], ["z"]),
    "Conv with one input": ("Conv", ["h"], ["z"]),
    "Mul without output": ("Mul", ["h", "w2"], []),
    "Gemm without input": ("Gemm", [], ["z"]),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_node_that_no_runtime_takes_gives_no_other_error(what: str) -> None:
    op, inputs, outputs = MALFORMED[what]
    proto = _of_version(17, 8)
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "h"
    proto.graph.node.append(helper.make_node(op, inputs, outputs, what))
    base = oa.Model(proto)
    places = _all_sites(proto)
    assert "main:y" in places
    for name in (*places, what):
        with contextlib.suppress(AdaptError) if name == what else contextlib.nullcontext():
            assert oa.remove(oa.insert(base, after=name)).proto == proto
