"""Insertion: element types, convolutions, functions and names."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from slot_models import (
    MLP,
    MODELS,
    adapter_feeds,
    assert_sound,
    bump,
    dense,
    model_of,
    proto_of,
    run,
    weight,
)

import onnx_adapt as oa
from onnx_adapt.edit.remove import base_notes
from onnx_adapt.errors import (
    AmbiguousSiteError,
    ModelFileError,
    RunError,
    SiteNotFoundError,
    SiteRefusedError,
)

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


def _close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, 1e-4, 1e-4)


@pytest.mark.parametrize("dtype", ["float16", "double", "bfloat16"])
def test_weights_have_the_sites_element_type(dtype: str) -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}> {{
      c = Cast<to = {onnx.TensorProto.DataType.Value(dtype.upper())}>(x)
      w = CastLike(w1, c)
      a = MatMul(c, w)
      y = Cast<to = 1>(a)
    }}""")
    adapted = oa.insert(base, after="a", activation="gelu", bias=True)
    types = {t.data_type for t in adapted.proto.graph.initializer if "adapter" in t.name}
    assert types == {onnx.TensorProto.DataType.Value(dtype.upper())}
    assert_sound(adapted)
    (wanted,) = ReferenceEvaluator(base.proto).run(None, {"x": X})
    assert np.array_equal(ReferenceEvaluator(adapted.proto).run(None, {"x": X})[0], wanted)


