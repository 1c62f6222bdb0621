"""PyTorch module paths in exported graphs.

Each exporter leaves a trace of the module a node came from: torch's dynamo exporter in
`metadata_props`, the TorchScript exporter (and optimum, and the onnxruntime-genai
builder) in the node's name. Source of the rules: the exporters' own output for 23
architectures.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from onnx_adapt.graph import FLOATS, GraphView, ModelIndex, slot_of

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


def module_of(node: onnx.NodeProto) -> str | None:
    """The path of the module a node was exported from; '' is the model itself.

    Returns:
        The dotted path, or None if the exporter left no trace.
    """
    entries = {entry.key: entry.value for entry in node.metadata_props}
    path = _from_name_scopes(entries.get(_NAME_SCOPES, ""))
    if path is None:
        path = _from_namespace(entries.get("namespace", ""))
    if path is None and node.name.startswith("/"):
        path = _from_node_name(node.name)
    return None if path is None or _NO_MODULE in path else path


def _from_name_scopes(text: str) -> str | None:
    if not text:
        return None
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(scopes, list) or len(scopes) < 2 or not isinstance(scopes[-2], str):
        return None
    return scopes[-2]


def _from_namespace(text: str) -> str | None:
    parts = text.split("/")
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
        paths: Every module path seen, with all its ancestors, in order of appearance.
    """

    index: ModelIndex
    scopes: dict[str, list[str | None]]
    paths: dict[str, None]


def index_modules(index: ModelIndex) -> ModuleIndex:
    """Read the module of every node."""
    scopes: dict[str, list[str | None]] = {}
    paths: dict[str, None] = {}
    for name, view in index.views.items():
        scopes[name] = [None if slot_of(node) else module_of(node) for node in view.nodes]
        for path in scopes[name]:
            if path and path not in paths:
                parts = path.split(".")
                for end in range(1, len(parts) + 1):
                    paths.setdefault(".".join(parts[:end]))
    return ModuleIndex(index, scopes, paths)


def match_path(paths: Iterable[str], wanted: str) -> list[str]:
    """The module paths that `wanted` can mean.

    In this order: the path itself; paths that end with it (the exported model was
    wrapped); the longest path it ends with (it was saved from inside a wrapper, such as
    PEFT's `base_model.model.`). Of nested hits only the outermost counts.
    """
    known = list(paths)
    wanted = wanted.removeprefix("base_model.model.")
    if wanted in known:
        return [wanted]
    hits = [path for path in known if path.endswith("." + wanted)]
    if not hits:
        inner = [path for path in known if wanted.endswith("." + path)]
        longest = max((len(path) for path in inner), default=0)
        hits = [path for path in inner if len(path) == longest]
    return [h for h in hits if not any(h.startswith(o + ".") for o in hits)]


def module_output(modules: ModuleIndex, path: str) -> list[tuple[GraphView, str]]:
    """The last tensor a module hands to the rest of the model, per graph it is in."""
    found = []
    for name, view in modules.index.views.items():
        inside = _members(view, modules.scopes[name], path)
        tensor = _last_boundary(view, inside)
        if tensor is not None:
            found.append((view, tensor))
    return found


def _members(view: GraphView, scopes: list[str | None], path: str) -> set[int]:
    inside = {
        i for i, s in enumerate(scopes) if s is not None and (s + ".").startswith(path + ".")
    }
    if not inside:
        return inside
    # A node without a trace (rewritten by an optimiser, or a slot of ours) belongs to
    # the module if everything around it does.
    for i in (i for i, scope in enumerate(scopes) if scope is None):
        node = view.nodes[i]
        before = {view.producers[n] for n in node.input if n in view.producers}
        before = {j for j in before if view.nodes[j].op_type != "Constant"}
        after = {j for name in node.output for j in view.consumers.get(name, ())}
        exposed = any(name in view.outputs for name in node.output)
        if not exposed and after and before and before | after <= inside:
            inside.add(i)
    return inside


def _last_boundary(view: GraphView, inside: set[int]) -> str | None:
    for i in sorted(inside, reverse=True):
        outputs: list[str] = list(view.nodes[i].output)
        for tensor in outputs:
            known = view.type_of(tensor)
            if known.elem_type and known.elem_type not in FLOATS:
                continue
            leaves = any(j not in inside for j in view.consumers.get(tensor, ()))
            if tensor and tensor in view.live and (leaves or tensor in view.outputs):
                return tensor
    return None


_CALL = re.compile(r"_\d+$")


def same_module(scope: str | None, path: str) -> bool:
    """Whether `scope` is a call of module `path`: TorchScript numbers later calls `_1`."""
    return scope is not None and (scope == path or _CALL.sub("", scope) == path)
