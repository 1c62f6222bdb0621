"""The places of a model that can take an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx

from onnx_adapt.graph import (
    FLOATS,
    GraphView,
    ModelIndex,
    TensorType,
    elem_name,
    index_model,
    slot_of,
)
from onnx_adapt.layers import (
    CHANNELS,
    KINDS,
    LAST,
    bias_add,
    find_weight,
    float_downstream,
    is_layer,
    layer_elem_type,
    layer_weight,
    weight_width,
)
from onnx_adapt.manifest import read_manifest
from onnx_adapt.model_file import Model
from onnx_adapt.modules import ModuleIndex, index_modules


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
        axis: The feature axis: -1, or 1 for channels.
        refused: Why no adapter can go here, or None.
        graph: Path of the graph the tensor is in.
        rank: Number of axes, or None if unknown.
        layer: Whether the site is the output of a layer.
        core: Index of the node in its graph.
    """

    address: str
    node: str
    op: str
    tensor: str
    module: str | None
    width: int | None
    dtype: str
    axis: int
    refused: str | None
    graph: str
    rank: int | None
    layer: bool
    core: int

    def as_dict(self) -> dict[str, object]:
        """What `onnx-adapt sites --json` prints of a site."""
        return {name: getattr(self, name) for name in _PRINTED}


_PRINTED = ("address", "node", "op", "tensor", "module", "width", "dtype", "axis", "refused")


def find_sites(model: Model, *, all_tensors: bool = False) -> list[Site]:
    """Find the places that can take an adapter, and those that cannot with the reason.

    Args:
        model: The model to look at.
        all_tensors: List every float tensor, not only the outputs of layers.

    Example:
        >>> import onnx_adapt as oa
        >>> model = oa.open_model("models/dnsmos-p808.onnx")
        >>> [(s.op, s.width) for s in oa.find_sites(model)][-2:]
        [('MatMul', 64), ('MatMul', 1)]
    """
    survey = survey_model(model)
    return survey.sites if all_tensors else [site for site in survey.sites if site.layer]


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """Everything known about the places of a model.

    Attributes:
        index: Tensors and nodes.
        modules: PyTorch modules.
        sites: All sites: layers and every other float tensor, in graph order.
        outer: For each graph, the tensor a slot made of a site's tensor: inner -> outer.
        by_address: The sites by their address.
        layers_of: The outputs of each layer, by graph and node.
    """

    index: ModelIndex
    modules: ModuleIndex
    sites: list[Site]
    outer: dict[str, dict[str, str]]
    by_address: dict[str, Site]
    layers_of: dict[tuple[str, int], list[Site]]

    def site(self, view: GraphView, tensor: str) -> Site:
        """The site of any tensor that a node of `view` makes, refused or not."""
        address = f"{view.scope.path}:{tensor}"
        if address in self.by_address:
            return self.by_address[address]
        index = view.producers[tensor]
        module = self.modules.scopes[view.scope.path][index]
        return _site(view, index, tensor, module, {}, layer=False)

    def settled(self, graph: str, tensor: str) -> str:
        """The tensor's value after all slots on it."""
        names = self.outer.get(graph, {})
        while tensor in names:
            tensor = names[tensor]
        return tensor


def survey_model(model: Model) -> Survey:
    """Index a model and find all its sites."""
    index = index_model(model)
    modules = index_modules(index)
    outer: dict[str, dict[str, str]] = {}
    manifest = read_manifest(model.proto)
    for slot in manifest.slots if manifest else ():
        outer.setdefault(slot.graph, {})[slot.inner] = slot.output
    survey = Survey(index, modules, [], outer, {}, {})
    for view in index.views.values():
        survey.sites.extend(_graph_sites(survey, view))
    survey.sites.extend(_function_sites(model.proto))
    survey.by_address.update((site.address, site) for site in survey.sites)
    for site in survey.sites:
        if site.layer:
            survey.layers_of.setdefault((site.graph, site.core), []).append(site)
    return survey


def _graph_sites(survey: Survey, view: GraphView) -> list[Site]:
    path = view.scope.path
    scopes = survey.modules.scopes[path]
    axes = _feature_axes(view)
    taken: set[str] = set()
    found: list[Site] = []
    layers = [(i, node) for i, node in enumerate(view.nodes) if is_layer(view, node)]
    for i, node in layers:
        width = weight_width(view, node)
        for position, output in enumerate(node.output):
            if not output or (position and node.op_type not in _MANY_OUTPUTS):
                continue
            tensor = survey.settled(path, output)
            folded = bias_add(view, node, tensor, width) if position == 0 else None
            tensor = survey.settled(path, folded or tensor)
            if tensor not in taken:
                taken.add(tensor)
                found.append(_site(view, i, tensor, scopes[i], axes, layer=True))
    for i, node in enumerate(view.nodes):
        inserted = slot_of(node)
        for output in node.output:
            tensor = survey.settled(path, output)
            is_float = view.type_of(output).elem_type in (0, *FLOATS)
            if output and not inserted and is_float and tensor not in taken:
                taken.add(tensor)
                found.append(_site(view, i, tensor, scopes[i], axes, layer=False))
    return sorted(found, key=lambda site: site.core)


_MANY_OUTPUTS = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}