@pytest.mark.parametrize("space", ["7", "7,6", "5,4,3"])
def test_convolutions_take_1x1_convolutions_on_their_channels(space: str) -> None:
    size = [int(n) for n in space.split(",")]
    ones = [1] * len(size)
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 13]>
    g (float[2,4,{space}] x) => (float[2,4,{space}] y) <{dense("flat")}> {{
      shape = Constant<value_ints = {[4, 4, *ones]}>()
      w = Reshape(flat, shape)
      [c] h = Conv(x, w)
      y = Relu(h)
    }}""")
    w = np.reshape(weight(base, "flat"), (4, 4))
    constant = onnx.helper.make_tensor("w", 1, [4, 4, *ones], w.ravel())
    base.proto.graph.initializer.append(constant)
    del base.proto.graph.node[:2]
    adapted = oa.insert(base, after="c", parts=("down", "up", "scale", "gain"), bias=True)
    (slot,) = oa.list_slots(adapted)
    assert (slot.axis, slot.rank, slot.width) == (1, 2 + len(size), 4)
    rng = np.random.default_rng(0)
    p = {k: rng.standard_normal(s) for k, s in {"down": (3, 4), "up": (4, 3)}.items()}
    p |= {"down_bias": rng.standard_normal(3)}
    p |= {k: rng.standard_normal(4) for k in ("up_bias", "scale", "gain")}
    x = rng.standard_normal((2, 4, *size)).astype(np.float32)
    t = np.moveaxis(np.einsum("ij,bj...->bi...", w, x), 1, -1)
    term = np.maximum(t @ p["down"].T + p["down_bias"], 0) @ p["up"].T + p["up_bias"]
    wanted = np.maximum(p["scale"] * t + p["gain"] * term, 0)
    feeds: dict[str, Any] = {"x": x}
    for part, value in p.items():
        fit = value if part.endswith("bias") else value.reshape(*value.shape, *ones)
        feeds[f"adapter.c.{part}"] = fit.astype(np.float32)
    _close(run(adapted, feeds)[0], np.moveaxis(wanted, -1, 1))
    assert run(adapted, {"x": x})[0].tobytes() == run(base, {"x": x})[0].tobytes()


FUNCTION = f"""<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
g (float[n,4] x) => (float[n,4] y) <{dense("w1")}> {{ [call] y = local.block(x, w1) }}
<domain: "local", opset_import: ["" : 17]>
block (x, w) => (z) {{ [inner] h = MatMul(x, w)  z = Relu(h) }}"""


def test_a_target_inside_a_function_is_refused_with_the_way_out() -> None:
    with pytest.raises(SiteRefusedError, match="local::block") as caught:
        oa.insert(model_of(FUNCTION), after="inner")
    assert "--inline-functions" in caught.value.hint


@pytest.mark.parametrize("name", ["inner", "h"])
def test_the_way_out_of_a_function_works_with_the_same_name(name: str) -> None:
    adapted = oa.insert(model_of(FUNCTION), after=name, inline_functions=True)
    (slot,) = oa.list_slots(adapted)
    assert (slot.node, slot.width) == ("inner__1", 4)


@pytest.mark.parametrize("name", ["inner", "h"])
def test_a_name_in_a_function_that_is_called_twice_is_several_places(name: str) -> None:
    calls = "{ a = local.block(x, w1)  y = local.block(a, w1) }"
    base = model_of(FUNCTION.replace("{ [call] y = local.block(x, w1) }", calls))
    with pytest.raises(AmbiguousSiteError, match="2 times") as caught:
        oa.insert(base, after=name, inline_functions=True)
    assert "name each of them" in caught.value.hint
    each = [f"{name}__1", f"{name}__2"]
    adapted = oa.insert(base, after=each, inline_functions=True)
    assert [slot.node for slot in oa.list_slots(adapted)] == ["inner__1", "inner__2"]


def test_a_node_of_the_model_goes_before_one_of_its_name_in_a_function() -> None:
    both = "{ [inner] a = Neg(x)  [call] y = local.block(a, w1) }"
    base = model_of(FUNCTION.replace("{ [call] y = local.block(x, w1) }", both))
    adapted = oa.insert(base, after="inner", inline_functions=True)
    assert [slot.tensor for slot in oa.list_slots(adapted)] == ["a"]


def test_without_functions_there_is_nothing_to_inline() -> None:
    base = model_of(MLP)
    base.proto.graph.node[0].name = "first__1"
    with pytest.raises(SiteNotFoundError, match="'first'"):
        oa.insert(base, after="first", inline_functions=True)
    adapted = oa.insert(base, after="first__1", inline_functions=True)
    removed = oa.remove(adapted)
    assert removed.proto == base.proto
    assert base_notes(adapted, removed) == []


def test_functions_that_cannot_be_inlined_are_an_error_with_the_reason() -> None:
    proto = onnx.parser.parse_model(FUNCTION.replace("(x, w1) }", "(x, w1, w1) }"))
    with pytest.raises(RunError, match=r"cannot be inlined: .*parameters"):
        oa.insert(oa.Model(proto), after="inner", inline_functions=True)


def _calling(body: str, count: int) -> oa.Model:
    """A model of functions that each have this body, with `BEFORE` for the one before."""
    functions = ""
    for i in range(count):
        before = f"local.f{i - 1}" if i else "Neg"
        text = body.replace("SELF", f"local.f{i}").replace("BEFORE", before)
        imports = 'domain: "local", opset_import: ["" : 17, "local" : 1]'
        functions += f"<{imports}> f{i} (x) => (y) {{ {text} }}"
    return oa.Model(
        onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
            g (float[2,4] x) => (float[2,4] y) {{ y = local.f{count - 1}(x) }} {functions}"""
        )
    )


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    "base",
    [_calling("a = BEFORE(x) y = BEFORE(a)", 2000), _calling("y = SELF(x)", 1)],
    ids=["doubling", "recursive"],
)
def test_functions_without_end_are_refused_before_anything_goes_into_them(
    base: oa.Model, inline: bool
) -> None:
    with pytest.raises(ModelFileError, match="call themselves, or each other without end"):
        oa.insert(base, after="y", inline_functions=inline)


def test_functions_that_call_each_other_a_little_are_inlined() -> None:
    base = _calling("a = BEFORE(x) y = BEFORE(a)", 6)
    adapted = oa.insert(base, after="y", inline_functions=True)
    assert [n.op_type for n in adapted.proto.graph.node].count("Neg") == 64


