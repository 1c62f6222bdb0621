"""Slots on weights inside operators: what holds for every slot holds for them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from slot_models import CHECKS, run, session
from weight_slots import changed, checkpoint, model, random, slot_on, trained

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.errors import SlotError

Array = np.ndarray


def attention(dtype: str = "float32") -> oa.Model:
    """ONNX Runtime's Attention, whose weight packs three projections."""
    node = helper.make_node(
        "Attention", ["x", "w", "b"], ["y"], "attend", domain="com.microsoft", num_heads=2
    )
    stored = {"w": random(8, 24, dtype=dtype) / 3, "b": random(24, seed=5, dtype=dtype)}
    return model([node], {"x": ["n", 5, 8]}, ["y"], stored, dtype=dtype, microsoft=True)


def lstm() -> oa.Model:
    """A recurrent layer with a weight for each direction."""
    node = helper.make_node(
        "LSTM", ["x", "w", "r"], ["y"], "lstm", hidden_size=4, direction="bidirectional"
    )
    stored = {"w": random(2, 16, 8), "r": random(2, 16, 4, seed=5)}
    return model([node], {"x": [5, "n", 8]}, ["y"], stored)


def experts() -> oa.Model:
    """Experts in one stack, each taken out of it."""
    nodes = [
        helper.make_node("Gather", ["w", "chosen"], ["mine"], "take", axis=0),
        helper.make_node("MatMul", ["x", "mine"], ["y"], "product"),
    ]
    stored = {"w": random(4, 8, 6), "chosen": np.array([2, 0, 3])}
    return model(nodes, {"x": [3, "n", 8]}, ["y"], stored)


def looped() -> oa.Model:
    """A loop that takes one expert in each round, out of a stack in the graph around it."""
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["w", "i"], ["mine"], "take", axis=0),
            helper.make_node("MatMul", ["t", "mine"], ["u"], "product"),
            helper.make_node("Identity", ["go"], ["again"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, ["n", 6]),
        ],
        [
            helper.make_tensor_value_info("again", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("u", onnx.TensorProto.FLOAT, ["n", 6]),
        ],
    )
    node = helper.make_node("Loop", ["rounds", "", "x"], ["y"], "loop", body=body)
    stored = {"w": random(3, 6, 6) / 2, "rounds": np.array(3)}
    return model([node], {"x": ["n", 6]}, ["y"], stored)


def dequantized() -> oa.Model:
    """A weight that a DequantizeLinear makes of 8-bit integers."""
    nodes = [
        helper.make_node("Relu", ["x"], ["z"], "relu"),
        helper.make_node("DequantizeLinear", ["q", "step"], ["w"], "dequantize"),
        helper.make_node("Einsum", ["z", "w"], ["y"], "product", equation="nk,km->nm"),
    ]
    numbers = np.random.default_rng(0).integers(-128, 127, (8, 6)).astype(np.int8)
    stored = {"q": numbers, "step": np.array(0.01, np.float32)}
    return model(nodes, {"x": ["n", 8]}, ["y"], stored)


MODELS: dict[str, Callable[[], oa.Model]] = {
    "attention": attention,
    "lstm": lstm,
    "experts": experts,
    "looped": looped,
    "dequantized": dequantized,
}


def feeds_of(base: oa.Model, seed: int = 9) -> dict[str, Array]:
    value = base.proto.graph.input[0]
    kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    shape = [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
    return {value.name: random(*shape, seed=seed).astype(kind)}


def with_weight(base: oa.Model, tensor: str, value: Array) -> oa.Model:
    """The model with another value for a weight, stored or computed."""
    result = base.copy()
    graph = result.proto.graph
    for node in [node for node in graph.node if tensor in node.output]:
        graph.node.remove(node)
    for old in [old for old in graph.initializer if old.name == tensor]:
        graph.initializer.remove(old)
    graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), tensor))
    return result


def value_of(base: oa.Model, tensor: str) -> Array:
    stored = {t.name: numpy_helper.to_array(t) for t in base.proto.graph.initializer}
    return stored["q"] * stored["step"] if tensor not in stored else stored[tensor]


