"""Find the sites of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.errors import ManifestError
from onnx_adapt.graph.fused_bias import FusedBias, bias_behind
from onnx_adapt.graph.index import (
    GraphView,
    ModelIndex,
    TensorType,
    elem_name,
    index_model,
    text,
)
from onnx_adapt.graph.layer_calls import LayerCall, float_product, layer_call
from onnx_adapt.graph.layers import (
    BLOCKED,
    bias_add,
    feature_width,
    inherited_type,
    is_layer,
    weight_width,
)
from onnx_adapt.graph.layout import Features, Layout, find_layout, given_axis
from onnx_adapt.graph.modules import ModuleIndex, index_modules
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.site import Site, rank_of, refusal
from onnx_adapt.graph.unfusing import can_write_out
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.slot.manifest import read_manifest, slot_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What is known of a model before names are looked up in it: one pass over its graphs.

    Attributes:
        index: Tensors and nodes.
        modules: PyTorch modules.
        layout: Where the features of each tensor are.
        slot_outputs: For each graph, the tensors that slots are on, each with the output of
            the last slot on it.
        sites: All sites: layers and every other float tensor, in graph order.
        by_address: The sites by their address.
        by_node: The nodes that make something, by name: graph and index.
        layers_of: The outputs of each layer, by graph and node.
        hidden: The sites inside functions, by the names of their nodes and tensors.
    """

    index: ModelIndex
    modules: ModuleIndex
    layout: Layout
    slot_outputs: dict[str, dict[str, str]]
    sites: list[Site] = field(default_factory=list)
    by_address: dict[str, Site] = field(default_factory=dict)
    by_node: dict[str, list[tuple[GraphView, int]]] = field(default_factory=dict)
    layers_of: dict[tuple[str, int], list[Site]] = field(default_factory=dict)
    hidden: dict[str, list[Site]] = field(default_factory=dict)

    def site(self, view: GraphView, tensor: str) -> Site:
        """The site of any tensor that a node of `view` makes, refused or not."""
        address = f"{view.scope.path}:{tensor}"
        if address in self.by_address:
            return self.by_address[address]
        return _site(self, view, view.producers[tensor], tensor)

    def call(self, view: GraphView, node: onnx.NodeProto) -> LayerCall | None:
        """The call that a layer's node makes; None if its product is nowhere a float."""
        return layer_call(view, node, self.slot_outputs.get(view.scope.path, {}))

    def on_axis(self, site: Site, axis: int) -> Site:
        """The same place with its features on an axis that the user names."""
        view = self.index.views.get(site.graph)
        if view is None:
            return site  # inside a function, refused
        given = given_axis(axis, site.rank)
        moved = _site(self, view, site.node_index, site.tensor, layer=site.layer, given=given)
        return replace(moved, also=site.also, before_bias=site.before_bias)

    def after_slots(self, graph: str, tensor: str) -> str:
        """The output of the last slot on a tensor, or the tensor if no slot is on it.

        Where slots `a` and `b` are stacked on `h`, readers of `h` see what `b` makes, so a
        new slot goes behind `b`.
        """
        return self.slot_outputs.get(graph, {}).get(tensor, tensor)


def survey_model(model: Model) -> Survey:
    """Index a model and find all its sites."""
    index = index_model(model)
    _tell_stale(index)
    slot_outputs: dict[str, dict[str, str]] = {}
    manifest = read_manifest(model.proto)
    for slot in manifest.slots if manifest else ():
        if slot.on_edge and not slot.on_weight:
            continue  # others read the tensor itself
        if slot.graph in index.views and slot.output in index.views[slot.graph].producers:
            slot_outputs.setdefault(slot.graph, {})[slot.inner] = slot.output
    layout = find_layout(index, slot_outputs)
    slot_outputs = {path: _outermost(names) for path, names in slot_outputs.items()}
    survey = Survey(index, index_modules(index), layout, slot_outputs)
    for view in index.views.values():
        survey.sites.extend(_graph_sites(survey, view))
        for i, node in enumerate(view.nodes):
            if node.name and any(node.output) and not slot_of(node):
                survey.by_node.setdefault(text(node.name), []).append((view, i))
    for site in survey.sites:
        if site.layer:
            survey.layers_of.setdefault((site.graph, site.node_index), []).append(site)
    for site in _function_sites(model.proto):
        survey.sites.append(site)
        for name in filter(None, (site.node, site.tensor)):
            survey.hidden.setdefault(name, []).append(site)
    survey.by_address.update((site.address, site) for site in survey.sites)
    return survey


