"""Why a tensor cannot take an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.graph.index import (
    GraphView,
    TensorType,
)
from onnx_adapt.graph.layers import (
    CHANNELS,
    KINDS,
    LAST,
    find_weight,
    float_downstream,
    layer_weight,
)
from onnx_adapt.graph.layout import Features

if TYPE_CHECKING:
    from onnx_adapt.graph.site import Site


def rank_of(view: GraphView, node: onnx.NodeProto, known: TensorType) -> int | None:
    """The number of axes of an output: that of its record, or of a Conv's weight."""
    if known.shape is not None:
        return len(known.shape)
    weight = layer_weight(view, node)
    conv = KINDS[node.op_type].width in ("first", "deconv") if weight else False
    return len(weight.dims) if weight and conv else None


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
