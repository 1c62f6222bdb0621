"""How many floating-point operations an operator with weights has in one run.

A multiply-add is two operations; so is a multiply and an add. A bias is one operation for
each number that it is added to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NodeRun:
    """A node and the shapes of one run of it.

    Attributes:
        op: Its operator.
        domain: The operator's domain.
        attributes: Its attributes, by name.
        inputs: Shapes of its inputs by their position; None where one is left out.
        outputs: The same of its outputs.
    """

    op: str
    domain: str
    attributes: Mapping[str, Any]
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape | None, ...]

    def has(self, position: int | None) -> bool:
        """Whether an input is there."""
        return position is not None and self.inputs[position : position + 1] not in (
            (),
            (None,),
        )

    def input(self, position: int) -> Shape:
        """The shape of an input.

        Raises:
            LookupError: If it is left out.
        """
        return given(self.inputs[position])

    def size(self, position: int) -> int:
        """How many numbers an input has; 0 if it is left out."""
        return math.prod(self.input(position)) if self.has(position) else 0

    @property
    def made(self) -> int:
        """How many elements its first output has."""
        return next((math.prod(shape) for shape in self.outputs if shape is not None), 0)


def given(shape: Shape | None) -> Shape:
    """A shape that is known.

    Raises:
        LookupError: If it is not.
    """
    if shape is None:
        raise LookupError
    return shape


class Operations(Protocol):
    """The rule that counts the operations of an operator with weights.

    A rule raises a LookupError if an input that it needs is left out.
    """

    def __call__(self, run: NodeRun, /, *, weight: int, bias: int | None) -> int:
        """Count the operations of one run; `weight` and `bias` are positions of inputs."""


def product(run: NodeRun, *, weight: int, bias: int | None) -> int:
    """A matrix product: each element of the output is a sum over the inner axis.

    For example `(5, 3) @ (3, 7)` with a bias has `5 * 7` elements, each of 3 multiply-adds
    and one addition: `2 * 5 * 7 * 3 + 5 * 7` operations.
    """
    shape = run.input(0)
    inner = shape[-1]
    if run.attributes.get("transA"):
        inner = shape[0 if run.attributes.get("transBatchA") else -2]
    return 2 * run.made * inner + (run.made if run.has(bias) else 0)


def summed_products(run: NodeRun, *, weight: int, bias: int | None) -> int:
    """An Einsum: all indices together, times the products for each, and one more for a sum."""
    terms, arrow, result = run.attributes["equation"].replace(" ", "").partition("->")
    shapes = [given(shape) for shape in run.inputs]
    named = [
        item
        for term, shape in zip(terms.split(","), shapes, strict=True)
        for item in zip(_labels(term, shape), shape, strict=True)
    ]
    sizes: dict[str, int] = {}
    for name, size in named:  # an axis of 1 is as long as the others
        sizes[name] = size if sizes.get(name, 1) == 1 else sizes[name]
    if arrow:
        kept = set(_labels(result, given(run.outputs[0])))
    else:  # what is there once, and the axes that have no name
        every = [name for name, _ in named]
        kept = {name for name in every if every.count(name) == 1 or name[0] == "."}
    return math.prod(sizes.values()) * (len(shapes) - 1 + (not kept.issuperset(sizes)))


def _labels(term: str, shape: Shape) -> list[str]:
    """A name for each axis; those of an ellipsis are counted from the right, as numpy's."""
    before, dots, after = term.partition("...")
    rest = len(shape) - len(before) - len(after)
    return [*before, *(f".{i}" for i in range(rest, 0, -1) if dots), *after]


def convolution(run: NodeRun, *, weight: int, bias: int | None) -> int:
    """Each output meets the kernel of its channel: `(out, in / groups, places...)`."""
    return run.made * (2 * math.prod(run.input(weight)[1:]) + run.has(bias))


def convolution_and_sum(run: NodeRun, *, weight: int, bias: int | None) -> int:
    """ONNX Runtime's fused convolution: input 3, if it is there, is added to the result."""
    return convolution(run, weight=weight, bias=bias) + run.made * run.has(3)


def transposed_convolution(run: NodeRun, *, weight: int, bias: int | None) -> int:
    """Each input meets the kernel of its channel: `(in, out / groups, places...)`."""
    products = 2 * math.prod(run.input(0)) * math.prod(run.input(weight)[1:])
    return products + (run.made if run.has(bias) else 0)


def recurrence(run: NodeRun, *, weight: int, bias: int | None) -> int:
    """The products and biases of every step and direction, and an LSTM's peepholes.

    `X` is `(steps, batch, in)`, or batch first; W, R, B and P lead with the directions.
    Gates are not counted element by element.
    """
    rows = math.prod(run.input(0)[:2])
    products = math.prod(run.input(weight)) + math.prod(run.input(weight + 1))
    biases = run.size(bias) if bias is not None else 0
    return rows * (2 * products + biases + 2 * run.size(7))


def normalisation(each: int, *added: int) -> Operations:
    """So many operations for each element, one for the bias, and one per further input.

    Args:
        each: Operations for each element, without the bias.
        added: Inputs that may be there, each with one more operation for each element.
    """

    def count(run: NodeRun, *, weight: int, bias: int | None) -> int:
        return run.made * (each + sum(map(run.has, (bias, *added))))

    return count


def table_lookup(run: NodeRun, *, weight: int, bias: int | None) -> int:
    """A lookup moves data and computes nothing."""
    return 0


def quantised_table_lookup(run: NodeRun, *, weight: int, bias: int | None) -> int:
    """A lookup in a quantised table scales each element that it finds."""
    return run.made