def _tell_stale(index: ModelIndex) -> None:
    """Say once that a model records what cannot be; nothing else depends on it."""
    stale = index.stale_records()
    for address, (record, known) in list(stale.items())[:1]:
        _log.warning(
            "the model records %s for %r, but %s follows from its inputs and weights%s; "
            "its records are not used",
            *(_in_words(record), address, _in_words(known)),
            f" (and so for {len(stale) - 1} more)" if len(stale) > 1 else "",
        )


def _in_words(known: TensorType) -> str:
    sizes = ", ".join("?" if dim is None else str(dim) for dim in known.shape or ())
    return f"{elem_name(known.elem_type)}[{sizes if known.shape is not None else '...'}]"


def _outermost(outer: Mapping[str, str]) -> dict[str, str]:
    """Where each chain of slots that are stacked on each other ends.

    Raises:
        ManifestError: If one comes back to where it was.
    """
    ends: dict[str, str] = {}
    for tensor in outer:
        chain = []
        while tensor in outer and tensor not in ends:
            chain.append(tensor)
            tensor = outer[tensor]
            if len(chain) > len(outer):
                raise ManifestError(f"the slots on {tensor!r} are stacked in a circle")
        ends.update(dict.fromkeys(chain, ends.get(tensor, tensor)))
    return ends


def _graph_sites(survey: Survey, view: GraphView) -> list[Site]:
    path = view.scope.path
    found: dict[str, Site] = {}
    for i, node in enumerate(view.nodes):
        if not is_layer(view, node):
            continue
        outputs = node.output[: OPERATORS[node.op_type].outputs]
        for output in filter(_is_name, outputs):
            made = float_product(view, node, output) or output
            inner = survey.after_slots(path, made)
            bias = bias_add(view, node, inner, weight_width(view, node))
            tensor = survey.after_slots(path, bias or inner)
            if tensor not in found:
                found[tensor] = _site(survey, view, i, tensor, layer=True, bias=bias)
    for i, node in enumerate(view.nodes):
        for output in filter(_is_name, () if slot_of(node) else node.output):
            tensor = survey.after_slots(path, output)
            if tensor not in found and view.type_of(output).elem_type in (0, *FLOATS):
                found[tensor] = _site(survey, view, i, tensor)
    return sorted(found.values(), key=lambda site: site.node_index)


def _is_name(name: str | bytes) -> bool:
    """Whether an output is there; a name that is no text could not be written again."""
    return isinstance(name, str) and name != ""


def _site(
    survey: Survey,
    view: GraphView,
    number: int,
    tensor: str,
    *,
    layer: bool = False,
    bias: str | None = None,
    given: Features | None = None,
) -> Site:
    node = view.nodes[number]
    path = view.scope.path
    known = view.type_of(tensor)
    known = TensorType(known.elem_type or inherited_type(view, node), known.shape)
    rank = rank_of(view, node, known)
    features = given or _features(survey, view, node, tensor, layer)
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
        module=survey.modules.scopes[path][number],
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
    behind = bias_behind(survey.index, view, tensor, width) if layer and not bias else None
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
    survey: Survey, view: GraphView, node: onnx.NodeProto, tensor: str, layer: bool
) -> Features:
    if layer:
        return survey.layout.of_layer(view, node, tensor)
    return survey.layout.of(view, tensor)


def _function_sites(proto: onnx.ModelProto) -> Iterator[Site]:
    for function in proto.functions:
        label = f"function {function.domain}::{function.name}"
        label += f"::{function.overload}" if function.overload else ""
        for scope in walk.scopes(onnx.GraphProto(node=function.node), label):
            for number, node in enumerate(scope.graph.node):
                for tensor in filter(_is_name, node.output):
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
