"""Rules for operators that sum, average or choose along axes."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_adapt.graph.gradients.rule import Grads, Rule, Step, only
from onnx_adapt.graph.gradients.tape import INT64, Tape


@dataclass(frozen=True, slots=True)
class _Reduced:
    """A reduction on the way back.

    Attributes:
        tape: Where nodes are added.
        step: The node.
    """

    tape: Tape
    step: Step

    @property
    def x(self) -> str:
        """What is reduced."""
        return self.step.input()

    def kept(self, tensor: str) -> str:
        """A tensor of the output's shape with the reduced axes back, of size 1."""
        if self.step.attribute("keepdims", 1):
            return tensor
        axes = self._axes()
        if axes:
            return self.tape.add("Unsqueeze", tensor, axes)
        ones = self.tape.integers(*[1] * self.tape.rank(self.x))
        return self.tape.add("Reshape", tensor, ones)

    def _axes(self) -> str:
        """The reduced axes as a tensor, or '' if all are."""
        given = self.step.attribute("axes", None)
        if given is not None:
            return self.tape.integers(*given)
        return self.step.input(1)

    def all_when_empty(self) -> bool:
        """Whether the node reduces nothing if it is given no axes."""
        return bool(self.step.attribute("noop_with_empty_axes", 0)) and not self._axes()

    def expanded(self, tensor: str) -> str:
        """A tensor of the output's shape repeated to the input's."""
        return self.tape.add("Expand", self.kept(tensor), self.tape.shape_of(self.x))


def reduce_sum(tape: Tape, step: Step) -> Grads:
    """The sum."""
    reduced = _Reduced(tape, step)
    return only(step.grad if reduced.all_when_empty() else reduced.expanded(step.grad))


def reduce_mean(tape: Tape, step: Step) -> Grads:
    """The mean: the gradient is spread over all numbers that were averaged."""
    reduced = _Reduced(tape, step)
    if reduced.all_when_empty():
        return only(step.grad)
    sizes = [tape.once("Size", t, elem_type=INT64) for t in (step.output, reduced.x)]
    share = tape.add("Div", *(tape.cast(size, tape.elem_type(step.grad)) for size in sizes))
    return only(reduced.expanded(tape.add("Mul", step.grad, share)))


def reduce_choice(tape: Tape, step: Step) -> Grads:
    """The largest or smallest: the gradient goes there, in equal parts to equal ones."""
    reduced = _Reduced(tape, step)
    best = reduced.expanded(step.output)
    chosen = tape.compare("Equal", reduced.x, best)
    ones = tape.cast(chosen, tape.elem_type(step.grad))
    axes = step.attribute("axes", None)
    names = (
        (tape.integers(*axes),) if axes is not None else tuple(filter(None, [step.input(1)]))
    )
    count = tape.add("ReduceSum", ones, *names, keepdims=1)
    share = tape.add("Div", reduced.kept(step.grad), count)
    return only(tape.add("Mul", ones, share))


def reduce_log_sum_exp(tape: Tape, step: Step) -> Grads:
    """`log(sum(exp(x)))`: the softmax."""
    reduced = _Reduced(tape, step)
    softmax = tape.add("Exp", tape.add("Sub", reduced.x, reduced.kept(step.output)))
    return only(tape.add("Mul", softmax, reduced.kept(step.grad)))


def reduce_log_sum(tape: Tape, step: Step) -> Grads:
    """`log(sum(x))`: `1 / sum(x)`."""
    reduced = _Reduced(tape, step)
    share = tape.add("Mul", step.grad, tape.add("Exp", tape.add("Neg", step.output)))
    return only(reduced.expanded(share))


def reduce_sum_square(tape: Tape, step: Step) -> Grads:
    """The sum of squares: `2 x`."""
    reduced = _Reduced(tape, step)
    return only(tape.add("Mul", tape.times(reduced.x, 2), reduced.kept(step.grad)))


def reduce_l1(tape: Tape, step: Step) -> Grads:
    """The sum of magnitudes: the sign."""
    reduced = _Reduced(tape, step)
    return only(tape.add("Mul", tape.add("Sign", reduced.x), reduced.kept(step.grad)))


def reduce_l2(tape: Tape, step: Step) -> Grads:
    """The norm: `x / norm`, and 0 where the norm is 0, as in PyTorch."""
    reduced = _Reduced(tape, step)
    norm = step.output
    zero = tape.compare("Equal", norm, tape.number(0, norm))
    share = tape.add("Div", step.grad, tape.where(zero, tape.number(1, norm), norm))
    return only(
        tape.add("Mul", reduced.x, reduced.kept(tape.where(zero, tape.number(0, norm), share)))
    )


def _soft_axes(tape: Tape, step: Step) -> tuple[int, ...]:
    return (step.attribute("axis", -1) % tape.rank(step.input()),)


def softmax(tape: Tape, step: Step) -> Grads:
    """`y (dy - sum(dy y))`."""
    product = tape.add("Mul", step.grad, step.output)
    total = tape.total(product, _soft_axes(tape, step))
    return only(tape.add("Sub", product, tape.add("Mul", step.output, total)))


def log_softmax(tape: Tape, step: Step) -> Grads:
    """`dy - exp(y) sum(dy)`."""
    total = tape.total(step.grad, _soft_axes(tape, step))
    return only(
        tape.add("Sub", step.grad, tape.add("Mul", tape.add("Exp", step.output), total))
    )


def cumulative_sum(tape: Tape, step: Step) -> Grads:
    """The running sum: the running sum of the gradient from the other end."""
    backwards = 1 - step.attribute("reverse", 0)
    exclusive = step.attribute("exclusive", 0)
    axis = step.input(1)
    return only(tape.add("CumSum", step.grad, axis, reverse=backwards, exclusive=exclusive))


def top_k(tape: Tape, step: Step) -> Grads:
    """TopK: the gradient of each value goes to its place."""
    axis = step.attribute("axis", -1)
    zeros = tape.zeros_like(step.input())
    places = str(step.node.output[1])
    return only(tape.add("ScatterElements", zeros, places, step.grad, axis=axis))


REDUCTIONS: dict[str, Rule] = {
    "ReduceSum": reduce_sum,
    "ReduceMean": reduce_mean,
    **dict.fromkeys(("ReduceMax", "ReduceMin"), reduce_choice),
    "ReduceLogSumExp": reduce_log_sum_exp,
    "ReduceLogSum": reduce_log_sum,
    "ReduceSumSquare": reduce_sum_square,
    "ReduceL1": reduce_l1,
    "ReduceL2": reduce_l2,
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
    "CumSum": cumulative_sum,
    "TopK": top_k,
}
"""The rules by operator."""
