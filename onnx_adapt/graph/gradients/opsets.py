"""A model of an older operator set as the same model in one that gradients are written in.

Only what changed its meaning or its spelling between operator sets 7 and 17 is rewritten. An
example: `Squeeze(x, axes=[1])` of opset 12 becomes `Squeeze(x, [1])`, because the axes are an
input since opset 13. What each row replaces is in ONNX's `docs/Changelog.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import GradientError
from onnx_adapt.graph.index import GraphView, default_opset, index_model
from onnx_adapt.model.file import Model

TARGET = 17
"""The oldest operator set whose operators the rules are written in."""

OLDEST = 7
"""The oldest operator set that can be rewritten; before it, broadcasting was another."""

_PREFIX = "opset:"


@dataclass(slots=True)
class _Rewriting:
    """One node of an older operator set on its way to `TARGET`.

    Attributes:
        node: The node, which is changed in place.
        view: The graph that it is in.
        constants: New initializers.
        before: Nodes to stand before it.
        after: Nodes to stand behind it.
    """

    node: onnx.NodeProto
    view: GraphView
    constants: list[onnx.TensorProto]
    before: list[onnx.NodeProto] = field(default_factory=list)
    after: list[onnx.NodeProto] = field(default_factory=list)

    def take(self, name: str) -> Any:
        """Take an attribute away, and return its value; None if there is none."""
        for i, item in enumerate(self.node.attribute):
            if item.name == name:
                value = helper.get_attribute_value(item)
                del self.node.attribute[i]
                return value
        return None

    def give(self, name: str, value: object) -> None:
        """Give the node an attribute that it does not have."""
        if all(item.name != name for item in self.node.attribute):
            self.node.attribute.append(helper.make_attribute(name, value))

    def constant(self, value: Array) -> str:
        """A new initializer."""
        name = f"{_PREFIX}constant:{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def feed(self, position: int, value: Array) -> None:
        """Make a constant an input of the node."""
        while len(self.node.input) <= position:
            self.node.input.append("")
        self.node.input[position] = self.constant(value)

    def integers(self, position: int, values: Any) -> None:
        """Make integers an input of the node; None is left out."""
        if values is not None:
            self.feed(position, np.array(values, np.int64).reshape(-1))

    def number(self, value: float) -> Array:
        """A scalar of the element type of what the node reads."""
        kind = self.view.type_of(self.node.input[0]).elem_type or onnx.TensorProto.FLOAT
        return np.array(value, helper.tensor_dtype_to_np_dtype(kind))

    def refuse(self, why: str) -> GradientError:
        """The error that says why the node cannot be rewritten."""
        label = self.node.name or self.node.output[0]
        return GradientError(f"{self.node.op_type} {label!r} of an old opset {why}")


def _axes(item: _Rewriting) -> None:
    item.integers(1, item.take("axes"))


def _split(item: _Rewriting) -> None:
    item.integers(1, item.take("split"))


def _slice(item: _Rewriting) -> None:
    for position, name in enumerate(("starts", "ends", "axes"), start=1):
        item.integers(position, item.take(name))


def _top_k(item: _Rewriting) -> None:
    item.integers(1, item.take("k"))


def _pad(item: _Rewriting) -> None:
    value = item.take("value")
    item.integers(1, item.take("pads"))
    if value:
        item.feed(2, item.number(value))


def _clip(item: _Rewriting) -> None:
    for position, name in enumerate(("min", "max"), start=1):
        value = item.take(name)
        if value is not None:
            limits = np.finfo(item.number(0).dtype)
            item.feed(position, item.number(np.clip(value, limits.min, limits.max)))


def _dropout(item: _Rewriting) -> None:
    item.take("ratio")


def _batch_norm(item: _Rewriting) -> None:
    if item.take("spatial") == 0:
        raise item.refuse("has statistics for each position")
    if any(item.node.output[1:]):
        raise item.refuse("is in training mode")


def _softmax(item: _Rewriting) -> None:
    """Before opset 13 all axes from the given one on were one."""
    axis = item.take("axis")
    axis = 1 if axis is None else axis
    item.give("axis", -1)
    if axis == -1:
        return
    x, y = item.node.input[0], item.node.output[0]
    rows, soft, shape = (f"{_PREFIX}{y}:{part}" for part in ("rows", "soft", "shape"))
    item.before.append(helper.make_node("Flatten", [x], [rows], rows, axis=axis))
    item.before.append(helper.make_node("Shape", [x], [shape], shape))
    item.node.input[0], item.node.output[0] = rows, soft
    item.after.append(helper.make_node("Reshape", [soft, shape], [y], f"{soft}:shaped"))


def _scatter(item: _Rewriting) -> None:
    item.node.op_type = "ScatterElements"


def _resize(item: _Rewriting) -> None:
    """Resize of opset 10, and Upsample before it: positions are rounded down."""
    item.node.op_type = "Resize"
    scales = item.take("scales")
    if scales is not None:
        item.feed(1, np.array(scales, np.float32))
    item.node.input.insert(1, "")
    item.give("coordinate_transformation_mode", "asymmetric")
    item.give("nearest_mode", "floor")


def _roi_align(item: _Rewriting) -> None:
    item.give("coordinate_transformation_mode", "output_half_pixel")


def _scan(item: _Rewriting) -> None:
    raise item.refuse("has a batch axis of its own")


_ROWS: tuple[tuple[int, tuple[str, ...], Callable[[_Rewriting], None]], ...] = (
    (9, ("Scan",), _scan),
    (10, ("Slice",), _slice),
    (10, ("TopK",), _top_k),
    (10, ("Upsample",), _resize),
    (11, ("Resize",), _resize),
    (11, ("Scatter",), _scatter),
    (11, ("Pad",), _pad),
    (11, ("Clip",), _clip),
    (12, ("Dropout",), _dropout),
    (13, ("Squeeze", "Unsqueeze", "ReduceSum"), _axes),
    (13, ("Split",), _split),
    (13, ("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    (14, ("BatchNormalization",), _batch_norm),
    (16, ("RoiAlign",), _roi_align),
)
"""The operator set that changed some operators, and how they are rewritten for it."""


def raise_opset(model: Model) -> Model:
    """A model in an operator set that gradients can be written in; new ones stay as they are.

    Raises:
        GradientError: If it is older than 7, or has a node that no newer one can say.
    """
    version = default_opset(model.proto)
    if version >= TARGET:
        return model
    if version < OLDEST:
        raise GradientError(
            f"{model.label} uses opset {version}; training needs {OLDEST} or newer",
            hint="export the model again, in opset 17 or newer",
        )
    result = model.copy()
    changes = {op: row for since, ops, row in _ROWS if version < since for op in ops}
    constants: list[onnx.TensorProto] = []
    for view in reversed(index_model(result).views.values()):  # bodies before their graphs
        _rewrite(view, changes, constants)
    result.proto.graph.initializer.extend(constants)
    for item in result.proto.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = TARGET
    result.proto.ir_version = max(result.proto.ir_version, _IR)
    return result


_IR = 8
"""The IR version that came with operator set 17."""


def _rewrite(
    view: GraphView,
    changes: dict[str, Callable[[_Rewriting], None]],
    constants: list[onnx.TensorProto],
) -> None:
    """Rewrite the nodes of one graph, in place."""
    nodes = view.scope.graph.node
    rewritten: list[onnx.NodeProto] = []
    for node in view.nodes:
        row = changes.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        item = _Rewriting(node, view, constants)
        if row is not None:
            row(item)
        rewritten += [*item.before, node, *item.after]
    if len(rewritten) > len(nodes):
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in rewritten]
        del nodes[:]
        nodes.extend(kept)
