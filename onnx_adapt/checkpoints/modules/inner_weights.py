"""Weights of modules inside operators, where no tensor of the graph is a module's product.

An example. ONNX Runtime's optimiser makes one node of BERT's self-attention:

    y = Attention(x, qkv_weight, qkv_bias)        with qkv_weight (64, 192)

`query`, `key` and `value` are the columns 0 to 64, 64 to 128 and 128 to 192 of its weight.
LoRA on `value` is a slot on this weight, whose `up` is zero in the first 128 columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnx_adapt.checkpoints.modules.norms_by_value import digest
from onnx_adapt.checkpoints.modules.weights import read_weight
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.column_spans import spans_of
from onnx_adapt.graph.index import GraphView, text
from onnx_adapt.graph.layer_calls import Packing
from onnx_adapt.graph.modules import module_of_tensor
from onnx_adapt.graph.sites import Survey
from onnx_adapt.model.file import Model


@dataclass(frozen=True, slots=True, eq=False)
class InnerWeight:
    """A module's weight inside an operator.

    Attributes:
        name: What a slot on it is called.
        view: The graph of the node.
        node: The node that reads it.
        position: Which input of the node it is.
        bias: Which input holds the module's bias with those of others, or None.
        in_out: Whether it is `(in, out)`, the transpose of PyTorch's.
        packing: The modules whose columns it has side by side, or None.
        span: The columns of this module, where it has those of others as well.
        group: The entry of its first axis that is this module's, or None.
        order: The blocks of PyTorch's rows in the order in which the operator has them; empty
            where that is the same.
    """

    name: str
    view: GraphView
    node: onnx.NodeProto
    position: int
    bias: int | None = None
    in_out: bool = True
    packing: Packing | None = None
    span: tuple[int, int] | None = None
    group: int | None = None
    order: tuple[int, ...] = ()

    @property
    def tensor(self) -> str:
        """The tensor that the node reads now."""
        return str(self.node.input[self.position])

    @property
    def label(self) -> str:
        """What to call the node in a message."""
        return text(self.node.name) or text(self.node.output[0])


@dataclass(frozen=True, slots=True)
class InnerWeights:
    """The weights inside operators that modules of a checkpoint may mean.

    Attributes:
        found: The weights of each module, by its path in the graph.
        refused: Modules inside operators that take no adapter, with the reason.
    """

    found: Mapping[str, Sequence[InnerWeight]] = field(default_factory=dict)
    refused: Mapping[str, CheckpointError] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """The paths of all these modules."""
        return [*self.found, *self.refused]

    def of(self, module: str) -> Sequence[InnerWeight]:
        """The weights of one module, one for each node that computes it.

        Raises:
            CheckpointError: If it is inside an operator that takes no adapter.
        """
        if module in self.refused:
            raise self.refused[module]
        return self.found.get(module, ())


_PROJECTIONS = {
    name: place
    for names in (
        ("query", "key", "value"),
        ("q_proj", "k_proj", "v_proj"),
        ("q_lin", "k_lin", "v_lin"),
        ("query_proj", "key_proj", "value_proj"),
        ("to_q", "to_k", "to_v"),
        ("q", "k", "v"),
    )
    for place, name in enumerate(names)
}
"""The names of an attention's projections, and which third of a packed weight is each."""

_WHOLE = ("c_attn", "qkv", "qkv_proj", "in_proj", "query_key_value", "Wqkv", "to_qkv")
"""The names of an attention's projections where the base has them in one module already."""

_REFUSED = {
    "QAttention": (
        "its weight is stored as 8-bit integers",
        "insert the adapter into the float model and quantise the result, or quantise without "
        "fusing the attention",
    ),
}
"""Attentions of ONNX Runtime whose weight takes no adapter, why, and what to do."""


