"""Insertion into the bodies of If, Loop and Scan."""

import numpy as np
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
from onnx_adapt.errors import SiteError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


def _close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, 1e-4, 1e-4)


def _feeds(adapted: oa.Model, names: str) -> dict[str, np.ndarray]:
    slots = oa.list_slots(adapted)
    assert " ".join(slot.name for slot in slots) == names
    return adapter_feeds(slots, np.random.default_rng(0))


def _main_inputs_hold_all_weights(adapted: oa.Model) -> bool:
    stored = {tensor.name for tensor in adapted.proto.graph.initializer}
    inputs = {value.name for value in adapted.proto.graph.input}
    names = {s.weight(part) for s in oa.list_slots(adapted) for part in s.parts}
    return names <= stored & inputs


@pytest.mark.parametrize("taken", [True, False])
def test_branches_with_the_same_tensor_names_take_slots_of_their_own(taken: bool) -> None:
    base = model_of(BRANCHES)
    adapted = oa.insert(base, after=["yes", "no"])
    assert _main_inputs_hold_all_weights(adapted)
    assert_sound(adapted)
    inputs = {"x": X, "c": np.array(taken)}
    assert run(adapted, inputs)[0].tobytes() == run(base, inputs)[0].tobytes()
    feeds = _feeds(adapted, "yes no")
    h, w2 = X @ weight(base, "w1"), weight(base, "w2")
    yes, no = np.maximum(bump(h @ w2, feeds, "yes"), 0), -bump(X @ w2, feeds, "no")
    _close(run(adapted, {**inputs, **feeds})[0], yes if taken else no)


def test_a_name_in_two_branches_is_ambiguous_and_an_address_is_not() -> None:
    base = model_of(BRANCHES)
    with pytest.raises(SiteError, match="2 places") as caught:
        oa.insert(base, after="m")
    addresses = [site.address for site in oa.find_sites(base) if site.tensor == "m"]
    assert len(set(addresses)) == 2
    assert all(address in caught.value.message for address in addresses)
    adapted = oa.insert(base, after=addresses[1])
    feeds = _feeds(adapted, "no")
    for taken in (True, False):
        got = run(adapted, {"x": X, "c": np.array(taken), **feeds})[0]
        off = run(base, {"x": X, "c": np.array(taken)})[0]
        assert np.array_equal(got, off) == taken


def test_a_slot_on_a_tensor_that_a_body_captures_reaches_the_body() -> None:
    base = model_of(BRANCHES)
    adapted = oa.insert(base, after="before")
    feeds = _feeds(adapted, "before")
    wanted = bump(X @ weight(base, "w1"), feeds, "before") @ weight(base, "w2")
    got = run(adapted, {"x": X, "c": np.array(True), **feeds})[0]
    _close(got, np.maximum(wanted, 0))


def test_the_output_of_a_body_and_of_its_owner_take_slots() -> None:
    base = model_of(
        BRANCHES.replace("[no] m = MatMul(x, w2)  out = Neg(m)", "out = MatMul(x, w2)")
    )
    adapted = oa.insert(base, after="choice")
    slots = oa.list_slots(adapted)
    assert [slot.graph for slot in slots] == ["main"]
    inside = next(s for s in oa.find_sites(base) if s.tensor == "out")
    both = oa.insert(adapted, after=inside.address)
    feeds = adapter_feeds(oa.list_slots(both), np.random.default_rng(0))
    first, second = (slot.name for slot in oa.list_slots(both))
    wanted = bump(bump(X @ weight(base, "w2"), feeds, second), feeds, first)
    _close(run(both, {"x": X, "c": np.array(False), **feeds})[0], wanted)


LOOP = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x, int64 count) => (float[n,4] y, float[k,n,4] trail) <{dense("w1")}>
{{
  keep = Constant<value = bool {{1}}>()
  [turns] y, trail = Loop(count, keep, x) <
    body = b (int64 i, bool go, float[n,4] s) => (bool go_on, float[n,4] t, float[n,4] seen) {{
      go_on = Identity(go)
      [step] h = MatMul(s, w1)
      t = Tanh(h)
      seen = Identity(t) }}>
}}"""


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_a_slot_in_a_loop_works_in_every_turn(turns: int) -> None:
    base = model_of(LOOP)
    adapted = oa.insert(base, after=["step", "t"])
    assert _main_inputs_hold_all_weights(adapted)
    inputs = {"x": X, "count": np.array(turns, np.int64)}
    pairs = zip(run(adapted, inputs), run(base, inputs), strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)
    feeds = _feeds(adapted, "step t")
    state, trail = X, np.zeros((0, 3, 4), np.float32)
    for _ in range(turns):
        state = bump(np.tanh(bump(state @ weight(base, "w1"), feeds, "step")), feeds, "t")
        trail = np.concatenate([trail, state[None]])
    y, seen = run(adapted, {**inputs, **feeds})
    _close(y, state)
    assert len(seen) == turns
    _close(seen.ravel(), trail.ravel())


SCAN = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x) => (float[4] y, float[n,4] ys) <{dense("w1")}, float[4] zero = {{0, 0, 0, 0}}>
{{
  [rows] y, ys = Scan<num_scan_inputs = 1, body = b (float[4] s, float[4] v)
    => (float[4] s2, float[4] each) {{
      [cell] h = MatMul(v, w1)
      s2 = Add(s, h)
      each = Tanh(s2) }}>(zero, x)
}}"""


