"""Slots that read another tensor, or re-apply a normalisation of the base."""

from typing import Any

import numpy as np
import onnx
import pytest
from slot_models import (
    BRANCHES,
    adapter_feeds,
    assert_sound,
    bump,
    dense,
    model_of,
    run,
    weight,
)

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.errors import AdaptError, SiteError, SiteNotFoundError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


def _close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, 1e-4, 1e-4)


def _feeds(adapted: oa.Model, names: str) -> dict[str, np.ndarray]:
    slots = oa.list_slots(adapted)
    assert " ".join(slot.name for slot in slots) == names
    return adapter_feeds(slots, np.random.default_rng(0))


CHAIN = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,6] y, float[n,4] late, float[n,4] side)
<{dense("w1")}, float[4,6] w2 = {{{", ".join(["1", "-1", "2"] * 8)}}}> {{
  [first] a = MatMul(x, w1)
  [act] b = Relu(a)
  [second] y = MatMul(b, w2)
  [after] late = Neg(b)
  [other] side = Tanh(late)
}}"""


@pytest.mark.parametrize("source", ["act", "b", "main:b", "first"])
def test_a_slot_reads_an_earlier_tensor_of_another_width(source: str) -> None:
    base = model_of(CHAIN)
    adapted = oa.insert(base, after="second", source=source, activation="identity")
    (slot,) = oa.list_slots(adapted)
    assert (slot.source_width, slot.width) == (4, 6)
    feeds = adapter_feeds([slot], np.random.default_rng(0))
    a = X @ weight(base, "w1")
    b = np.maximum(a, 0)
    read = a if source == "first" else b
    delta = read @ feeds["adapter.second.down"] @ feeds["adapter.second.up"]
    _close(run(adapted, {"x": X, **feeds})[0], b @ weight(base, "w2") + delta)
    assert run(adapted, {"x": X})[0].tobytes() == run(base, {"x": X})[0].tobytes()


def test_a_slot_reads_an_input_of_the_model() -> None:
    base = model_of(CHAIN)
    adapted = oa.insert(base, after="first", source="x", activation="identity")
    feeds = adapter_feeds(oa.list_slots(adapted), np.random.default_rng(0))
    a = X @ weight(base, "w1")
    a = a + X @ feeds["adapter.first.down"] @ feeds["adapter.first.up"]
    _close(run(adapted, {"x": X, **feeds})[0], np.maximum(a, 0) @ weight(base, "w2"))


def test_the_target_as_its_own_source_is_the_plain_slot() -> None:
    base = model_of(CHAIN)
    assert (
        oa.insert(base, after="first", source="a").proto
        == oa.insert(base, after="first").proto
    )


def test_a_slot_reads_a_source_with_the_slots_on_it() -> None:
    base = model_of(CHAIN)
    adapted = oa.insert(oa.insert(base, after="act"), after="second", source="act")
    adapted = oa.insert(adapted, after="act")
    feeds = _feeds(adapted, "act second act.2")
    b = np.maximum(X @ weight(base, "w1"), 0)
    b = bump(bump(b, feeds, "act"), feeds, "act.2")
    term = np.maximum(b @ feeds["adapter.second.down"], 0) @ feeds["adapter.second.up"]
    _close(run(adapted, {"x": X, **feeds})[0], b @ weight(base, "w2") + term)


def test_a_slot_in_a_body_reads_a_tensor_of_the_graph_around_it() -> None:
    base = model_of(BRANCHES)
    adapted = oa.insert(base, after="yes", source="before")
    feeds = _feeds(adapted, "yes")
    h = X @ weight(base, "w1")
    term = np.maximum(h @ feeds["adapter.yes.down"], 0) @ feeds["adapter.yes.up"]
    got = run(adapted, {"x": X, "c": np.array(True), **feeds})[0]
    _close(got, np.maximum(h @ weight(base, "w2") + term, 0))


def test_a_second_output_of_the_producer_is_a_source_too() -> None:
    base = model_of("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,8] x) => (float[n,4] y, float[n,4] z) <int64[2] sizes = {4, 4}>
    { [halves] y, z = Split<axis = 1>(x, sizes) }""")
    adapted = oa.insert(base, after="y", source="z")
    (slot,) = oa.list_slots(adapted)
    feeds = adapter_feeds([slot], np.random.default_rng(0))
    x = np.concatenate([X, -X], axis=1)
    down, up = (feeds[f"adapter.{slot.name}.{p}"] for p in ("down", "up"))
    _close(run(adapted, {"x": x, **feeds})[0], X + np.maximum(-X @ down, 0) @ up)


