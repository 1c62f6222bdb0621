"""Laws of insertion and removal on random graphs with branches and shared weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from slot_models import assert_sound, run

import onnx_adapt as oa

LAW = settings(max_examples=60, deadline=None, database=None)
X = np.random.default_rng(0).standard_normal((3, 4))
WEIGHTS = {f"w{i}": np.random.default_rng(i).standard_normal((4, 4)) / 2 for i in (1, 2)}

ROUNDS = 2
"""How often each Loop goes round."""

COMPUTE: dict[str, Callable[..., np.ndarray]] = {
    "MatMul": np.matmul,
    "Add": np.add,
    "Relu": lambda v: np.maximum(v, 0),
    "Tanh": np.tanh,
    "Neg": np.negative,
}


@dataclass
class Step:
    """One node: what it computes, or the two bodies of an If, or the one of a Loop."""

    op: str
    name: str
    reads: list[str]
    out: str
    bodies: tuple[list[Step], ...] = ()

    def node(self) -> onnx.NodeProto:
        if self.op == "Loop":
            again = helper.make_node("Identity", [f"{self.out}_go"], [f"{self.out}_again"])
            body = helper.make_graph(
                [again, *(step.node() for step in self.bodies[0])],
                "body",
                [
                    helper.make_tensor_value_info(f"{self.out}_i", onnx.TensorProto.INT64, []),
                    helper.make_tensor_value_info(f"{self.out}_go", onnx.TensorProto.BOOL, []),
                    _value(f"{self.out}_carried"),
                ],
                [
                    helper.make_tensor_value_info(again.output[0], onnx.TensorProto.BOOL, []),
                    _value(self.bodies[0][-1].out),
                ],
            )
            reads = ["rounds", "", *self.reads]
            return helper.make_node("Loop", reads, [self.out], self.name, body=body)
        graphs = {
            key: helper.make_graph([s.node() for s in body], key, [], [_value(body[-1].out)])
            for key, body in zip(("then_branch", "else_branch"), self.bodies, strict=False)
        }
        return helper.make_node(self.op, self.reads, [self.out], self.name, **graphs)


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, ["n", 4])


@dataclass
class Program:
    """A random model, as nodes and as numpy."""

    steps: list[Step]
    outputs: list[str]

    def model(self) -> oa.Model:
        choice = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
        graph = helper.make_graph(
            [step.node() for step in self.steps],
            "g",
            [_value("x"), choice],
            [_value(name) for name in self.outputs],
            [
                *(numpy_helper.from_array(value, name) for name, value in WEIGHTS.items()),
                numpy_helper.from_array(np.array(ROUNDS), "rounds"),
            ],
        )
        opsets = [helper.make_opsetid("", 17)]
        model = oa.Model(helper.make_model(graph, opset_imports=opsets, ir_version=8))
        assert_sound(model)
        return model

    def compute(self, taken: bool, slots: Mapping[str, list[Weights]]) -> list[np.ndarray]:
        """The outputs, with the slots of a tensor applied in order."""
        found = {"x": X, **WEIGHTS}
        _compute(self.steps, taken, slots, found)
        return [found[name] for name in self.outputs]


Weights = tuple[np.ndarray, np.ndarray]


def _compute(
    steps: Sequence[Step], taken: bool, slots: Mapping[str, list[Weights]], found: dict
) -> None:
    for step in steps:
        if step.op == "If":
            body = step.bodies[0 if taken else 1]
            inner = dict(found)
            _compute(body, taken, slots, inner)
            value = inner[body[-1].out]
        elif step.op == "Loop":
            value = found[step.reads[0]]
            for _ in range(ROUNDS):
                inner = found | {f"{step.out}_carried": value}
                _compute(step.bodies[0], taken, slots, inner)
                value = inner[step.bodies[0][-1].out]
        else:
            value = COMPUTE[step.op](*(found[name] for name in step.reads))
        for down, up in slots.get(step.out, ()):
            value = value + np.maximum(value @ down, 0) @ up
        found[step.out] = value


def _steps(
    draw: st.DrawFn, known: list[str], numbers: Iterator[int], depth: int, wild: bool
) -> list[Step]:
    known, steps, used = list(known), [], {""}
    for _ in range(draw(st.integers(1, 4))):
        ops = ["MatMul", "MatMul", *COMPUTE, *(["If", "If", "Loop"] if depth < 2 else [])]
        op = draw(st.sampled_from(ops))
        out = f"t{next(numbers)}"
        reads = ["c"] if op == "If" else [draw(st.sampled_from(known))]
        bodies = ()
        if op == "If":
            bodies = tuple(_steps(draw, known, numbers, depth + 1, wild) for _ in range(2))
        elif op == "Loop":
            seen = [*known, f"{out}_carried"]
            bodies = (_steps(draw, seen, numbers, depth + 1, wild),)
        elif op == "MatMul":
            reads.append(draw(st.sampled_from(sorted(WEIGHTS))))
        elif op == "Add":
            reads.append(draw(st.sampled_from(known)))
        name = draw(st.sampled_from(["", "layer", "block", f"{out}_node"]))
        if not wild and name in used:  # ONNX Runtime wants them unique in each graph
            name = ""
        used.add(name)
        steps.append(Step(op, name, reads, out, bodies))
        known.append(out)
    return steps


@st.composite
def programs(draw: st.DrawFn, wild: bool = False) -> Program:
    steps = _steps(draw, ["x"], itertools.count(), 0, wild)
    made = [step.out for step in steps]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    return Program(steps, outputs)


def _places(model: oa.Model) -> list[str]:
    sites = oa.find_sites(model, all_tensors=True)
    return [site.address for site in sites if site.refused is None]


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
    after = data.draw(st.lists(st.sampled_from(_places(base)), min_size=1, max_size=5))
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
    after = data.draw(st.lists(st.sampled_from(_places(base)), min_size=1, max_size=5))
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
        after = data.draw(st.lists(st.sampled_from(_places(model)), min_size=1, max_size=3))
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
        after = data.draw(st.lists(st.sampled_from(_places(model)), min_size=1, max_size=3))
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
    places = _places(base)
    after = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4, unique=True))
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
