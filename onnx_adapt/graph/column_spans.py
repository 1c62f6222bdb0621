"""Where the readers of a layer cut its columns: an attention, a Split, or several Slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import onnx

from onnx_adapt.graph.index import GraphView, attribute
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight

Span = tuple[int, int]


def spans_of(sizes: Sequence[int]) -> list[Span]:
    """The spans of columns of these sizes, one after the other.

    Example:
        >>> spans_of([64, 32, 32])
        [(0, 64), (64, 96), (96, 128)]
    """
    return list(pairwise(accumulate(sizes, initial=0)))


def column_spans(call: LayerCall) -> list[Span]:
    """Where the readers of a layer's output cut its columns; empty if they do not."""
    readers = call.view.readers(call.output)
    if len(readers) == 1 and readers[0].op_type == "GroupQueryAttention":
        return _of_heads(readers[0], call)
    if len(readers) == 1 and readers[0].op_type == "Split":
        return _of_split(call.view, readers[0], call.sizes[1])
    if len(readers) > 1 and all(node.op_type == "Slice" for node in readers):
        return _of_slices(call, readers)
    return []


def _of_heads(attention: onnx.NodeProto, call: LayerCall) -> list[Span]:
    """The spans of queries, keys and values that an attention reads from one tensor."""
    queries = attribute(attention, "num_heads", 0)
    keys = attribute(attention, "kv_num_heads", 0)
    heads, width = (queries, keys, keys), call.sizes[1]
    packed = attention.input[0] == call.output and not any(attention.input[1:3])
    if not packed or min(heads) < 1 or width % sum(heads):
        return []
    return spans_of([count * (width // sum(heads)) for count in heads])


def _of_split(view: GraphView, split: onnx.NodeProto, width: int) -> list[Span]:
    if not _is_last(view, split, attribute(split, "axis", 0)):
        return []
    sizes = next((list(item.ints) for item in split.attribute if item.name == "split"), None)
    if len(split.input) > 1 and split.input[1]:
        sizes = _numbers(view, split.input[1])
        if sizes is None:
            return []
    if sizes is None:
        each = -(-width // len(split.output))
        sizes = [min(each, width - start) for start in range(0, width, each)]
    return spans_of(sizes) if len(sizes) == len(split.output) else []


def _of_slices(call: LayerCall, slices: Sequence[onnx.NodeProto]) -> list[Span]:
    """The spans of Slices with a step of 1 over the columns, if each goes on from another."""
    found = []
    for node in slices:
        starts, ends, axes, steps = (_argument(call.view, node, name) for name in _ARGUMENTS)
        if starts is None or ends is None or axes is None or steps not in (None, [1]):
            return []
        if not len(starts) == len(ends) == len(axes) == 1:
            return []
        if not _is_last(call.view, node, axes[0]):
            return []
        found.append(slice(starts[0], ends[0]).indices(call.sizes[1])[:2])
    found.sort()
    meet = [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
    return found if meet else []


_ARGUMENTS = ("starts", "ends", "axes", "steps")
"""The arguments of a Slice: its inputs from the second on; before opset 10 attributes."""


def _argument(view: GraphView, node: onnx.NodeProto, name: str) -> list[int] | None:
    position = 1 + _ARGUMENTS.index(name)
    tensor = "".join(node.input[position : position + 1])
    if tensor:
        return _numbers(view, tensor)
    return next((list(item.ints) for item in node.attribute if item.name == name), None)


_MOST_NUMBERS = 64
"""More than any module is cut into; a damaged tensor can have millions."""


def _numbers(view: GraphView, name: str) -> list[int] | None:
    weight = find_weight(view, name)
    if weight is None or math.prod(weight.dims) > _MOST_NUMBERS or weight.tensor.data_location:
        return None
    return [int(number) for number in onnx.numpy_helper.to_array(weight.tensor).ravel()]


def _is_last(view: GraphView, node: onnx.NodeProto, axis: int) -> bool:
    """Whether an axis is the last one of what a node reads."""
    shape = view.type_of(node.input[0]).shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)
