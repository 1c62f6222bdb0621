"""Make tensors inside a graph readable: extra outputs, lifted out of every body."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt import walk
from onnx_adapt.walk import Scope


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor as it comes out of a tapped model.

    Attributes:
        output: The model's output that carries it.
        depth: How many leading axes count iterations of Loop or Scan.
    """

    output: str
    depth: int


class Tapper:
    """Adds outputs to a model, in place.

    A branch of If that is not taken gives an empty tensor with one axis.

    Args:
        proto: The model; it is changed.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._proto = proto
        self._scopes = {scope.path: scope for scope in walk.scopes(proto.graph)}
        self._taps: dict[tuple[str, str], Tap | None] = {}

    def tap(self, path: str, tensor: str, elem_type: int) -> Tap | None:
        """Make one tensor an output; None if a body of an unknown operator holds it."""
        key = (path, tensor)
        if key not in self._taps:
            self._taps[key] = self._lift(self._scopes[path], tensor, elem_type)
        return self._taps[key]

    def _lift(self, scope: Scope, tensor: str, elem_type: int) -> Tap | None:
        chain = [scope]
        while chain[-1].parent is not None:
            chain.append(chain[-1].parent)
        if any(self._owner(s).op_type not in ("If", "Loop", "Scan") for s in chain[:-1]):
            return None
        depth, name = 0, _copied(scope.graph, tensor, f"tap/{len(self._taps)}")
        for inner in chain[:-1]:
            node = self._owner(inner)
            _declare(inner.graph, name, elem_type)
            name = f"tap/{len(self._taps)}/{len(node.output)}"
            if node.op_type == "If":
                for attribute, body in walk.bodies(node):
                    if attribute != inner.attribute:
                        _add_stand_in(body, f"{name}/none", elem_type)
            else:
                depth += 1
                _extend_scan(node)
            node.output.append(name)
        _declare(self._proto.graph, name, elem_type)
        return Tap(name, depth)

    def _owner(self, scope: Scope) -> onnx.NodeProto:
        assert scope.parent is not None
        node: onnx.NodeProto = scope.parent.graph.node[scope.owner]
        return node


def _copied(graph: onnx.GraphProto, tensor: str, name: str) -> str:
    """A copy of a tensor under a name that is no output yet."""
    graph.node.append(helper.make_node("Identity", [tensor], [name], name))
    return name


def _declare(graph: onnx.GraphProto, name: str, elem_type: int) -> None:
    graph.output.append(helper.make_tensor_value_info(name, elem_type, None))


def _add_stand_in(body: onnx.GraphProto, name: str, elem_type: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    empty = numpy_helper.from_array(np.zeros(0, dtype))
    body.node.append(helper.make_node("Constant", [], [name], name, value=empty))
    _declare(body, name, elem_type)


def _extend_scan(node: onnx.NodeProto) -> None:
    """Scan lists an axis and a direction for each scan output, if it lists any."""
    for attribute in node.attribute:
        if attribute.name in ("scan_output_axes", "scan_output_directions"):
            attribute.ints.append(0)
