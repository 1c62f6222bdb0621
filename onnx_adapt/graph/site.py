"""A site: a tensor where an adapter can go, and the reason where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.graph.index import (
    GraphView,
    TensorType,
)
from onnx_adapt.graph.layers import (
    find_weight,
    float_downstream,
    layer_weight,
)
from onnx_adapt.graph.layout import Features
from onnx_adapt.graph.operators import CHANNELS, LAST, OPERATORS
from onnx_adapt.tables import html_table, text_table
from onnx_adapt.words import count


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor of a model where an adapter can go.

    Attributes:
        address: Unique in the model: the graph's path, a colon, the tensor.
        node: Name of the node; for a layer the node with the weight.
        op: Operator type of that node.
        tensor: The tensor. For a layer with a separate bias Add it is the Add's output.
        module: PyTorch module path, or None if the exporter left no trace.
        width: Size of the feature axis, or None if unknown.
        dtype: Element type, or '' if unknown.
        axis: The feature axis: -1, or 1 for channels; None if nothing tells.
        refused: Why no adapter can go here, or None.
        graph: Path of the graph the tensor is in.
        rank: Number of axes, or None if unknown.
        layer: Whether the site is the output of a layer.
        node_index: Index of the node in its graph.
        also: Names of other nodes that stand for it: that of the bias Add.
        before_bias: Where the layer's bias is added, if that is behind the tensor. An
            adapter after the layer cannot go here, one after the tensor can.
    """

    address: str
    node: str
    op: str
    tensor: str
    module: str | None
    width: int | None
    dtype: str
    axis: int | None
    refused: str | None
    graph: str
    rank: int | None
    layer: bool
    node_index: int
    also: tuple[str, ...] = ()
    before_bias: str | None = None

    def __repr__(self) -> str:
        """Its address, and its width and type or why it takes no adapter."""
        what = f"{self.width} wide, {self.dtype}, {self.op}"
        return f"<Site {self.address}: {f'refused, {self.reason}' if self.reason else what}>"

    @property
    def reason(self) -> str | None:
        """Why no adapter can go after the layer or module that this is, or None."""
        return self.refused or self.before_bias

    @property
    def multiplies(self) -> bool:
        """Whether it is the output of a layer that multiplies by a matrix or a kernel."""
        return self.layer and OPERATORS[self.op].multiplies

    def as_dict(self) -> dict[str, object]:
        """What `onnx-adapt sites --json` prints of a site."""
        return {name: getattr(self, name) for name in _PRINTED} | {"refused": self.reason}


_COLUMNS = ("address", "node", "op", "module", "width", "dtype", "axis", "refused")
_ALWAYS = ("address", "op", "width", "dtype", "axis")


class Sites(list[Site]):
    """Sites of a model, a list; `print` shows them as a table."""

    def table(self) -> tuple[tuple[str, ...], list[list[object]]]:
        """The columns that are needed, and a row for each site."""
        rows = [site.as_dict() for site in self]
        shown = tuple(c for c in _COLUMNS if c in _ALWAYS or any(row[c] for row in rows))
        return shown, [[row[column] for column in shown] for row in rows]

    @property
    def good(self) -> Sites:
        """Those that can take an adapter."""
        return Sites(site for site in self if site.reason is None)

    def __str__(self) -> str:
        """The table."""
        return text_table(*self.table())

    def _repr_html_(self) -> str:
        caption = f"{len(self.good)} of {count(len(self), 'site')} can take an adapter"
        return html_table(caption, *self.table())


_PRINTED = ("address", "node", "op", "tensor", "module", "width", "dtype", "axis", "refused")


def rank_of(view: GraphView, node: onnx.NodeProto, known: TensorType) -> int | None:
    """The number of axes of an output: that of its record, or of a Conv's weight."""
    if known.shape is not None:
        return len(known.shape)
    weight = layer_weight(view, node)
    convolves = weight is not None and OPERATORS[node.op_type].convolves
    return len(weight.dims) if weight and convolves else None


def refusal(view: GraphView, site: Site, known: TensorType, features: Features) -> str | None:
    """Why a tensor cannot take an adapter, or None if it can."""
    if site.tensor in view.repeated:
        return "it is made twice: the model breaks ONNX's rule of single assignment"
    if known.elem_type and known.elem_type not in FLOATS:
        better = float_downstream(view, site.tensor)
        reason = f"its elements are {site.dtype}, not floats"
        return f"{reason}; the float tensor downstream is {better!r}" if better else reason
    if not site.dtype:
        return "its element type is unknown, or it is no tensor"
    if site.tensor not in view.live:
        return "dead: its values reach no output of the model"
    if find_weight(view, site.tensor) is not None:
        return "it is a constant"
    if known.shape == ():
        return "it is a scalar"
    if features.refused is not None:
        return features.refused
    if site.axis not in (LAST, CHANNELS):
        return f"its features are on axis {site.axis}; a slot takes the last axis or axis 1"
    if site.width is None:
        return "unknown width: its feature axis has no fixed size"
    if site.width < 1:
        return "its feature axis is empty"
    if site.axis == CHANNELS and site.rank is None:
        return "unknown number of axes"
    return None