def attention_weights(survey: Survey, modules: Collection[str]) -> InnerWeights:
    """Find the projections inside ONNX Runtime's Attention, by what is left of their scopes.

    An Attention has a name of the optimiser's, but its output is called as before: in
    `/encoder/layer.0/attention/self/Reshape_3_output_0` is the module around the projections.

    Args:
        survey: The survey of the model.
        modules: The modules of a checkpoint, which tell what the projections are called.
    """
    leaves = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    found: dict[str, list[InnerWeight]] = {}
    refused: dict[str, CheckpointError] = {}
    for view, node in _attentions(survey):
        around = _around(survey, view, node)
        for leaf in leaves if around is not None else ():
            path = f"{around}.{leaf}" if around else leaf
            if leaf not in _PROJECTIONS and leaf not in _WHOLE:
                continue
            if node.op_type in _REFUSED:
                refused[path] = _refusal(path, node)
            elif (inner := _projection(view, node, path)) is not None:
                found.setdefault(path, []).append(inner)
    return InnerWeights(found, refused)


def _attentions(survey: Survey) -> Iterator[tuple[GraphView, onnx.NodeProto]]:
    for view in survey.index.views.values():
        for node in view.nodes:
            known = node.op_type == "Attention" or node.op_type in _REFUSED
            known = known and node.domain == "com.microsoft"
            if known and len(node.input) > 1 and node.output:
                yield view, node


def _around(survey: Survey, view: GraphView, node: onnx.NodeProto) -> str | None:
    """The module that the projections inside an Attention are in.

    ALBERT runs one layer many times. The tensors of a later run are in `attention_1`, which is
    no module of its own.
    """
    around = module_of_tensor(survey.after_slots(view.scope.path, text(node.output[0])))
    return None if around is None else survey.modules.called(around)


def _refusal(path: str, node: onnx.NodeProto) -> CheckpointError:
    why, hint = _REFUSED[node.op_type]
    label = text(node.name) or text(node.output[0])
    return CheckpointError(
        f"module {path!r} is inside node {label!r} ({node.op_type}): {why}", hint=hint
    )


def _projection(view: GraphView, node: onnx.NodeProto, path: str) -> InnerWeight | None:
    """The columns of one projection, or of all where they are one module."""
    around, dot, leaf = path.rpartition(".")
    spans = _spans(view, node)
    if not spans:
        return None
    names = [name for name in _PROJECTIONS if name in _family(leaf)]
    packing = Packing(
        f"{around}{dot}qkv",
        tuple(f"{around}{dot}{name}" for name in names),
        (0, *(end for _, end in spans)),
    )
    if leaf in _WHOLE:
        return InnerWeight(path, view, node, 1, bias=2)
    span = spans[_PROJECTIONS[leaf]]
    return InnerWeight(packing.layer, view, node, 1, 2, packing=packing, span=span)


def _family(leaf: str) -> list[str]:
    """The names of all three projections, if one of them has this name."""
    names = list(_PROJECTIONS)
    if leaf not in names:
        return []
    start = names.index(leaf) - _PROJECTIONS[leaf]
    return names[start : start + 3]


def _spans(view: GraphView, node: onnx.NodeProto) -> list[tuple[int, int]]:
    """The columns of the three projections in an Attention's weight."""
    weight = view.weight(node.input[1])
    if weight is None or len(weight.dims) != 2:
        return []
    sizes = next((list(a.ints) for a in node.attribute if a.name == "qkv_hidden_sizes"), [])
    width = weight.dims[1]
    sizes = sizes or [width // 3] * 3
    return list(spans_of(sizes)) if len(sizes) == 3 and sum(sizes) == width else []


def attention_digests(model: Model, survey: Survey) -> dict[bytes, list[InnerWeight]]:
    """List the projections inside all Attentions by the digest of their weights.

    They are in PyTorch's layout, `(out, in)`, each by itself and all three together.
    """
    found: dict[bytes, list[InnerWeight]] = {}
    for view, node in _attentions(survey):
        if node.op_type in _REFUSED or not _spans(view, node):
            continue
        value = read_weight(model, view, node.input[1])
        label = _around(survey, view, node) or text(node.name) or "attention"
        for leaf in ("query", "key", "value", "qkv"):
            inner = _projection(view, node, f"{label}.{leaf}")
            if inner is not None:
                part = _columns(value, inner.span)
                found.setdefault(digest(part.T), []).append(inner)
    return found


def _columns(value: Array, span: tuple[int, int] | None) -> Array:
    return value if span is None else np.asarray(value[:, slice(*span)])