@pytest.mark.parametrize(
    ("after", "source", "message"),
    [
        ("first", "act", "after target"),
        ("first", "other", "after target"),
        ("after", "other", "after target"),
    ],
)
def test_a_source_that_comes_later_is_refused(after: str, source: str, message: str) -> None:
    with pytest.raises(SiteError, match=message) as caught:
        oa.insert(model_of(CHAIN), after=after, source=source)
    assert "before its target" in caught.value.hint


@pytest.mark.parametrize(
    ("after", "source"),
    [("before", "yes"), ("yes", "no"), ("choice", "yes"), ("yes", "choice")],
)
def test_a_source_in_another_graph_is_refused(after: str, source: str) -> None:
    with pytest.raises(SiteError, match=r"source '(m|y)'"):
        oa.insert(model_of(BRANCHES), after=after, source=source)


@pytest.mark.parametrize(
    ("op", "shape", "hint"),
    [
        ("Transpose<perm = [1, 0]>(a)", "4,3", "layout"),
        ("Unsqueeze(a, zero)", "1,3,4", "feature axis"),
    ],
)
def test_a_source_of_another_leading_shape_is_refused(op: str, shape: str, hint: str) -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[3,4] x) => (float[3,4] y, float[{shape}] s)
    <{dense("w1")}, int64[1] zero = {{0}}> {{
      a = MatMul(x, w1)
      s = {op}
      y = Neg(a)
    }}""")
    with pytest.raises(SiteError, match="source 's'") as caught:
        oa.insert(base, after="y", source="s")
    assert hint in caught.value.hint


def test_a_source_that_is_nowhere_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(SiteNotFoundError, match="'frist'") as caught:
        oa.insert(model_of(CHAIN), after="second", source="frist")
    assert "first" in caught.value.hint


def test_a_source_of_another_type_is_refused() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}> {{
      a = MatMul(x, w1)  h = Cast<to = 10>(a)  f = Cast<to = 1>(h)  y = Neg(f) }}""")
    with pytest.raises(SiteError, match="float16") as caught:
        oa.insert(base, after="y", source="h")
    assert "same type" in caught.value.hint


POST_NORM = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,4] y)
<{dense("w1")}, float[4] g1 = {{1, 2, -1, 0.5}}, float[4] b1 = {{0.5, 0, 1, -1}}> {{
  [dense] a = MatMul(x, w1)
  s = Add(x, a)
  [ln] y = LayerNormalization<epsilon = 1e-3>(s, g1, b1)
}}"""


def _norm(v: np.ndarray) -> np.ndarray:
    v = v - v.mean(-1, keepdims=True)
    v = v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-3)
    return (v * np.array([1, 2, -1, 0.5]) + np.array([0.5, 0, 1, -1])).astype(np.float32)


def _normed_slot(a: np.ndarray, feeds: dict[str, np.ndarray], slot: str) -> np.ndarray:
    down, up = feeds[f"adapter.{slot}.down"], feeds[f"adapter.{slot}.up"]
    return a + np.maximum(_norm(a) @ down, 0) @ up


def _check_normed(base: oa.Model, **options: Any) -> oa.Model:
    adapted = oa.insert(base, after="dense", norm="ln", **options)
    assert_sound(adapted)
    feeds = _feeds(adapted, "dense")
    a = X @ weight(base, "w1")
    wanted = _norm(X + _normed_slot(a, feeds, "dense"))
    _close(run(adapted, {"x": X, **feeds})[0], wanted)
    assert run(adapted, {"x": X})[0].tobytes() == run(base, {"x": X})[0].tobytes()
    assert oa.verify(base, adapted, inputs={"x": X}).passed
    return adapted


def test_a_normalisation_of_the_base_is_applied_to_what_the_slot_reads() -> None:
    base = model_of(POST_NORM)
    assert oa.remove(_check_normed(base)).proto == base.proto


def test_the_weights_of_a_normalisation_may_be_constant_nodes_after_the_target() -> None:
    text = POST_NORM.replace("float[4] b1 = {0.5, 0, 1, -1}", "float[1] unused = {0}")
    constant = "b1 = Constant<value = float[4] {0.5, 0, 1, -1}>()"
    base = model_of(text.replace("s = Add(x, a)", f"s = Add(x, a) {constant}"))
    adapted = _check_normed(base)
    assert damages(adapted) == []
    assert oa.remove(adapted).proto == base.proto


def test_a_slot_put_on_the_normalisation_later_leaves_the_one_that_reapplies_it() -> None:
    base = model_of(POST_NORM)
    adapted = oa.insert(oa.insert(base, after="dense", norm="ln"), after="ln")
    feeds = _feeds(adapted, "dense ln")
    a = _normed_slot(X @ weight(base, "w1"), feeds, "dense")
    _close(run(adapted, {"x": X, **feeds})[0], bump(_norm(X + a), feeds, "ln"))
    assert oa.verify(base, adapted, inputs={"x": X}).passed


def test_a_normalisation_with_a_slot_on_it_can_be_reapplied_and_outlives_that_slot() -> None:
    base = model_of(POST_NORM)
    adapted = oa.insert(oa.insert(base, after="ln"), after="dense", norm="ln")
    assert oa.verify(base, adapted, inputs={"x": X}).passed
    less = oa.remove(adapted, slots=["ln"])
    assert oa.verify(base, less, inputs={"x": X}).passed


def test_a_normalisation_inside_a_branch_is_not_forgotten() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x, bool c) => (float[n,4] y)
    <{dense("w1")}, float[4] g1 = {{1, 2, -1, 0.5}}, float[4] b1 = {{0.5, 0, 1, -1}}> {{
      [dense] a = MatMul(x, w1)
      y = If(c) <
        then_branch = t () => (float[n,4] u) {{
          [ln] u = LayerNormalization<epsilon = 1e-3>(a, g1, b1) }},
        else_branch = e () => (float[n,4] v) {{ v = Identity(a) }}>
    }}""")
    adapted = oa.insert(base, after="dense", norm="ln")
    feeds = _feeds(adapted, "dense")
    wanted = _normed_slot(X @ weight(base, "w1"), feeds, "dense")
    _close(run(adapted, {"x": X, "c": np.array(False), **feeds})[0], wanted)


