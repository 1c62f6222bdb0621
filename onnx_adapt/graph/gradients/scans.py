"""The Scans of a recurrent gradient: the cell, step by step, in one direction or the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from onnx_adapt.graph.gradients.backward import go_back
from onnx_adapt.graph.gradients.cells import Cell
from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.gradients.tape import BOOL, Tape
from onnx_adapt.graph.index import index_model
from onnx_adapt.model.file import Model


@dataclass(frozen=True, slots=True)
class Direction:
    """One direction of a recurrent node on the way back.

    Attributes:
        tape: Where nodes are added.
        step: The node.
        number: 0, or 1 for the second of two directions.
        cell: One step.
        a: What the input gives to each step, `(steps, batch, gates * hidden)`.
        valid: Which steps of each row count, `(steps, batch, 1)`; '' if all do.
        before: The states before each step, `(steps, batch, hidden)`, by name.
        first: The states before the first step, `(batch, hidden)`, by name.
        params: The cell's parameters in the graph, by name.
    """

    tape: Tape
    step: Step
    number: int
    cell: Cell
    a: str
    valid: str
    before: dict[str, str]
    first: dict[str, str]
    params: dict[str, str]

    @property
    def reversed(self) -> bool:
        """Whether it begins at the last step."""
        return self.number == 1 or self.step.attribute("direction", "forward") == "reverse"


def cells_before(one: Direction) -> str:
    """The state `c` before each step, which an LSTM does not give."""
    body = _Body.of(one, "cells")
    own = body.name
    reads = {own["a"]: one.a, own["h"]: one.before["h"]}
    after = own["c_next"]
    if one.valid:
        valid = body.read("valid", reads, one.valid, BOOL)
        after = body.tape.where(valid, after, own["c"])
    states = {own["c"]: one.first["c"]}
    return body.scan(states, reads, [after], [own["c"]], backwards=one.reversed)[1]


def scan_back(
    one: Direction, dy: str, last: Sequence[str]
) -> tuple[str, dict[str, str], dict[str, str]]:
    """Go back through all steps.

    Args:
        one: The direction.
        dy: The gradient of the states of all steps, `(steps, batch, hidden)`; or ''.
        last: The gradients of the last states, `(batch, hidden)`; '' for none.

    Returns:
        The gradient of `a`, those of the first states, and those of the parameters.
    """
    tape, cell = one.tape, one.cell
    body = _Body.of(one, "back")
    inner, own = body.tape, body.name
    reads = {own["a"]: one.a} | {own[name]: one.before[name] for name in cell.states}
    zeros = tape.zeros_like_made(one.first["h"])
    states = {
        body.declare(f"d{name}", tape.elem_type(one.a)): grad or zeros
        for name, grad in zip(cell.states, last, strict=False)
    }
    behind = dict(zip(cell.states, states, strict=True))
    seeds = dict(behind)
    if dy:
        shown = body.read("dy", reads, dy, tape.elem_type(dy))
        seeds["h"] = inner.add("Add", seeds["h"], shown)
    valid = body.read("valid", reads, one.valid, BOOL) if one.valid else ""
    if valid:
        seeds = {name: inner.kept_where(valid, grad) for name, grad in seeds.items()}
    wanted = [name for name in cell.params if one.step.wants(2 if name == "r" else 3)]
    sums = {name: body.declare(f"sum_{name}", tape.elem_type(one.a)) for name in wanted}
    states |= {sums[name]: tape.zeros_like_made(one.params[name]) for name in wanted}
    found = go_back(
        inner,
        {own[f"{name}_next"]: grad for name, grad in seeds.items()},
        [own[name] for name in ("a", *cell.states, *wanted)],
    )
    after = [found[own[name]] for name in cell.states]
    if valid:
        after = [
            inner.where(valid, new, behind[name])
            for name, new in zip(cell.states, after, strict=True)
        ]
    after += [inner.add("Add", sums[name], found[own[name]]) for name in wanted]
    made = body.scan(states, reads, after, [found[own["a"]]], backwards=not one.reversed)
    count = len(cell.states)
    return (
        made[-1],
        dict(zip(cell.states, made[:count], strict=True)),
        dict(zip(wanted, made[count:-1], strict=True)),
    )


@dataclass(frozen=True, slots=True)
class _Body:
    """The body of a Scan around a cell, whose tensors have names of their own there.

    Attributes:
        one: The direction.
        tape: Where nodes are added.
        nodes: The nodes of the cell.
        name: The cell's tensors, by their names in its text.
    """

    one: Direction
    tape: Tape
    nodes: Sequence[onnx.NodeProto]
    name: Mapping[str, str]

    @classmethod
    def of(cls, one: Direction, part: str) -> _Body:
        """A body with the cell of a direction."""
        prefix = f"{one.tape.prefix}{len(one.tape.nodes)}:{part}:cell:"
        graph = onnx.GraphProto()
        graph.CopyFrom(one.cell.graph)
        values = (*graph.input, *graph.output)
        made = [name for node in graph.node for name in node.output]
        names = {name: prefix + name for name in (*(v.name for v in values), *made)}
        for node in graph.node:
            node.input[:] = [names[name] for name in node.input]
            node.output[:] = [names[name] for name in node.output]
            node.name = node.output[0]
        for value in values:
            value.name = names[value.name]
        opset = helper.make_opsetid("", one.tape.opset)
        model = Model(helper.make_model(graph, opset_imports=[opset]))
        view = index_model(model).main
        return cls(one, one.tape.inside(view, part, model), view.nodes, names)

    def declare(self, name: str, elem_type: int) -> str:
        """An input of the body that the cell does not have."""
        made = f"{self.tape.prefix}{name}"
        self.tape.elem_types[made] = elem_type
        return made

    def read(self, name: str, reads: dict[str, str], outer: str, elem_type: int) -> str:
        """An input that holds one step of a tensor of the graph."""
        made = self.declare(name, elem_type)
        reads[made] = outer
        return made

    def scan(
        self,
        states: Mapping[str, str],
        reads: Mapping[str, str],
        after: Sequence[str],
        shown: Sequence[str],
        *,
        backwards: bool,
    ) -> list[str]:
        """Add the Scan.

        Args:
            states: What is carried from step to step, with what it begins with.
            reads: What is read step by step, with the tensors in the graph.
            after: What is carried on.
            shown: What is put together over all steps.
            backwards: Whether it begins at the last step.

        Returns:
            The last states, then what was put together.
        """
        inner, outer = self.tape, self.one.tape
        results = [inner.add("Identity", name) for name in (*after, *shown)]
        params = [
            helper.make_node("Identity", [tensor], [self.name[name]], self.name[name])
            for name, tensor in self.one.params.items()
        ]
        body = helper.make_graph(
            [*params, *self.nodes, *inner.nodes],
            f"{inner.prefix}body",
            [
                helper.make_tensor_value_info(name, inner.elem_type(name), None)
                for name in (*states, *reads)
            ],
            [
                helper.make_tensor_value_info(name, inner.elem_type(name), None)
                for name in results
            ],
        )
        way = int(backwards)
        given = [*states.values(), *reads.values()]
        made = outer.add_several(
            "Scan",
            given,
            len(results),
            num_scan_inputs=len(reads),
            scan_input_directions=[way] * len(reads),
            scan_output_directions=[way] * len(shown),
        )
        outer.nodes[-1].attribute.append(helper.make_attribute("body", body))
        return made