def test_inlining_reaches_inside_a_function() -> None:
    base = model_of(FUNCTION)
    adapted = oa.insert(base, after="inner__1", inline_functions=True)
    assert base.proto.functions
    assert not adapted.proto.functions
    feeds = adapter_feeds(oa.list_slots(adapted), np.random.default_rng(0))
    h = bump(X @ weight(base, "w1"), feeds, oa.list_slots(adapted)[0].name)
    _close(run(adapted, {"x": X, **feeds})[0], np.maximum(h, 0))
    assert run(adapted, {"x": X})[0].tobytes() == run(base, {"x": X})[0].tobytes()


def test_a_call_of_a_function_is_a_site_itself() -> None:
    base = model_of(FUNCTION)
    adapted = oa.insert(base, after="call")
    feeds = adapter_feeds(oa.list_slots(adapted), np.random.default_rng(0))
    wanted = bump(np.maximum(X @ weight(base, "w1"), 0), feeds, "call")
    _close(run(adapted, {"x": X, **feeds})[0], wanted)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for item in (*graph.input, *graph.initializer):
        item.name = names.get(item.name, item.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def test_a_repeated_node_name_is_ambiguous_and_addresses_tell_them_apart() -> None:
    base = model_of(MLP.replace("[second]", "[first]"))
    with pytest.raises(AmbiguousSiteError, match="main:a, main:y") as caught:
        oa.insert(base, after="first")
    assert "address" in caught.value.hint
    adapted = oa.insert(base, after=["main:a", "main:y"])
    assert len({slot.name for slot in oa.list_slots(adapted)}) == 2
    assert_sound(adapted)


def test_tensors_that_look_like_a_slots_are_not_taken_for_one() -> None:
    proto = proto_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x, float[n,4] name_1) => (float[n,4] y)
    <{dense("w1")}, float[4] name_2 = {{1, 2, 3, 4}}> {{
      [first] a = MatMul(x, w1)
      name_3 = Add(a, name_2)
      y = Add(name_3, name_1)
    }}""")
    names = {"name_1": "adapter.first.down", "name_2": "adapter.first.2.up"}
    _rename(proto.graph, {**names, "name_3": "adapter.first/act"})
    base = oa.Model(proto)
    adapted = oa.insert(oa.insert(base, after="a"), after="adapter.first/act")
    assert_sound(adapted)
    slots = oa.list_slots(adapted)
    feeds = adapter_feeds(slots, np.random.default_rng(0))
    assert not set(feeds) & {value.name for value in base.proto.graph.input}
    a = bump(X @ weight(base, "w1"), feeds, slots[0].name) + np.arange(1, 5)
    inputs = {"x": X, "adapter.first.down": 2 * X}
    wanted = bump(a.astype(np.float32), feeds, slots[1].name) + 2 * X
    _close(run(adapted, {**inputs, **feeds})[0], wanted)
    assert oa.remove(adapted).proto == proto


def test_node_names_that_look_like_a_slots_are_not_repeated() -> None:
    base = model_of(MLP.replace("[act]", '["adapter.first/down"]'))
    adapted = oa.insert(base, after="first")
    names = [node.name for node in adapted.proto.graph.node]
    assert len(names) == len(set(names))
    assert run(adapted, {"x": X})[0].tobytes() == run(base, {"x": X})[0].tobytes()


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_slots_are_named_alike_whichever_exporter_wrote_the_model(name: str) -> None:
    named = []
    for exporter in ("dynamo", "torchscript"):
        base = oa.open_model(MODELS.parent / f"tests/exports/{name}_{exporter}.onnx")
        modules = {
            site.module for site in oa.find_sites(base) if site.op in ("MatMul", "Gemm")
        }
        layers = sorted(m for m in modules if m and ".0." in m)
        slots = oa.list_slots(oa.insert(base, after=layers))
        assert [slot.name for slot in slots] == layers
        named.append(layers)
    assert named[0] == named[1]
    assert named[0]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("module", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
def test_the_projections_of_gpt2_take_slots(module: str, exporter: str) -> None:
    path = MODELS.parent / f"tests/exports/gpt2_{exporter}.onnx"
    base = oa.open_model(path)
    adapted = oa.insert(base, after=f"transformer.h.0.{module}")
    width = {"attn.c_attn": 96, "mlp.c_fc": 64}.get(module, 32)
    assert [slot.width for slot in oa.list_slots(adapted)] == [width]