def test_a_normalisation_of_another_width_is_refused() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,8] y)
    <{dense("w1")}, float[8] g1 = {{1, 1, 1, 1, 1, 1, 1, 1}}> {{
      [dense] a = MatMul(x, w1)
      s = Concat<axis = 1>(a, x)
      [ln] y = LayerNormalization(s, g1)
    }}""")
    with pytest.raises(SiteError, match="ln"):
        oa.insert(base, after="dense", norm="ln")


def test_what_is_no_normalisation_cannot_be_reapplied() -> None:
    with pytest.raises(SiteError, match="'dense' is a MatMul") as caught:
        oa.insert(model_of(POST_NORM), after="ln", norm="dense")
    assert "normalisation" in caught.value.hint


@pytest.mark.parametrize("baked", [True, False])
@pytest.mark.parametrize(("norm_after", "more"), [("term", ()), ("sum", ("switch",))])
def test_a_norm_of_the_slot_around_its_term_or_sum_is_proven(
    norm_after: str, more: tuple[str, ...], baked: bool
) -> None:
    base = model_of(POST_NORM)
    parts = ("down", "up", "after_weight", "after_bias", *more)
    adapted = oa.insert(base, after="dense", parts=parts, norm_after=norm_after, baked=baked)
    assert run(adapted, {"x": X})[0].tobytes() == run(base, {"x": X})[0].tobytes()
    assert oa.verify(base, adapted, inputs={"x": X}).passed


@pytest.mark.parametrize("damage", ["no product", "no name"])
def test_a_normalisation_that_was_rewritten_gives_no_traceback(damage: str) -> None:
    adapted = oa.insert(model_of(POST_NORM), after="dense", norm="ln")
    (norm,) = (node for node in adapted.proto.graph.node if node.name.endswith("/norm"))
    if damage == "no product":
        norm.op_type = "Mul"
        data = adapted.proto.SerializeToString()
    else:
        name = norm.name.encode()
        data = adapted.proto.SerializeToString().replace(name, b"\xff" * len(name))
    model = oa.Model(onnx.ModelProto.FromString(data))
    assert len(damages(model)) == 1
    if damage == "no product":  # ONNX Runtime refuses it, so that it is not its base
        assert not oa.verify(model_of(POST_NORM), model).passed
    else:
        with pytest.raises(AdaptError):
            oa.verify(model_of(POST_NORM), model)
