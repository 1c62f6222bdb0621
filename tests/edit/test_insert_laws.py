"""Laws of insertion and removal on random graphs with branches and shared weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import Program, Weights, X, places, programs
from slot_models import assert_sound, run

import onnx_adapt as oa

LAW = settings(max_examples=60, deadline=None, database=None)


def _weights(slots: Sequence[oa.Slot]) -> dict[str, Weights]:
    """Weights by slot: those of the nth slot on a tensor are always the same."""
    found: dict[str, Weights] = {}
    levels: dict[str, int] = {}
    for slot in slots:
        level = levels[slot.tensor] = levels.get(slot.tensor, -1) + 1
        rng = np.random.default_rng([int(slot.tensor[1:]), level])
        size = 1 + level
        shapes = ((4, size), (size, 4))
        found[slot.name] = tuple(rng.standard_normal(s) / 2 for s in shapes)  # type: ignore
    return found


def _outputs(model: oa.Model, taken: bool, weights: Mapping[str, Weights]) -> list[np.ndarray]:
    feeds = {"x": X}
    if any(value.name == "c" for value in model.proto.graph.input):
        feeds["c"] = np.array(taken)
    for name, (down, up) in weights.items():
        feeds |= {f"adapter.{name}.down": down, f"adapter.{name}.up": up}
    return run(model, feeds)


def _check_on(program: Program, model: oa.Model) -> None:
    """The model computes the program with its slots, in both branches."""
    slots = oa.list_slots(model)
    weights = _weights(slots)
    by_tensor: dict[str, list[Weights]] = {}
    for slot in slots:
        by_tensor.setdefault(slot.tensor, []).append(weights[slot.name])
    for taken in (True, False):
        got = _outputs(model, taken, weights)
        for a, b in zip(got, program.compute(taken, by_tensor), strict=True):
            np.testing.assert_allclose(a, b, 1e-9, 1e-9)


@LAW
@given(programs(), st.data())
def test_slots_that_are_off_change_no_output(program: Program, data: st.DataObject) -> None:
    base = program.model()
    after = data.draw(st.lists(st.sampled_from(places(base)), min_size=1, max_size=5))
    adapted = oa.insert(base, after=after)
    assert_sound(adapted)
    for taken in (True, False):
        pairs = zip(_outputs(adapted, taken, {}), _outputs(base, taken, {}), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


@LAW
@given(programs(), st.data())
def test_slots_that_are_on_compute_their_formula(
    program: Program, data: st.DataObject
) -> None:
    base = program.model()
    after = data.draw(st.lists(st.sampled_from(places(base)), min_size=1, max_size=5))
    adapted = oa.insert(base, after=after)
    assert len(oa.list_slots(adapted)) == len(after)
    _check_on(program, adapted)


@LAW
@given(programs(wild=True), st.data())
def test_removal_is_the_reverse_of_any_insertions(
    program: Program, data: st.DataObject
) -> None:
    base = program.model()
    before = base.proto.SerializeToString()
    model = base
    for _ in range(data.draw(st.integers(1, 3))):
        after = data.draw(st.lists(st.sampled_from(places(model)), min_size=1, max_size=3))
        model = oa.insert(model, after=after)
    assert base.proto.SerializeToString() == before
    assert oa.remove(model).proto.SerializeToString() == before


@LAW
@given(programs(), st.data())
def test_the_slots_that_are_left_do_not_notice_a_removal(
    program: Program, data: st.DataObject
) -> None:
    base = program.model()
    model = base
    for _ in range(2):
        after = data.draw(st.lists(st.sampled_from(places(model)), min_size=1, max_size=3))
        model = oa.insert(model, after=after)
    names = [slot.name for slot in oa.list_slots(model)]
    gone = data.draw(st.lists(st.sampled_from(names), max_size=len(names), unique=True))
    less = oa.remove(model, slots=gone)
    assert [slot.name for slot in oa.list_slots(less)] == [n for n in names if n not in gone]
    assert_sound(less)
    _check_on(program, less)


@LAW
@given(programs(), st.data())
def test_the_order_of_insertion_does_not_change_the_outputs(
    program: Program, data: st.DataObject
) -> None:
    base = program.model()
    after = data.draw(
        st.lists(st.sampled_from(places(base)), min_size=1, max_size=4, unique=True)
    )
    at_once = oa.insert(base, after=after)
    one_by_one = base
    tensors = [address.rpartition(":")[2] for address in data.draw(st.permutations(after))]
    for tensor in tensors:
        one_by_one = oa.insert(one_by_one, after=tensor)
    for taken in (True, False):
        pairs = zip(
            _outputs(at_once, taken, _weights(oa.list_slots(at_once))),
            _outputs(one_by_one, taken, _weights(oa.list_slots(one_by_one))),
            strict=True,
        )
        assert all(np.array_equal(a, b) for a, b in pairs)
