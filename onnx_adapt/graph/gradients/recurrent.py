"""Rules for LSTM, GRU and RNN: one Scan against the direction of the operator."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_adapt.graph.gradients.cells import cell_of
from onnx_adapt.graph.gradients.rule import Grads, Rule, Step
from onnx_adapt.graph.gradients.scans import Direction, cells_before, scan_back
from onnx_adapt.graph.gradients.tape import INT64, Tape

# Of each step the states before it are known: `h` is what the operator gave one step earlier,
# and `c` of an LSTM is computed once more. So each step can be computed again by itself, and
# its gradient follows from the rules of its own nodes (Werbos, 1990). With `dh` from the step
# behind it and `dy` from the operator's output, one step back is
#
#     da, dh = gradients of the cell at (a, h) for dh + dy
#
# What the input gives to all steps, `a = x @ w.T + bias`, is one product, and so is its
# gradient. Where a row has ended (`sequence_lens`), `dh` is passed on as it is.


def recurrent(tape: Tape, step: Step) -> Grads:
    """LSTM, GRU and RNN, in one direction or both."""
    count = 2 if step.attribute("direction", "forward") == "bidirectional" else 1
    all_steps = step.output or _again(tape, step)
    found = [_direction_grads(tape, step, number, all_steps) for number in range(count)]
    grads: list[str | None] = []
    for position in range(len(step.node.input)):
        if not step.wants(position):
            grads.append(None)
            continue
        parts = [made[position] for made in found]
        if position == 0:
            grads.append(tape.add("Sum", *parts) if count > 1 else parts[0])
        else:
            stacked = [tape.unsqueezed(part, 0) for part in parts]
            grads.append(tape.add("Concat", *stacked, axis=0))
    return grads


def _again(tape: Tape, step: Step) -> str:
    """The states of all steps, of a node that gives only the last one."""
    node = onnx.NodeProto()
    node.CopyFrom(step.node)
    (made,) = tape.add_several(node.op_type, list(node.input), 1)
    tape.nodes[-1].attribute.extend(node.attribute)
    return made


def _direction_grads(tape: Tape, step: Step, number: int, all_steps: str) -> dict[int, str]:
    """The gradients of one direction's share of the inputs, by position."""
    x, w, bias = step.input(0), step.input(1), step.input(3)
    weight = _pick(tape, w, number)
    one = _prepared(tape, step, number, all_steps, weight, bias)
    dy, *last = (*step.grads, "", "")[:3]
    dy = tape.add("Gather", dy, _place(tape, number), axis=1) if dy else ""
    last = [_pick(tape, grad, number) if grad else "" for grad in last]
    da, states, sums = scan_back(one, dy, last)
    made = dict(zip((5, 6), states.values(), strict=False))
    if step.wants(0):
        made[0] = tape.add("MatMul", da, weight)
    flat_da = tape.add("Reshape", da, tape.integers(-1, _rows(one)))
    if step.wants(1):
        flat_x = tape.add("Reshape", x, tape.joined(tape.integers(-1), tape.size(x, 2)))
        made[1] = tape.add("MatMul", tape.permuted(flat_da, (1, 0)), flat_x)
    if step.wants(2):
        made[2] = sums["r"]
    if step.wants(3):
        own = tape.total(flat_da, [0], keep=False)
        made[3] = tape.add("Concat", own, sums.get("rb", own), axis=0)
    return made


def _pick(tape: Tape, tensor: str, number: int) -> str:
    """The part of a direction: the tensor without its first axis."""
    return tape.add("Gather", tensor, _place(tape, number), axis=0)


def _place(tape: Tape, number: int) -> str:
    return tape.constant(np.array(number, np.int64))


def _rows(one: Direction) -> int:
    return one.cell.gates * int(one.step.attribute("hidden_size", 0))


def _prepared(
    tape: Tape, step: Step, number: int, all_steps: str, weight: str, bias: str
) -> Direction:
    """All that the steps of a direction read."""
    x, size = step.input(0), int(step.attribute("hidden_size", 0))
    cell = cell_of(step, number, tape.elem_type(x))
    a = tape.add("MatMul", x, tape.permuted(weight, (1, 0)))
    params = {"r": _pick(tape, step.input(2), number)}
    rows = cell.gates * size
    halves = (
        tape.add_several("Split", (_pick(tape, bias, number), tape.integers(rows, rows)), 2)
        if bias
        else [tape.constant(np.zeros(rows, tape.dtype(x)))] * 2
    )
    a = tape.add("Add", a, halves[0])
    if "rb" in cell.params:
        params["rb"] = halves[1]
    else:
        a = tape.add("Add", a, halves[1])
    own = tape.add("Gather", all_steps, _place(tape, number), axis=1)
    zeros = tape.add(
        "Expand", tape.number(0, x), tape.joined(tape.size(x, 1), tape.integers(size))
    )
    first = {
        name: _pick(tape, step.input(position), number) if step.input(position) else zeros
        for name, position in zip(cell.states, (5, 6), strict=False)
    }
    valid = _valid_steps(tape, step) if step.input(4) else ""
    one = Direction(tape, step, number, cell, a, valid, {}, first, params)
    one.before["h"] = _shifted(one, own)
    if "c" in cell.states:
        one.before["c"] = cells_before(one)
    return one


def _valid_steps(tape: Tape, step: Step) -> str:
    """Which steps of each row count: `(steps, batch, 1)`."""
    zero, one = (tape.constant(np.array(value, np.int64)) for value in (0, 1))
    steps = tape.squeezed(tape.size(step.input(0), 0), 0)
    order = tape.add("Range", zero, steps, one, elem_type=INT64)
    lengths = tape.unsqueezed(tape.cast(step.input(4), INT64), 0, 2)
    return tape.compare("Less", tape.unsqueezed(order, 1, 2), lengths)


def _shifted(one: Direction, states: str) -> str:
    """The state before each step, of those behind each step."""
    tape, end = one.tape, one.tape.integers(np.iinfo(np.int64).max)
    first = tape.unsqueezed(one.first["h"], 0)
    zero = tape.integers(0)
    if not one.reversed:
        earlier = tape.add("Slice", states, zero, tape.integers(-1), zero)
        return tape.add("Concat", first, earlier, axis=0)
    later = tape.add("Slice", states, tape.integers(1), end, zero)
    if one.valid:  # the last step that counts of a row is its first
        counts = tape.add("Slice", one.valid, tape.integers(1), end, zero)
        later = tape.where(counts, later, first)
    return tape.add("Concat", later, first, axis=0)


RECURRENT: dict[str, Rule] = dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent)
"""The rules by operator."""
