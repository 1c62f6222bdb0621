"""Make tensors inside a graph readable: extra outputs, lifted out of every body.

A tapped tensor comes out flat, with its shape beside it, once for each time it was
computed: not at all in a branch that is not taken, many times in a Loop, and there with
another shape each time if need be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.model import walk
from onnx_adapt.model.walk import Scope

_INT64 = onnx.TensorProto.INT64


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor as it comes out of a tapped model.

    Attributes:
        values: The output with all its values, one computation after the other.
        shapes: The output with, for each computation, the number of axes and their sizes.
    """

    values: str
    shapes: str

    def read(self, outputs: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
        """The tensor, once for each time it was computed."""
        values, shapes = outputs[self.values], list(outputs[self.shapes])
        found, at = [], 0
        while shapes:
            rank = int(shapes[0])
            shape = tuple(int(size) for size in shapes[1 : rank + 1])
            count = int(np.prod(shape, dtype=np.int64))
            found.append(values[at : at + count].reshape(shape))
            at += count
            del shapes[: rank + 1]
        return found


class Tapper:
    """Adds outputs to a model, in place, and takes out the shapes it records.

    Args:
        proto: The model; it is changed.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._proto = proto
        self._scopes = {scope.path: scope for scope in walk.scopes(proto.graph)}
        for scope in self._scopes.values():
            _forget(scope.graph)
        self._taps: dict[tuple[str, str], Tap | None] = {}
        self._empty: dict[int, str] = {}

    def tap(self, path: str, tensor: str, elem_type: int) -> Tap | None:
        """Make one tensor readable, as the graph at `path` sees it.

        Args:
            path: The graph.
            tensor: A tensor that can be read there.
            elem_type: Its element type.

        Returns:
            The tap, or None if a body of an operator other than If, Loop and Scan holds it.
        """
        key = (path, tensor)
        if key not in self._taps:
            scope = self._scopes[path]
            if any(_owner(s).op_type not in _LIFTS for s in _ancestry(scope)):
                self._taps[key] = None
            else:
                name = f"tap/{len(self._taps)}"
                values, shapes = _flatten(scope.graph, tensor, name)
                self._taps[key] = Tap(
                    self._lift(scope, values, elem_type), self._lift(scope, shapes, _INT64)
                )
        return self._taps[key]

    def tap_sizes(self, path: str, tensors: Sequence[str]) -> str | None:
        """Make the sizes of tensors readable, as the graph at `path` sees them.

        Args:
            path: The graph.
            tensors: Tensors that can be read there.

        Returns:
            An output with, for each time the graph runs, the number of axes and the sizes
            of one tensor after the other; None if a body of an operator other than If,
            Loop and Scan holds them.
        """
        scope = self._scopes[path]
        if any(_owner(s).op_type not in _LIFTS for s in _ancestry(scope)):
            return None
        name = f"tap/sizes/{len(self._taps)}"
        self._taps[(path, name)] = None
        parts = [
            part
            for i, tensor in enumerate(tensors)
            for part in _measure(scope.graph, tensor, f"{name}/{i}")
        ]
        scope.graph.node.append(helper.make_node("Concat", parts, [name], name, axis=0))
        return self._lift(scope, name, _INT64)

    def _lift(self, scope: Scope, name: str, elem_type: int) -> str:
        """Hand a flat tensor out of every body around it."""
        for inner in _ancestry(scope):
            node = _owner(inner)
            above = f"{name}/up"
            if node.op_type == "If":
                _lift_from_branch(node, inner, name, above, elem_type)
            elif node.op_type == "Loop":
                self._lift_from_loop(node, inner.graph, name, above, elem_type)
            else:
                _lift_from_scan(node, inner, name, above, elem_type)
            name = above
        _declare(self._proto.graph.output, name, elem_type)
        return name

    def _lift_from_loop(
        self,
        node: onnx.NodeProto,
        body: onnx.GraphProto,
        name: str,
        above: str,
        elem_type: int,
    ) -> None:
        """Collect what every turn computes in one more state: turns may differ in shape."""
        states = len(node.input) - 2
        before, after = f"{name}/before", f"{name}/after"
        node.input.append(self._empty_of(elem_type))
        body.input.append(_vector(before, elem_type))
        concat = helper.make_node("Concat", [before, name], [after], after, axis=0)
        body.node.append(concat)
        body.output.insert(1 + states, _vector(after, elem_type))
        node.output.insert(states, above)

    def _empty_of(self, elem_type: int) -> str:
        """A weight of the main graph without elements; every body can read it."""
        if elem_type not in self._empty:
            name = f"tap/empty/{elem_type}"
            dtype = helper.tensor_dtype_to_np_dtype(elem_type)
            empty = numpy_helper.from_array(np.zeros(0, dtype), name)
            self._proto.graph.initializer.append(empty)
            self._empty[elem_type] = name
        return self._empty[elem_type]


def _forget(graph: onnx.GraphProto) -> None:
    """Drop the shapes that a graph records, in place: ONNX Runtime plans memory by them.

    Where they are wrong, a tensor that is kept for a tap is overwritten before it is read.
    """
    del graph.value_info[:]
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")


_LIFTS = ("If", "Loop", "Scan")


def _ancestry(scope: Scope) -> list[Scope]:
    """The bodies around a tensor, innermost first; none in the main graph."""
    chain = []
    while scope.parent is not None:
        chain.append(scope)
        scope = scope.parent
    return chain


def _owner(scope: Scope) -> onnx.NodeProto:
    assert scope.parent is not None
    node: onnx.NodeProto = scope.parent.graph.node[scope.owner]
    return node


def _flatten(graph: onnx.GraphProto, tensor: str, name: str) -> tuple[str, str]:
    """The values of a tensor as a vector, and its number of axes and sizes as another."""
    values, shapes, flat = (f"{name}/{part}" for part in ("v", "s", "flat"))
    graph.node.extend(
        [
            _constant(flat, [-1]),
            helper.make_node("Reshape", [tensor, flat], [values], values),
        ]
    )
    parts = _measure(graph, tensor, name)
    graph.node.append(helper.make_node("Concat", parts, [shapes], shapes, axis=0))
    return values, shapes


def _measure(graph: onnx.GraphProto, tensor: str, name: str) -> list[str]:
    """The number of axes of a tensor, and their sizes."""
    sizes, rank = f"{name}/sizes", f"{name}/rank"
    graph.node.append(helper.make_node("Shape", [tensor], [sizes], sizes))
    graph.node.append(helper.make_node("Shape", [sizes], [rank], rank))
    return [rank, sizes]


def _lift_from_branch(
    node: onnx.NodeProto, inner: Scope, name: str, above: str, elem_type: int
) -> None:
    _declare(inner.graph.output, name, elem_type)
    for attribute, body in walk.bodies(node):
        if attribute != inner.attribute:
            dtype = helper.tensor_dtype_to_np_dtype(elem_type)
            body.node.append(_constant(f"{name}/none", np.zeros(0, dtype)))
            _declare(body.output, f"{name}/none", elem_type)
    node.output.append(above)


def _lift_from_scan(
    node: onnx.NodeProto, inner: Scope, name: str, above: str, elem_type: int
) -> None:
    """A Scan keeps its states' shapes, so every step's values are stacked instead."""
    assert inner.parent is not None
    _declare(inner.graph.output, name, elem_type)
    node.output.append(f"{above}/stack")
    for attribute in node.attribute:
        if attribute.name in ("scan_output_axes", "scan_output_directions"):
            attribute.ints.append(0)
    flat = helper.make_node("Reshape", [f"{above}/stack", f"{above}/flat"], [above], above)
    inner.parent.graph.node.extend([_constant(f"{above}/flat", [-1]), flat])


def _constant(name: str, value: Any) -> onnx.NodeProto:
    array = np.array(value, np.int64) if isinstance(value, list) else value
    return helper.make_node("Constant", [], [name], name, value=numpy_helper.from_array(array))


def _vector(name: str, elem_type: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type, [None])


def _declare(outputs: Any, name: str, elem_type: int) -> None:
    outputs.append(_vector(name, elem_type))
