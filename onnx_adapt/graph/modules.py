"""PyTorch module paths in exported graphs.

Each exporter leaves a trace of the module a node came from: torch's dynamo exporter and
onnxscript's builder (which mobius uses) in `metadata_props`, the TorchScript exporter (and
optimum, and the onnxruntime-genai builder) in the node's name. Source of the rules: the
exporters' own output for 23 architectures.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.graph.index import GraphView, ModelIndex, text
from onnx_adapt.graph.layers import is_layer, layer_weight
from onnx_adapt.graph.value_numbers import ValueNumbers
from onnx_adapt.slot.manifest import slot_of

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Whole paths, from the model's '' to the module, and the node's own name at last."""
_ATTRIBUTE_NAMES = "pkg.onnxscript.name_scopes"
"""The names of the attributes on the way to the module: `['', 'model', 'layers.0', 'mlp']`."""
_FUSED = "fused "
"""ONNX Runtime puts it before the name of a layer that it gave an activation."""
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_LONGEST, _DEEPEST = 1000, 100
"""No module is so far inside others; every one of them gets a path of its own."""


def module_of(node: onnx.NodeProto) -> str | None:
    """The path of the module a node was exported from; '' is the model itself.

    Returns:
        The dotted path, or None if the exporter left no trace.
    """
    entries = {text(entry.key): text(entry.value) for entry in node.metadata_props}
    path = _from_name_scopes(entries.get(_NAME_SCOPES, ""))
    if path is None:
        path = _from_attribute_names(entries.get(_ATTRIBUTE_NAMES, ""))
    if path is None:
        path = _from_namespace(entries.get("namespace", ""))
    name = text(node.name).removeprefix(_FUSED)
    if path is None and name.startswith("/"):
        path = _from_node_name(name)
    if (
        path is None
        or _NO_MODULE in path
        or len(path) > _LONGEST
        or path.count(".") > _DEEPEST
    ):
        return None
    return path


def module_of_tensor(name: str) -> str | None:
    """The path of the module that computes a tensor, from a name as TorchScript gives it.

    Such a name is `/encoder/layer.0/attention/MatMul_output_0`.

    Returns:
        The dotted path, or None for other names, such as those of parameters.
    """
    return _from_node_name(name) if _COMPUTED.match(name) else None


_COMPUTED = re.compile(r"/.*_output_\d+$")


def _from_name_scopes(value: str) -> str | None:
    scopes = _read_list(value)
    return scopes[-2] if scopes is not None and len(scopes) > 1 else None


def _from_attribute_names(value: str) -> str | None:
    names = _read_list(value)
    return None if names is None else ".".join(filter(None, names))


def _read_list(value: str) -> list[str] | None:
    """Read a list of texts as Python writes it; None if it is something else."""
    try:
        found = ast.literal_eval(value) if value else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    texts = isinstance(found, list) and all(isinstance(item, str) for item in found)
    return found if texts else None


def _from_namespace(value: str) -> str | None:
    parts = value.split("/")
    if len(parts) < 2 or ": " not in parts[-2]:
        return None
    return parts[-2].split(": ")[0]


