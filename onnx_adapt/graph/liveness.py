"""Which inputs of a node the readers of its output can see anything of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
from onnx import numpy_helper

VALUE_FREE = {"Shape", "Size"}
"""Operators that read a tensor's shape but not its values."""

PARTLY_READ = {*VALUE_FREE, "Concat"}
"""Operators that may hide values of what they read; all others show those of every input."""


def inputs_read(
    node: onnx.NodeProto,
    readers: Sequence[onnx.NodeProto],
    size: Callable[[str, int], int | None],
    constant: Callable[[str], onnx.TensorProto | None],
) -> list[str]:
    """The inputs of a node whose values can go further.

    They are all inputs, but for two kinds of nodes. A Shape reads no values. And a Concat's
    input goes no further if every reader of the Concat picks other parts. PyTorch's `h_n[-1]`
    of a GRU with two layers is one: `Gather(Concat(first, second), -1)` of two states
    `(1, batch, width)` picks index 1, which is all of `second` and nothing of `first`.

    Args:
        node: The node.
        readers: The nodes that read its first output; none if that is not all there is.
        size: Gives the size of a tensor's axis, None if it is not a known number.
        constant: Gives the value of a tensor, None if it is not stored.
    """
    if node.op_type in VALUE_FREE:
        return []
    names = [str(name) for name in node.input if name]
    if node.op_type != "Concat":
        return names
    axis = _axis(node)
    sizes = [size(name, axis) for name in names]
    known = [size for size in sizes if size is not None]
    picked = _picked(str(node.output[0]), axis, readers, constant)
    if picked is None or len(known) < len(sizes):
        return names
    indices = {index % sum(known) if sum(known) else index for index in picked}
    starts = [sum(known[:number]) for number in range(len(known))]
    return [
        name
        for name, start, size in zip(names, starts, known, strict=True)
        if any(start <= index < start + size for index in indices)
    ]


def _axis(node: onnx.NodeProto) -> int:
    return next((int(item.i) for item in node.attribute if item.name == "axis"), 0)


def _picked(
    tensor: str,
    axis: int,
    readers: Sequence[onnx.NodeProto],
    constant: Callable[[str], onnx.TensorProto | None],
) -> set[int] | None:
    """The indices along an axis that are read, or None if that may be all."""
    picked: set[int] = set()
    for node in readers:
        if node.op_type != "Gather" or node.input[0] != tensor or _axis(node) != axis:
            return None
        indices = constant(str(node.input[1]))
        if indices is None or indices.external_data or len(indices.dims) > 1:
            return None
        picked |= set(numpy_helper.to_array(indices).ravel().tolist())
    return picked or None