def _site(
    view: GraphView,
    core: int,
    tensor: str,
    module: str | None,
    axes: dict[str, int],
    *,
    layer: bool,
) -> Site:
    node = view.nodes[core]
    known = _site_type(view, node, tensor, layer=layer)
    kind = KINDS.get(node.op_type) if layer else None
    axis = kind.axis if kind else axes.get(tensor, LAST)
    rank = None if known.shape is None else len(known.shape)
    if rank is None and kind and axis == CHANNELS:
        weight = layer_weight(view, node)
        rank = len(weight.dims) if weight and len(weight.dims) > 2 else None
    if axis == CHANNELS and rank == 2:
        axis = LAST
    width = None
    if known.shape and -len(known.shape) <= axis < len(known.shape):
        size = known.shape[axis]
        width = size if isinstance(size, int) else None
    if width is None and kind:
        width = weight_width(view, node)
    site = Site(
        address=f"{view.scope.path}:{tensor}",
        node=node.name,
        op=node.op_type,
        tensor=tensor,
        module=module,
        width=width,
        dtype=elem_name(known.elem_type),
        axis=axis,
        refused=None,
        graph=view.scope.path,
        rank=rank,
        layer=layer,
        core=core,
    )
    return replace(site, refused=_refusal(view, site, known))


def _site_type(
    view: GraphView, node: onnx.NodeProto, tensor: str, *, layer: bool
) -> TensorType:
    known = view.type_of(tensor)
    if known.elem_type:
        return known
    elem_type = layer_elem_type(view, node) if layer else 0
    return TensorType(elem_type or _inherited(view, node), known.shape)


_SAME_TYPE = {
    *("Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Softmax", "Gelu"),
    *("FastGelu", "BiasGelu", "QuickGelu", "MatMul", "Gemm", "FusedMatMul", "FusedGemm"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Transpose", "Reshape"),
    *("SimplifiedLayerNormalization", "LayerNormalization", "RMSNormalization", "Identity"),
    *("RotaryEmbedding", "GroupQueryAttention", "MultiHeadAttention", "MatMulNBits"),
    *("FusedConv", "Conv", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze"),
}
"""Operators, contrib ones included, whose float output has the type of a float input."""


def _inherited(view: GraphView, node: onnx.NodeProto, depth: int = 0) -> int:
    """The element type of a node's first output where shape inference is silent."""
    if node.op_type not in _SAME_TYPE or depth > 64:
        return 0
    for name in node.input:
        known = view.type_of(name).elem_type
        if known in FLOATS:
            return known
    made = view.producer(node.input[0]) if node.input else None
    return _inherited(*made, depth + 1) if made else 0


def _refusal(view: GraphView, site: Site, known: TensorType) -> str | None:
    """Why a tensor cannot take an adapter, or None if it can."""
    if known.elem_type and known.elem_type not in FLOATS:
        better = float_downstream(view, site.tensor)
        reason = f"its elements are {site.dtype}, not floats"
        return f"{reason}; the float tensor downstream is {better!r}" if better else reason
    if not site.dtype:
        return "its element type is unknown, or it is no tensor"
    if site.tensor not in view.live:
        return "dead: its values reach no output of the model"
    if site.width is None:
        return "unknown width: its feature axis has no fixed size"
    if site.width < 1:
        return "its feature axis is empty"
    if known.shape == ():
        return "it is a scalar"
    if site.axis == CHANNELS and site.rank is None:
        return "unknown number of axes"
    if find_weight(view, site.tensor) is not None:
        return "it is a constant"
    return None


def _feature_axes(view: GraphView) -> dict[str, int]:
    """Tensors whose features are on axis 1: what convolutions make, and what keeps it so."""
    axes: dict[str, int] = {}
    for node in view.nodes:
        kind = KINDS.get(node.op_type)
        if kind is not None and node.op_type not in _KEEPS_LAYOUT:
            axis = kind.axis
        elif node.op_type in _KEEPS_LAYOUT:
            axis = max((axes.get(name, LAST) for name in node.input), default=LAST)
        else:
            continue
        if axis == CHANNELS:
            axes.update((name, CHANNELS) for name in node.output if name)
    return axes


_KEEPS_LAYOUT = {
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "Tanh"),
    *("HardSwish", "Swish", "Mish", "Softplus", "Gelu", "Erf", "Clip", "Identity", "Cast"),
    *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Abs", "Neg", "Exp", "Log", "Sum", "Mean"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "Dropout"),
    *("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN", "Pad"),
    *("Concat", "Upsample", "Resize", "QuantizeLinear", "DequantizeLinear", "Slice"),
}
"""Operators that leave the channel axis where it is."""


def _function_sites(proto: onnx.ModelProto) -> Iterator[Site]:
    for function in proto.functions:
        path = f"function {function.domain}::{function.name}"
        path += f"::{function.overload}" if function.overload else ""
        for node in function.node:
            for tensor in node.output:
                yield Site(
                    address=f"{path}:{tensor}",
                    node=node.name,
                    op=node.op_type,
                    tensor=tensor,
                    module=None,
                    width=None,
                    dtype="",
                    axis=LAST,
                    refused=f"inside the model-local {path}",
                    graph=path,
                    rank=None,
                    layer=node.op_type in KINDS,
                    core=-1,
                )