@pytest.mark.parametrize(
    "parts", [("down", "up"), ("down", "up", "scale", "gain"), ("scale",)]
)
@pytest.mark.parametrize("name", MODELS)
def test_fed_weights_change_the_weight_and_none_give_the_base(
    name: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    base = MODELS[name]()
    slot = slot_on(base, "w", parts=parts)
    own = trained(slot)
    adapted = oa.insert_checkpoint(base, checkpoint(base, [slot], {"s": own}))
    assert damages(adapted) == []
    feeds = feeds_of(base)
    np.testing.assert_array_equal(run(adapted, feeds)[0], run(base, feeds)[0])
    wanted = run(with_weight(base, "w", changed(slot, value_of(base, "w"), own)), feeds)[0]
    fed = {f"adapter.s.{part}": value for part, value in own.items()}
    got = run(adapted, {**feeds, **fed})[0]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(wanted - run(base, feeds)[0]).max() > 0.1


@pytest.mark.parametrize("parts", [("down", "up"), ("down", "up", "scale", "gain")])
@pytest.mark.parametrize("name", MODELS)
def test_a_slot_on_a_weight_verifies(name: str, parts: tuple[str, ...]) -> None:
    base = MODELS[name]()
    slot = slot_on(base, "w", parts=parts)
    adapted = oa.insert_checkpoint(base, checkpoint(base, [slot], {"s": trained(slot)}))
    report = oa.verify(base, adapted, inputs=feeds_of(base))
    assert [(c.name, c.detail) for c in report.checks if not c.passed] == []
    assert [check.name for check in report.checks] == CHECKS
    assert report.slots[0].error is not None
    assert report.slots[0].bottlenecks == (1, 8, 64)


@pytest.mark.parametrize("name", MODELS)
def test_removing_gives_the_base_back_byte_for_byte(name: str) -> None:
    base = MODELS[name]()
    slot = slot_on(base, "w")
    adapted = oa.insert_checkpoint(base, checkpoint(base, [slot], {"s": trained(slot)}))
    assert adapted.proto != base.proto
    removed = oa.remove(adapted)
    assert removed.proto.SerializeToString() == base.proto.SerializeToString()


@pytest.mark.parametrize("name", MODELS)
def test_filled_baked_and_extracted_weights_are_the_adapter_s(name: str) -> None:
    base = MODELS[name]()
    slot = slot_on(base, "w", parts=("down", "up", "scale"))
    trained_here = checkpoint(base, [slot], {"s": trained(slot)})
    adapted = oa.insert_checkpoint(base, trained_here)
    feeds = feeds_of(base)
    wanted = run(adapted, {**feeds, **trained_here.adapter.feeds()})
    filled = oa.fill(adapted, trained_here.adapter)
    baked = oa.bake(filled)
    for made in (filled, baked, oa.insert_checkpoint(base, trained_here, baked=True)):
        np.testing.assert_allclose(run(made, feeds), wanted, rtol=1e-5, atol=1e-6)
    assert [value.name for value in baked.proto.graph.input] == ["x"]
    out = oa.extract(filled, name="b")
    for part, value in trained_here.adapter.weights["s"].items():
        np.testing.assert_array_equal(out.weights["s"][part], value)
    report = oa.verify(base, baked, inputs=feeds)
    assert report.passed, [c for c in report.checks if not c.passed]


@pytest.mark.parametrize("name", MODELS)
def test_a_blend_is_exact(name: str) -> None:
    base = MODELS[name]()
    slot = slot_on(base, "w", parts=("down", "up", "scale"))
    one, two = (trained(slot, size, seed) for size, seed in ((2, 1), (5, 7)))
    first = checkpoint(base, [slot], {"s": one}).adapter
    second = checkpoint(base, [slot], {"s": two}).adapter
    adapted = oa.insert_checkpoint(base, checkpoint(base, [slot], {"s": one}))
    blended = oa.blend([first, second], [0.6, -0.3])
    old = value_of(base, "w").astype(np.float64)
    moves = (changed(slot, old, parts) - old for parts in (one, two))
    total = old + sum(w * move for w, move in zip((0.6, -0.3), moves, strict=True))
    feeds = feeds_of(base)
    wanted = run(with_weight(base, "w", total), feeds)[0]
    got = run(adapted, {**feeds, **blended.feeds()})[0]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_stacked_slots_add_up_and_come_out_in_any_order() -> None:
    base = attention()
    slots = [slot_on(base, "w", name=name) for name in ("q", "v")]
    own = {slot.name: trained(slot, seed=i) for i, slot in enumerate(slots)}
    both = oa.insert_checkpoint(base, checkpoint(base, slots, own))
    later = oa.insert_checkpoint(base, checkpoint(base, slots[:1], own))
    later = oa.insert_checkpoint(later, checkpoint(later, slots[1:], own))
    feeds = feeds_of(base)
    fed = {f"adapter.{n}.{p}": v for n, parts in own.items() for p, v in parts.items()}
    value = value_of(base, "w")
    for slot in slots:
        value = changed(slot, value, own[slot.name])
    wanted = run(with_weight(base, "w", value), feeds)[0]
    for made in (both, later):
        assert damages(made) == []
        got = run(made, {**feeds, **fed})[0]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        report = oa.verify(base, made, inputs=feeds)
        assert report.passed, [c for c in report.checks if not c.passed]
        for first, second in (("q", "v"), ("v", "q")):
            half = oa.remove(made, slots=first)
            assert damages(half) == []
            assert oa.verify(base, half, inputs=feeds).passed
            only = {k: v for k, v in fed.items() if f".{second}." in k}
            expected = changed(slots[0], value_of(base, "w"), own[second])
            wanted_half = run(with_weight(base, "w", expected), feeds)[0]
            got = run(half, {**feeds, **only})[0]
            np.testing.assert_allclose(got, wanted_half, rtol=1e-4, atol=1e-4)
            assert oa.remove(half).proto == base.proto


def test_only_the_readers_that_are_named_read_the_changed_weight() -> None:
    nodes = [
        helper.make_node("Einsum", ["x", "w"], ["a"], "one", equation="nk,km->nm"),
        helper.make_node("Einsum", ["x", "w"], ["b"], "two", equation="nk,km->nm"),
    ]
    base = model(nodes, {"x": ["n", 4]}, ["a", "b"], {"w": random(4, 3)})
    slot = slot_on(base, "w", readers=["b"])
    own = trained(slot)
    adapted = oa.insert_checkpoint(base, checkpoint(base, [slot], {"s": own}))
    assert damages(adapted) == []
    feeds = feeds_of(base)
    fed = {f"adapter.s.{part}": value for part, value in own.items()}
    one, two = run(adapted, {**feeds, **fed})
    np.testing.assert_array_equal(one, run(base, feeds)[0])
    np.testing.assert_allclose(
        two, feeds["x"] @ changed(slot, value_of(base, "w"), own), rtol=1e-4, atol=1e-4
    )
    assert oa.remove(adapted).proto == base.proto


def test_a_slot_on_a_weight_goes_together_with_one_behind_its_reader() -> None:
    base = attention()
    slot = slot_on(base, "w")
    adapted = oa.insert_checkpoint(base, checkpoint(base, [slot], {"s": trained(slot)}))
    both = oa.insert(adapted, after="y", axis=-1)
    assert oa.verify(base, both, inputs=feeds_of(base)).passed
    other = oa.insert(base, after="y", axis=-1)
    late = slot_on(other, "w")
    mixed = oa.insert_checkpoint(other, checkpoint(other, [late], {"s": trained(late)}))
    assert oa.verify(base, mixed, inputs=feeds_of(base)).passed
    for made in (both, mixed):
        assert damages(made) == []
        assert oa.remove(made).proto == base.proto
        kept = oa.remove(made, slots="s")
        assert oa.remove(kept).proto == base.proto


def test_rows_with_adapters_of_their_own_are_refused() -> None:
    base = attention()
    slot = slot_on(base, "w")
    with pytest.raises(SlotError, match="which all rows of a run share") as caught:
        oa.insert_checkpoint(
            base, checkpoint(base, [slot], {"s": trained(slot)}), batched=True
        )
    assert "without --batched" in (caught.value.hint or "")


def test_a_session_swaps_adapters_and_runs_each_row_with_its_own(tmp_path: Path) -> None:
    base = attention()
    slot = slot_on(base, "w")
    made = [checkpoint(base, [slot], {"s": trained(slot, seed=s)}).adapter for s in (1, 5)]
    path = tmp_path / "m.onnx"
    oa.save_model(oa.insert_checkpoint(base, checkpoint(base, [slot], made[0].weights)), path)
    feeds = {"x": random(2, 5, 8, seed=3)}
    with oa.AdapterSession(path, adapters={"a": made[0], "b": made[1]}) as active:
        alone = {name: active.run(feeds, adapter=name)["y"] for name in "ab"}
        rows = active.run(feeds, adapter=["a", "b"])["y"]
        base_rows = active.run(feeds)["y"]
    np.testing.assert_allclose(rows[0], alone["a"][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows[1], alone["b"][1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(base_rows, run(base, feeds)[0], rtol=1e-5, atol=1e-6)
    assert np.abs(alone["a"] - alone["b"]).max() > 0.1


def test_a_weight_that_nothing_reads_any_more_is_damage() -> None:
    base = attention()
    slot = slot_on(base, "w")
    adapted = oa.insert_checkpoint(base, checkpoint(base, [slot], {"s": trained(slot)}))
    for node in adapted.proto.graph.node:
        if node.name == "attend":
            node.input[1] = "w"
    assert any("has no effect" in text for text in damages(adapted))


def test_parts_that_no_slot_on_a_weight_has_are_refused() -> None:
    base = attention()
    slot = slot_on(base, "w", parts=("down", "up", "up_bias"))
    with pytest.raises(SlotError, match="it has the part 'up_bias'"):
        oa.insert_checkpoint(
            base, checkpoint(base, [slot], {"s": trained(slot_on(base, "w"))})
        )


def test_float16_weights_verify() -> None:
    base = attention("float16")
    slot = slot_on(base, "w")
    adapted = oa.insert_checkpoint(base, checkpoint(base, [slot], {"s": trained(slot)}))
    session(adapted.proto)
    report = oa.verify(base, adapted, inputs=feeds_of(base))
    assert [(c.name, c.detail) for c in report.checks if not c.passed] == []


# Random walks ------------------------------------------------------------------------------

WALK = settings(max_examples=40, deadline=None, database=None)
STEPS = ("w1", "w2", "w1 scaled", "w2 scaled", "after a", "remove", "fill")


def two_products() -> oa.Model:
    """`relu(x @ w1) @ w2`."""
    nodes = [
        helper.make_node("Einsum", ["x", "w1"], ["a"], "one", equation="nk,km->nm"),
        helper.make_node("Relu", ["a"], ["h"], "relu"),
        helper.make_node("Einsum", ["h", "w2"], ["y"], "two", equation="nk,km->nm"),
    ]
    stored = {"w1": random(4, 5, dtype="float64"), "w2": random(5, 3, seed=1, dtype="float64")}
    return model(nodes, {"x": ["n", 4]}, ["y"], stored, dtype="float64")


def computed(
    x: Array, slots: list[tuple[str, oa.Slot]], own: dict[str, dict[str, Array]]
) -> Array:
    """What the model computes with its slots on, in numpy."""
    weights = {
        "w1": random(4, 5, dtype="float64"),
        "w2": random(5, 3, seed=1, dtype="float64"),
    }
    for place, slot in slots:
        if place in weights:
            weights[place] = changed(slot, weights[place], own[slot.name])
    a = x @ weights["w1"]
    for place, slot in slots:
        if place == "a":
            parts = own[slot.name]
            a = a + np.maximum(a @ parts["down"], 0) @ parts["up"]
    return np.maximum(a, 0) @ weights["w2"]


@WALK
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 99)), min_size=1, max_size=7))
def test_a_random_walk_of_edits_computes_what_numpy_does(walk: list[tuple[str, int]]) -> None:
    base = two_products()
    current, slots = base, list[tuple[str, oa.Slot]]()
    own: dict[str, dict[str, Array]] = {}
    for number, (step, seed) in enumerate(walk):
        if step == "remove" and slots:
            place, slot = slots.pop(seed % len(slots))
            current = oa.remove(current, slots=slot.name)
        elif step == "after a":
            current = oa.insert(current, after="a", axis=-1)
            slot = oa.list_slots(current)[-1]
            shapes = {"down": (5, 2), "up": (2, 5)}
            own[slot.name] = {
                p: random(*s, seed=seed, dtype="float64") for p, s in shapes.items()
            }
            slots.append(("a", slot))
        elif step[:2] in ("w1", "w2"):
            place = step[:2]
            parts = ("down", "up", "scale") if "scaled" in step else ("down", "up")
            tensor = next(
                n.input[1] for n in current.proto.graph.node if n.name == _READER[place]
            )
            slot = replace(
                slot_on(current, tensor, name=f"s{number}", parts=parts), tensor=place
            )
            own[slot.name] = trained(slot, 2, seed)
            made = checkpoint(current, [slot], {slot.name: own[slot.name]})
            current = oa.insert_checkpoint(current, made)
            slots.append((place, slot))
        elif step == "fill" and slots:
            adapter = oa.make_adapter(current, "a", {s.name: own[s.name] for _, s in slots})
            np.testing.assert_allclose(
                run(oa.fill(current, adapter), {"x": WALKED})[0], computed(WALKED, slots, own)
            )
        assert not slots or damages(current) == []
        fed = {f"adapter.{s.name}.{p}": v for _, s in slots for p, v in own[s.name].items()}
        got = run(current, {"x": WALKED, **fed})[0]
        np.testing.assert_allclose(got, computed(WALKED, slots, own), 1e-9, 1e-9)
    if slots:
        assert oa.verify(base, current, inputs={"x": WALKED}).passed
        current = oa.remove(current)
    assert current.proto.SerializeToString() == base.proto.SerializeToString()


_READER = {"w1": "one", "w2": "two"}
WALKED = random(3, 4, seed=7, dtype="float64")
