"""Einsum as a Linear: which of its equations are the product with one matrix."""

from __future__ import annotations

import re
from typing import Literal

import onnx

_LINEAR = re.compile(
    r"(?P<rows>[A-Za-z]*|\.\.\.)(?P<k>[A-Za-z]),(?P<w>[A-Za-z]{2})->(?P<out>.+)"
)


def linear_order(node: onnx.NodeProto) -> Literal["(in, out)", "(out, in)"] | None:
    """How an Einsum stores the matrix of a Linear; None if it is no Linear.

    It is one if the last axis of what it reads is summed over with one axis of the matrix,
    and the other axis of the matrix is the last one of what it makes.

    Example:
        >>> from onnx import helper
        >>> for equation in ("bsd,dh->bsh", "bsd,hd->bsh", "bsd,dh->bhs", "btd,dnh->btnh"):
        ...     node = helper.make_node("Einsum", ["x", "w"], ["y"], equation=equation)
        ...     print(linear_order(node))
        (in, out)
        (out, in)
        None
        None
    """
    found = (item.s for item in node.attribute if item.name == "equation")
    equation = next(found, b"").decode("utf-8", "replace").replace(" ", "")
    match = _LINEAR.fullmatch(equation)
    if match is None or len(node.input) != 2:
        return None
    rows, k, weight, out = match.group("rows", "k", "w", "out")
    made = weight.replace(k, "", 1)
    letters = rows.replace(".", "")
    distinct = len({*letters, k, made}) == len(letters) + 2
    if len(made) != 1 or not distinct or out != rows + made:
        return None
    return "(in, out)" if weight[0] == k else "(out, in)"
