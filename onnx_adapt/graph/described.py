"""Describe a tensor of a graph as a site: its width, its axis, and why it takes no adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx

from onnx_adapt.graph.fused_bias import FusedBias, bias_behind
from onnx_adapt.graph.index import GraphView, ModelIndex, TensorType, elem_name, text
from onnx_adapt.graph.layers import BLOCKED, feature_width, inherited_type, weight_width
from onnx_adapt.graph.layout import Features, Layout
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.site import Site, rank_of, refusal
from onnx_adapt.graph.unfusing import can_write_out
from onnx_adapt.model import walk


def is_name(name: str | bytes) -> bool:
    """Whether an output is there; a name that is no text could not be written again."""
    return isinstance(name, str) and name != ""


def describe(
    index: ModelIndex,
    layout: Layout,
    view: GraphView,
    number: int,
    tensor: str,
    *,
    module: str | None,
    layer: bool = False,
    bias: str | None = None,
    given: Features | None = None,
) -> Site:
    """Describe a tensor that a node makes, with the reason if it can take no adapter.

    Args:
        index: The model.
        layout: Where the features of its tensors are.
        view: The graph that makes the tensor.
        number: The index of the node: for a layer that with the weight.
        tensor: The tensor.
        module: The PyTorch module that the node is from.
        layer: Whether it is the output of a layer.
        bias: The output of the layer's bias Add, if it has one.
        given: Where its features are, if the user says so.
    """
    node = view.nodes[number]
    path = view.scope.path
    known = view.type_of(tensor)
    known = TensorType(known.elem_type or inherited_type(view, node), known.shape)
    rank = rank_of(view, node, known)
    features = given or _features(layout, view, node, tensor, layer)
    axis, width = features.axis, None
    if axis is not None:
        width = feature_width(view, node if layer else None, tensor, axis)
    if given and layer and not given.refused:
        features = _checked(given, width, weight_width(view, node))
    adding = view.producer(bias) if bias else None
    site = Site(
        address=f"{path}:{tensor}",
        node=text(node.name),
        op=node.op_type,
        tensor=tensor,
        module=module,
        width=width,
        dtype=elem_name(known.elem_type),
        axis=axis,
        refused=None,
        graph=path,
        rank=rank,
        layer=layer,
        node_index=number,
        also=(text(adding[1].name),) if adding else (),
    )
    behind = bias_behind(index, view, tensor, width) if layer and not bias else None
    refused = refusal(view, site, known, features)
    if text(node.domain) == BLOCKED and node.op_type != "ReorderOutput":
        refused = "its channels are in blocks, for ONNX Runtime's NCHWc kernels alone"
    return replace(site, refused=refused, before_bias=hidden(behind))


def hidden(behind: FusedBias | None) -> str | None:
    """Why a layer has no output with its bias, if the node that adds it must stay."""
    return None if behind is None or can_write_out(behind) else str(behind)


def _checked(given: Features, width: int | None, told: int | None) -> Features:
    """The axis that a user names for a layer, refused where the layer's weight contradicts."""
    if None in (width, told) or width == told:
        return given
    axis = given.axis
    reason = f"its axis {axis} has {width} entries, but the layer's weight gives {told}"
    return Features(axis, reason)


def _features(
    layout: Layout, view: GraphView, node: onnx.NodeProto, tensor: str, layer: bool
) -> Features:
    if layer:
        return layout.of_layer(view, node, tensor)
    return layout.of(view, tensor)


def function_sites(proto: onnx.ModelProto) -> Iterator[Site]:
    """The tensors inside a model's functions, none of which can take an adapter."""
    for function in proto.functions:
        label = f"function {function.domain}::{function.name}"
        label += f"::{function.overload}" if function.overload else ""
        for scope in walk.scopes(onnx.GraphProto(node=function.node), label):
            for number, node in enumerate(scope.graph.node):
                for tensor in filter(is_name, node.output):
                    yield Site(
                        address=f"{scope.path}:{tensor}",
                        node=text(node.name),
                        op=node.op_type,
                        tensor=tensor,
                        module=None,
                        width=None,
                        dtype="",
                        axis=None,
                        refused=f"inside the model-local {label}",
                        graph=scope.path,
                        rank=None,
                        layer=node.op_type in OPERATORS,
                        node_index=number,
                    )