def _from_node_name(name: str) -> str:
    path: list[str] = []
    for part in name.split("/")[1:-1]:
        # A called Sequential repeats its name: /layer1/layer1.0/conv1/Conv.
        if path and part.startswith(path[-1] + "."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


@dataclass(frozen=True, slots=True, eq=False)
class ModuleIndex:
    """The modules that can be seen in a model.

    Attributes:
        index: The model's index.
        scopes: Graph path -> module of each node, None where unknown.
        members: Module path -> graph path -> the nodes inside, in order. In order of
            appearance, every ancestor before its descendants.
        numbered: Module path -> paths that may be later calls of it.
        values: Tells which weights are equal.
    """

    index: ModelIndex
    scopes: dict[str, list[str | None]]
    members: dict[str, dict[str, list[int]]]
    numbered: dict[str, list[str]]
    values: ValueNumbers

    @property
    def paths(self) -> Collection[str]:
        """Every module path seen, with all its ancestors, in order of appearance."""
        return self.members.keys()

    def called(self, path: str) -> str:
        """The module that is called, if a path as TorchScript counts calls is a later one."""
        first = _CALL.sub("", path)
        later = path not in self.paths or path in self.numbered.get(first, ())
        return first if later and first in self.paths else path

    def add(self, path: str, graph: str, node: int) -> None:
        """Note that a node is inside a module, and so inside the modules around it."""
        for around in _ancestry(path) if path else ():
            self.members.setdefault(around, {}).setdefault(graph, []).append(node)


def index_modules(index: ModelIndex) -> ModuleIndex:
    """Read the module of every node."""
    scopes = {
        graph: [own_scope(node) for node in view.nodes] for graph, view in index.views.items()
    }
    values = ValueNumbers(index.model)
    merged, numbered = _later_calls(index, scopes, values)
    modules = ModuleIndex(index, scopes, {}, numbered, values)
    for graph, view in index.views.items():
        here = scopes[graph] = [merged.get(path or "", path) for path in scopes[graph]]
        for i, path in enumerate(here):
            modules.add(_surroundings(view, here, i) if path is None else path, graph, i)
    return modules


_CALL = re.compile(r"_\d+$")


def own_scope(node: onnx.NodeProto) -> str | None:
    """The module that a node of the base says it is from; slots are from none."""
    return None if slot_of(node) else module_of(node)


def may_be_later_call(node: onnx.NodeProto) -> bool:
    """Whether the module that a node names may be a later call of another, such as `X_1`."""
    return _CALL.search(own_scope(node) or "") is not None


def _later_calls(
    index: ModelIndex, scopes: dict[str, list[str | None]], values: ValueNumbers
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Tell TorchScript's `X_1`, the second call of `X`, from a module that is called so.

    Returns:
        The later calls with their modules, as their weights show; and for modules without
        weights, which cannot be told apart, the paths that may be later calls.
    """
    weights: dict[str, list[onnx.TensorProto]] = {}  # what the layers inside a module read
    known: set[str] = set()
    for graph, view in index.views.items():
        for path, node in zip(scopes[graph], view.nodes, strict=True):
            if path and text(node.name).startswith("/"):
                known.add(path)
                weight = layer_weight(view, node) if is_layer(view, node) else None
                if weight is not None:
                    for around in _ancestry(path):
                        weights.setdefault(around, []).append(weight.tensor)
    holders = {around for path in known for around in _ancestry(path) if around != path}
    merged: dict[str, str] = {}
    numbered: dict[str, list[str]] = {}
    for path in sorted(known - holders):
        first = _CALL.sub("", path)
        if first == path or first not in known:
            continue
        others = Counter(map(values.of, weights.get(first, ())))
        own = set(map(values.of, weights.get(path, ())))
        if not own and not others:
            numbered.setdefault(first, []).append(path)
        elif others.keys() >= own and (own or min(others.values()) > 1):
            merged[path] = first
    return merged, numbered


def _ancestry(path: str) -> Iterator[str]:
    """A module's path and those of the modules around it, outermost first."""
    end = -1
    while end != len(path):
        end = (path + ".").index(".", end + 1)
        yield path[:end]


def _surroundings(view: GraphView, scopes: list[str | None], i: int) -> str:
    """The innermost module around a node without a trace, or ''.

    A node that an optimiser wrote belongs to a module if everything around it does.
    """
    node = view.nodes[i]
    before = {view.producers[name] for name in node.input if name in view.producers}
    before = {j for j in before if view.nodes[j].op_type != "Constant"}
    after = {j for name in node.output for j in view.consumers.get(name, ())}
    around = [scopes[j] for j in before | after]
    exposed = any(name in view.outputs for name in node.output)
    if slot_of(node) or exposed or not before or not after or None in around:
        return ""
    paths = [list(_ancestry(path or "")) for path in around]
    shared = [path for path in paths[0] if all(path in others for others in paths)]
    return shared[-1] if shared else ""


def match_path(paths: Collection[str], wanted: str) -> list[str]:
    """The module paths that `wanted` can mean.

    In this order: the path itself; paths that end with it (the exported model was
    wrapped); the longest path it ends with (it was saved from inside a wrapper, such as
    PEFT's `base_model.model.`). Of nested hits only the outermost counts.
    """
    wanted = wanted.removeprefix("base_model.model.")
    if wanted in paths:
        return [wanted]
    hits = [path for path in paths if path.endswith("." + wanted)]
    if not hits:
        inner = [path for path in paths if wanted.endswith("." + path)]
        longest = max((len(path) for path in inner), default=0)
        hits = [path for path in inner if len(path) == longest]
    return [h for h in hits if not any(h.startswith(o + ".") for o in hits)]


def module_output(modules: ModuleIndex, path: str) -> list[tuple[GraphView, str]]:
    """The last tensor a module hands to the rest of the model, per graph it is in."""
    found = []
    for graph, inside in modules.members.get(path, {}).items():
        view = modules.index.views[graph]
        tensor = last_boundary(view, inside)
        if tensor is not None:
            found.append((view, tensor))
    return found


def last_boundary(view: GraphView, inside: Collection[int]) -> str | None:
    """The last float tensor that some nodes hand to the others, or to an output."""
    # A quantiser calls its nodes after the tensor that they quantise for the next layer.
    nodes = {i for i in inside if view.nodes[i].op_type != "DynamicQuantizeLinear"}
    for i in sorted(nodes, reverse=True):
        outputs: list[str] = list(view.nodes[i].output)
        for tensor in outputs:
            known = view.type_of(tensor)
            if known.elem_type and known.elem_type not in FLOATS:
                continue
            leaves = any(j not in nodes for j in view.consumers.get(tensor, ()))
            if tensor and tensor in view.live and (leaves or tensor in view.outputs):
                return tensor
    return None
