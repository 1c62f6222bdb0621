"""How axes go into the bodies of If, Loop and Scan, and out of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layout.links import Link, Pairs, aligned
from onnx_adapt.graph.layout.lookup import Lookup, Step

Tensor = tuple[GraphView, str]


def through_bodies(lookup: Lookup, step: Step, bodies: Iterable[GraphView]) -> Iterator[Link]:
    """The links of a node with bodies; what they capture is the same tensor inside."""
    for body in bodies:
        given = [(body, value.name) for value in body.scope.graph.input]
        results = [(body, value.name) for value in body.scope.graph.output]
        inputs = [(step.view, name) for name in step.inputs]
        outputs = [(step.view, name) for name in step.outputs]
        if step.node.op_type == "Loop":
            yield from _loop(lookup, step, (inputs[2:], given[2:]), (results[1:], outputs))
        elif step.node.op_type == "Scan":
            yield from _scan(lookup, step, (inputs, given), (results, outputs))
        else:
            yield from _same(lookup, step, results, outputs)


def _loop(
    lookup: Lookup,
    step: Step,
    into: tuple[list[Tensor], list[Tensor]],
    out: tuple[list[Tensor], list[Tensor]],
) -> Iterator[Link]:
    """Values are carried from round to round; what is left over is stacked on axis 0."""
    carried = len(into[1])
    yield from _same(lookup, step, *into)
    yield from _same(lookup, step, out[0][:carried], out[1][:carried])
    yield from _same(lookup, step, out[0][:carried], into[1])
    for inner, outer in zip(out[0][carried:], out[1][carried:], strict=False):
        yield from _with_axis(lookup, step, inner, outer, 0)


def _scan(
    lookup: Lookup,
    step: Step,
    into: tuple[list[Tensor], list[Tensor]],
    out: tuple[list[Tensor], list[Tensor]],
) -> Iterator[Link]:
    """States are carried; each round sees a slice of what is scanned, and makes one."""
    states = len(into[0]) - step.integer("num_scan_inputs", 0)
    yield from _same(lookup, step, into[0][:states], into[1][:states])
    yield from _same(lookup, step, out[0][:states], out[1][:states])
    yield from _same(lookup, step, out[0][:states], into[1][:states])
    axes = step.integers("scan_input_axes") or []
    slices = zip(into[1][states:], into[0][states:], strict=False)
    for i, (inner, outer) in enumerate(slices):
        yield from _with_axis(lookup, step, inner, outer, axes[i] if i < len(axes) else 0)
    axes = step.integers("scan_output_axes") or []
    slices = zip(out[0][states:], out[1][states:], strict=False)
    for i, (inner, outer) in enumerate(slices):
        yield from _with_axis(lookup, step, inner, outer, axes[i] if i < len(axes) else 0)


def _same(
    lookup: Lookup, step: Step, sources: Iterable[Tensor], targets: Iterable[Tensor]
) -> Iterator[Link]:
    for source, target in zip(sources, targets, strict=False):
        pairs = aligned(lookup.rank(*source), lookup.rank(*target))
        yield from _joined(lookup, step, source, target, pairs, keeps=True)


def _with_axis(
    lookup: Lookup, step: Step, inner: Tensor, outer: Tensor, axis: int
) -> Iterator[Link]:
    """The tensor outside has one axis more, along which the rounds are."""
    rank = lookup.rank(*outer)
    if rank is not None and lookup.rank(*inner) == rank - 1 and -rank <= axis < rank:
        pairs = [(k, k + (k >= axis % rank)) for k in range(rank - 1)]
        yield from _joined(lookup, step, inner, outer, pairs)


def _joined(
    lookup: Lookup,
    step: Step,
    source: Tensor,
    target: Tensor,
    pairs: Pairs,
    *,
    keeps: bool = False,
) -> Iterator[Link]:
    if source[1] and target[1] and source[0].weight(source[1]) is None:
        yield Link(
            lookup.place(*source), lookup.place(*target), tuple(pairs), step.node, keeps=keeps
        )
