"""Which axis of a stack of matrices a graph sums over.

An example. Experts are stored as `W (experts, a, b)`, and the graph takes those of each token:

    V = GatherND(W, chosen)     y = MatMul(V, x)

MatMul sums over the last axis of what it reads first, so `b` is what the experts read and `a`
what they make. Had a Transpose of the last two axes been between, it would be the other way.
"""

from __future__ import annotations

import onnx

from onnx_adapt.graph.index import GraphView, attribute

_KEEPERS = {
    "Identity",
    "Cast",
    "DequantizeLinear",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "GatherND",
}
"""Operators that keep the last two axes of a stack, given that they choose or add others."""

_MOST_STEPS = 16


def summed_axis(view: GraphView, tensor: str) -> int | None:
    """The one of the last two axes of a tensor that all its readers sum over, or None.

    Args:
        view: The graph of the readers.
        tensor: A stack of matrices.

    Returns:
        -2, -1, or None if the readers are of other kinds or do not agree.
    """
    found: set[int | None] = set()
    waiting = [(tensor, False)]
    for name, turned in waiting:
        if len(waiting) > _MOST_STEPS:
            return None
        for node in view.readers(name):
            passed = _passes_on(node)
            if passed is not None and node.input[0] == name:
                waiting.append((node.output[0], turned ^ passed))
                continue
            axis = _summed_by(node, list(node.input).index(name))
            found.add(-3 - axis if turned and axis is not None else axis)
    return next(iter(found)) if len(found) == 1 else None


def _passes_on(node: onnx.NodeProto) -> bool | None:
    """Whether a node passes a stack on with its last axes exchanged; None if it does not."""
    if node.op_type in _KEEPERS or (
        node.op_type == "Gather" and attribute(node, "axis", 0) == 0
    ):
        return False
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
        axes = list(range(len(order)))
        if order[-2:] == axes[:-3:-1] and order[:-2] == axes[:-2]:
            return True
    return None


def _summed_by(node: onnx.NodeProto, position: int) -> int | None:
    """The axis of one of its inputs that a product sums over."""
    if node.op_type == "MatMul":
        return -1 if position == 0 else -2
    if node.op_type == "Gemm":
        turned = attribute(node, "transB" if position else "transA", 0)
        return -1 if bool(position) == bool(turned) else -2
    if node.op_type == "Einsum":
        equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "")
        terms, _, result = equation.replace(" ", "").partition("->")
        labels = terms.split(",")[position : position + 1]
        summed = [axis for axis in (-2, -1) if labels and labels[0][axis:][:1] not in result]
        return summed[0] if len(summed) == 1 and "..." not in equation else None
    return None