def test_a_slot_in_a_scan_works_in_every_step() -> None:
    base = model_of(SCAN)
    adapted = oa.insert(base, after=["cell", "each"])
    assert run(adapted, {"x": X})[0].tobytes() == run(base, {"x": X})[0].tobytes()
    feeds = _feeds(adapted, "cell each")
    state, each = np.zeros(4, np.float32), []
    for row in X:
        state = state + bump(row @ weight(base, "w1"), feeds, "cell")
        each.append(bump(np.tanh(state), feeds, "each"))
    y, ys = run(adapted, {"x": X, **feeds})
    _close(y, state)
    _close(ys, np.stack(each))


NESTED = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x, int64 count) => (float[n,4] y) <{dense("w1")}>
{{
  keep = Constant<value = bool {{1}}>()
  [turns] y = Loop(count, keep, x) <
    body = b (int64 i, bool go, float[n,4] s) => (bool go_on, float[n,4] t) {{
      go_on = Identity(go)
      odd = Cast<to = 9>(i)
      [choice] t = If(odd) <
        then_branch = p () => (float[n,4] u) {{ [deep] h = MatMul(s, w1)  u = Tanh(h) }},
        else_branch = q () => (float[n,4] v) {{ v = Neg(s) }}> }}>
}}"""


def test_a_slot_in_a_branch_in_a_loop() -> None:
    base = model_of(NESTED)
    adapted = oa.insert(base, after=["deep", "choice"])
    assert_sound(adapted)
    assert _main_inputs_hold_all_weights(adapted)
    inputs = {"x": X, "count": np.array(3, np.int64)}
    assert run(adapted, inputs)[0].tobytes() == run(base, inputs)[0].tobytes()
    feeds = _feeds(adapted, "deep choice")
    state = X
    for turn in range(3):
        h = bump(state @ weight(base, "w1"), feeds, "deep")
        state = bump(np.tanh(h) if turn else -state, feeds, "choice")
    _close(run(adapted, {**inputs, **feeds})[0], state)


def test_one_call_puts_slots_into_a_graph_and_into_a_body_in_it() -> None:
    base = model_of(BRANCHES)
    adapted = oa.insert(base, after=["before", "yes", "choice"])
    feeds = _feeds(adapted, "before yes choice")
    m = bump(X @ weight(base, "w1"), feeds, "before") @ weight(base, "w2")
    y = bump(np.maximum(bump(m, feeds, "yes"), 0), feeds, "choice")
    _close(run(adapted, {"x": X, "c": np.array(True), **feeds})[0], y)


def test_a_slot_before_an_if_without_a_name_does_not_lose_the_slots_in_it() -> None:
    base = model_of(BRANCHES.replace("[choice] ", ""))
    adapted = oa.insert(oa.insert(base, after="yes"), after="before")
    inputs = {"x": X, "c": np.array(True)}
    assert oa.verify(base, adapted, inputs=inputs).passed


def test_slots_stack_in_the_body_of_an_if_without_a_name() -> None:
    base = model_of(BRANCHES.replace("[choice] ", ""))
    adapted = oa.insert(oa.insert(oa.insert(base, after="yes"), after="before"), after="yes")
    lower, before, upper = (slot.name for slot in oa.list_slots(adapted))
    feeds = adapter_feeds(oa.list_slots(adapted), np.random.default_rng(0))
    m = bump(X @ weight(base, "w1"), feeds, before) @ weight(base, "w2")
    inputs = {"x": X, "c": np.array(True), **feeds}
    wanted = np.maximum(bump(bump(m, feeds, lower), feeds, upper), 0)
    _close(run(adapted, inputs)[0], wanted)
    less = oa.remove(adapted, slots=[lower])
    fed = {k: v for k, v in inputs.items() if k.rpartition(".")[0] != f"adapter.{lower}"}
    _close(run(less, fed)[0], np.maximum(bump(m, feeds, upper), 0))
    assert oa.remove(less).proto == base.proto


def test_a_body_input_that_shadows_an_outer_name_is_left_alone() -> None:
    base = model_of(
        LOOP.replace("float[n,4] s)", "float[n,4] s_)").replace("(s, w1)", "(s_, w1)")
    )
    proto = base.proto
    body = proto.graph.node[1].attribute[0].g
    # Rename the body's input and first tensor to names that the main graph uses: ONNX
    # Runtime takes the inner one.
    body.input[2].name = body.node[1].input[0] = "x"
    adapted = oa.insert(oa.Model(proto), after="step")
    inputs = {"x": X, "count": np.array(2, np.int64)}
    feeds = _feeds(adapted, "step")
    state = X
    for _ in range(2):
        state = np.tanh(bump(state @ weight(base, "w1"), feeds, "step"))
    _close(run(adapted, {**inputs, **feeds})[0], state)
