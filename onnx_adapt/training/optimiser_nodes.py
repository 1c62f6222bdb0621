"""Optimisers as ONNX nodes: the same as `optimisers.py`, for models that train elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.training.optimisers import Optimiser

FLOAT = onnx.TensorProto.FLOAT
DOUBLE = onnx.TensorProto.DOUBLE

Change = tuple[str, dict[str, str]]
"""What is subtracted for a rate of 1, and the new memory by part."""

Emit = Callable[[Tape, str, Mapping[str, str], str], Change]
"""Adds the nodes for one weight, from its gradient, its memory and the number of the step."""


def _mixed(tape: Tape, old: str, kept: float, new: str) -> str:
    """`kept * old + (1 - kept) * new`."""
    return tape.add("Add", tape.times(old, kept), tape.times(new, 1 - kept))


def _unbiased(tape: Tape, count: str, kept: float) -> str:
    """`1 - kept ** count`, in float64: in float32 half of its digits would be lost."""
    wide = tape.once("Cast", count, elem_type=DOUBLE, to=DOUBLE)
    power = tape.once("Pow", tape.constant(np.array(kept)), wide)
    rest = tape.once("Sub", tape.constant(np.array(1.0)), power)
    return tape.once("Cast", rest, elem_type=FLOAT, to=FLOAT)


def _adam(tape: Tape, grad: str, memory: Mapping[str, str], count: str) -> Change:
    mean = _mixed(tape, memory["mean"], 0.9, grad)
    square = _mixed(tape, memory["square"], 0.999, tape.add("Mul", grad, grad))
    root = tape.add("Sqrt", tape.add("Div", square, _unbiased(tape, count, 0.999)))
    first = tape.add("Div", mean, _unbiased(tape, count, 0.9))
    change = tape.add("Div", first, tape.plus(root, 1e-8))
    return change, {"mean": mean, "square": square}


def _sgd(tape: Tape, grad: str, memory: Mapping[str, str], count: str) -> Change:
    return grad, {}


def _momentum(tape: Tape, grad: str, memory: Mapping[str, str], count: str) -> Change:
    velocity = tape.add("Add", tape.times(memory["velocity"], 0.9), grad)
    return velocity, {"velocity": velocity}


def _lion(tape: Tape, grad: str, memory: Mapping[str, str], count: str) -> Change:
    change = tape.add("Sign", _mixed(tape, memory["mean"], 0.9, grad))
    return change, {"mean": _mixed(tape, memory["mean"], 0.99, grad)}


NODES: dict[str, Emit] = {
    "adamw": _adam,
    "sgd": _sgd,
    "momentum": _momentum,
    "lion": _lion,
}
"""The nodes of each optimiser in `optimisers.RULES`."""


def clipped(tape: Tape, grads: Sequence[str], largest: float) -> list[str]:
    """Gradients scaled down so that their common norm is at most `largest`; 0 for no limit."""
    if not largest:
        return list(grads)
    squares = [tape.add("ReduceSumSquare", grad, keepdims=0) for grad in grads]
    norm = tape.add("Sqrt", tape.add("Sum", *squares))
    limit = tape.constant(np.array(largest, np.float32))
    factor = tape.add("Div", limit, tape.add("Max", norm, limit))
    return [tape.add("Mul", grad, factor) for grad in grads]


def updated(
    tape: Tape,
    optimiser: Optimiser,
    weight: str,
    grad: str,
    memory: Mapping[str, str],
    *,
    count: str,
    rate: str,
    decays: bool,
) -> Change:
    """Add the nodes of one step for one weight.

    Args:
        tape: Where to add them.
        optimiser: The optimiser; its clipping is done before, by `clipped`.
        weight: The weight, in float32.
        grad: Its gradient.
        memory: Its memory, by part.
        count: The number of the step, from 1.
        rate: The learning rate.
        decays: Whether the weight decays.

    Returns:
        The new weight, and its new memory by part.
    """
    change, after = NODES[optimiser.name](tape, grad, memory, count)
    if decays and optimiser.decay:
        taken = tape.once("Mul", rate, tape.number(optimiser.decay, rate))
        kept = tape.once("Sub", tape.number(1, rate), taken)
        weight = tape.add("Mul", weight, kept)
    return tape.add("Sub", weight, tape.add("Mul", change, rate)), after
