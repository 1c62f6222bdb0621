"""Find the sites of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.errors import ManifestError
from onnx_adapt.graph.described import describe, function_sites, is_name
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
    bias_add,
    is_layer,
    weight_width,
)
from onnx_adapt.graph.layout import Features, Layout, given_axis
from onnx_adapt.graph.modules import (
    ModuleIndex,
    index_modules,
    may_be_later_call,
    own_scope,
)
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.site import Site
from onnx_adapt.model.file import Model
from onnx_adapt.slot.manifest import read_manifest, slot_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Survey:
    """What is known of a model before names are looked up in it.

    A site is described when it is asked for: most names mean one of many thousand.

    Attributes:
        index: Tensors and nodes.
        slots: For each graph, what each slot makes of a tensor: inner -> outer.
    """

    index: ModelIndex
    slots: dict[str, dict[str, str]]
    _described: dict[str, Site] = field(default_factory=dict)

    @cached_property
    def slot_outputs(self) -> dict[str, dict[str, str]]:
        """For each graph, the tensors that slots are on, with the output of the last slot."""
        return {path: _outermost(names) for path, names in self.slots.items()}

    @cached_property
    def layout(self) -> Layout:
        """Where the features of each tensor are."""
        return Layout(self.index, self.slots)

    @cached_property
    def modules(self) -> ModuleIndex:
        """PyTorch modules."""
        return index_modules(self.index)

    @cached_property
    def sites(self) -> list[Site]:
        """All sites: layers and every other float tensor, in graph order; then functions'."""
        graphs = (self._graph_sites(view) for view in self.index.views.values())
        return [*chain.from_iterable(graphs), *self._function_sites]

    @cached_property
    def layers(self) -> list[Site]:
        """The sites that are outputs of layers, in the same order."""
        graphs = (self._graph_sites(view, others=False) for view in self.index.views.values())
        inside = (site for site in self._function_sites if site.layer)
        return [*chain.from_iterable(graphs), *inside]

    @cached_property
    def hidden(self) -> dict[str, list[Site]]:
        """The sites inside functions, by the names of their nodes and tensors."""
        found: dict[str, list[Site]] = {}
        for site in self._function_sites:
            for name in filter(None, (site.node, site.tensor)):
                found.setdefault(name, []).append(site)
        return found

    @cached_property
    def _function_sites(self) -> list[Site]:
        return list(function_sites(self.index.model.proto))

    @cached_property
    def _in_functions(self) -> dict[str, Site]:
        return {site.address: site for site in self._function_sites}

    @cached_property
    def _inside(self) -> dict[str, dict[str, list[str]]]:
        """For each graph, the output of the last slot on tensors, with these tensors."""
        found: dict[str, dict[str, list[str]]] = {}
        for path, names in self.slot_outputs.items():
            for inner, outer in names.items():
                found.setdefault(path, {}).setdefault(outer, []).append(inner)
        return found

    @cached_property
    def _nodes(self) -> dict[str, dict[str, int | list[int]]]:
        """For each graph, the nodes of each name; nearly always there is one."""
        found: dict[str, dict[str, int | list[int]]] = {}
        for path, view in self.index.views.items():
            here: dict[str, int | list[int]] = {}
            for i, node in enumerate(view.nodes):
                first = here.setdefault(text(node.name), i)
                if isinstance(first, list):
                    first.append(i)
                elif first != i:
                    here[text(node.name)] = [first, i]
            found[path] = here
        return found

    @cached_property
    def _layers(self) -> dict[str, dict[str, _Layer]]:
        """For each graph, the outputs of its layers."""
        return {path: _layers(self, view) for path, view in self.index.views.items()}

    @cached_property
    def _layers_of(self) -> dict[tuple[str, int], list[str]]:
        """The outputs of each layer, by graph and node."""
        found: dict[tuple[str, int], list[str]] = {}
        for path, layers in self._layers.items():
            for tensor, layer in layers.items():
                found.setdefault((path, layer.node), []).append(tensor)
        return found

    def by_node(self, name: str) -> list[tuple[GraphView, int]]:
        """The nodes of a name that make something and are no slot's: graph and index."""
        found = []
        for path, names in self._nodes.items() if name else ():
            view, places = self.index.views[path], names.get(name, [])
            for i in places if isinstance(places, list) else [places]:
                if any(view.nodes[i].output) and not slot_of(view.nodes[i]):
                    found.append((view, i))
        return found

    def layers_of(self, path: str, number: int) -> list[Site]:
        """The outputs of a layer, by the graph and the index of its node."""
        tensors = self._layers_of.get((path, number), ())
        return [self.site(self.index.views[path], tensor) for tensor in tensors]

    def at(self, address: str) -> Site | None:
        """The site of an address, or None if no site has it."""
        path, _, tensor = address.partition(":")
        view = self.index.views.get(path)
        if view is None:
            return self._in_functions.get(address)
        known = tensor in self._layers[path] or self._maker(view, tensor) is not None
        return self.site(view, tensor) if known else None

    def site(self, view: GraphView, tensor: str) -> Site:
        """The site of any tensor that a node of `view` makes, refused or not."""
        path = view.scope.path
        address = f"{path}:{tensor}"
        if address not in self._described:
            layer = self._layers[path].get(tensor)
            if layer is not None:
                site = self._describe(view, layer.node, tensor, layer=True, bias=layer.bias)
            else:
                maker = self._maker(view, tensor)
                number = view.producers[tensor] if maker is None else maker
                site = self._describe(view, number, tensor)
            self._described[address] = site
        return self._described[address]

    def call(self, view: GraphView, node: onnx.NodeProto) -> LayerCall | None:
        """The call that a layer's node makes; None if its product is nowhere a float."""
        return layer_call(view, node, self.slot_outputs.get(view.scope.path, {}))

    def on_axis(self, site: Site, axis: int) -> Site:
        """The same place with its features on an axis that the user names."""
        view = self.index.views.get(site.graph)
        if view is None:
            return site  # inside a function, refused
        given = given_axis(axis, site.rank)
        moved = self._describe(
            view, site.node_index, site.tensor, layer=site.layer, given=given
        )
        return replace(moved, also=site.also, before_bias=site.before_bias)

    def after_slots(self, graph: str, tensor: str) -> str:
        """The output of the last slot on a tensor, or the tensor if no slot is on it.

        Where slots `a` and `b` are stacked on `h`, readers of `h` see what `b` makes, so a
        new slot goes behind `b`.
        """
        return self.slot_outputs.get(graph, {}).get(tensor, tensor)

    def _describe(
        self,
        view: GraphView,
        number: int,
        tensor: str,
        *,
        layer: bool = False,
        bias: str | None = None,
        given: Features | None = None,
    ) -> Site:
        return describe(
            *(self.index, self.layout, view, number, tensor),
            module=self.module(view, number),
            layer=layer,
            bias=bias,
            given=given,
        )

    def module(self, view: GraphView, number: int) -> str | None:
        """The module that a node was exported from; None if nothing tells."""
        if "modules" in self.__dict__ or may_be_later_call(view.nodes[number]):
            return self.modules.scopes[view.scope.path][number]
        return own_scope(view.nodes[number])

    def _maker(self, view: GraphView, tensor: str) -> int | None:
        """The node whose float output is a tensor, or ends in it behind slots; or None."""
        inside = list(self._inside.get(view.scope.path, {}).get(tensor, ()))
        if tensor == self.after_slots(view.scope.path, tensor):
            inside.append(tensor)
        makers = [
            _first_producer(view, name)
            for name in inside
            if name in view.producers and view.type_of(name).elem_type in (0, *FLOATS)
        ]
        return min((i for i in makers if not slot_of(view.nodes[i])), default=None)

    def _graph_sites(self, view: GraphView, *, others: bool = True) -> list[Site]:
        """The sites of one graph, in its order: layers, and `others`, all float tensors."""
        path = view.scope.path
        tensors = dict.fromkeys(self._layers[path])
        for node in view.nodes if others else ():
            for output in filter(is_name, () if slot_of(node) else node.output):
                if view.type_of(output).elem_type in (0, *FLOATS):
                    tensors.setdefault(self.after_slots(path, output))
        found = [self.site(view, tensor) for tensor in tensors]
        return sorted(found, key=lambda site: site.node_index)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The output of a layer: the index of its node, and the output of its bias Add, if any."""

    node: int
    bias: str | None


def survey_model(model: Model) -> Survey:
    """Index a model, so that its sites can be found.

    Raises:
        ManifestError: If the record of its slots is damaged.
    """
    index = index_model(model)
    _tell_stale(index)
    slots: dict[str, dict[str, str]] = {}
    manifest = read_manifest(model.proto)
    for slot in manifest.slots if manifest else ():
        if slot.on_edge and not slot.on_weight:
            continue  # others read the tensor itself
        if slot.graph in index.views and slot.output in index.views[slot.graph].producers:
            slots.setdefault(slot.graph, {})[slot.inner] = slot.output
    survey = Survey(index, slots)
    _ = survey.slot_outputs  # a manifest whose slots stand in a circle is refused here
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


def _layers(survey: Survey, view: GraphView) -> dict[str, _Layer]:
    """The outputs of a graph's layers; the first of two that end in one."""
    path = view.scope.path
    found: dict[str, _Layer] = {}
    for i, node in enumerate(view.nodes):
        if not is_layer(view, node):
            continue
        for output in filter(is_name, node.output[: OPERATORS[node.op_type].outputs]):
            made = float_product(view, node, output) or output
            inner = survey.after_slots(path, made)
            bias = bias_add(view, node, inner, weight_width(view, node))
            tensor = survey.after_slots(path, bias or inner)
            found.setdefault(tensor, _Layer(i, bias))
    return found


def _first_producer(view: GraphView, tensor: str) -> int:
    """The first node that makes a tensor; a damaged model has several."""
    if tensor not in view.repeated:
        return view.producers[tensor]
    return next(i for i, node in enumerate(view.nodes) if tensor in node.output)
