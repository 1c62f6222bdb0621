"""Find the modules of a graph that lost its names by the values of the base's weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.modules.calls import ParameterInput, refuse_uncalled
from onnx_adapt.checkpoints.modules.inner_weights import (
    InnerWeight,
    InnerWeights,
    attention_digests,
)
from onnx_adapt.checkpoints.modules.norms_by_value import digest, norms_by_value
from onnx_adapt.checkpoints.modules.weights import read_matrix
from onnx_adapt.dtypes import DTYPES, FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.column_spans import column_spans
from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight, is_module_call
from onnx_adapt.graph.norms import BaseNorm
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.sites import Survey
from onnx_adapt.model.file import Model


@dataclass(frozen=True, slots=True)
class ByValue:
    """Finds modules by the weights that the base had before it was exported.

    Attributes:
        label: The file of the weights.
        weights: The base's state dict.
        found: The calls of each module.
        norms: The calls of each normalisation.
        alike: The modules that share their values with others, and which those are.
        free: The shapes of the layers that belong to no module of the file.
        inner: The weights of modules inside operators.
    """

    label: str
    weights: Mapping[str, Array]
    found: Mapping[str, list[LayerCall]]
    norms: Mapping[str, list[BaseNorm]]
    alike: Mapping[str, list[str]]
    free: frozenset[tuple[int, ...]]
    inner: InnerWeights

    def known(self) -> list[str]:
        """The modules of the file, and those whose output is a LayerNorm."""
        modules = dict.fromkeys(key.rpartition(".")[0] for key in self.weights)
        parents = [m.removesuffix(".LayerNorm") for m in modules if m.endswith(".LayerNorm")]
        return list(dict.fromkeys([*modules, *parents]))

    def stored(self) -> list[str]:
        """None: all modules of the file are known."""
        return []

    def calls(self, module: str, *, called: bool = True) -> list[LayerCall]:
        """The calls of a module, in graph order."""
        if called:
            refuse_uncalled(module, self.weights)
        return self.found.get(module, [])

    def inner_weights(self, module: str) -> Sequence[InnerWeight]:
        """The weights of a module inside operators, one for each node that computes it."""
        return self.inner.of(module)

    def parameter(self, name: str) -> Array | None:
        """The base's value of a parameter, by its path in the file.

        Raises:
            CheckpointError: If the file has none, or another that is equal.
        """
        value = self.weights.get(name)
        if value is None:
            raise CheckpointError(
                f"{self.label} has no parameter {name!r}",
                hint="give the weights of the whole base that was exported",
            )
        for other, array in self.weights.items():
            same = other != name and array.shape == value.shape
            if same and np.array_equal(array, value):
                raise CheckpointError(
                    f"parameter {name!r} cannot be told from {other!r} in the graph: their "
                    "values are equal",
                    hint="insert the adapter into the model as exported, with its names",
                )
        return value

    def is_uncalled(self, _module: str) -> bool:
        """False: without scopes a graph does not tell whether PyTorch calls a module."""
        return False

    def norm_inputs(self, module: str, parameter: str) -> list[ParameterInput]:
        """Where a parameter of a normalisation enters the graph.

        Raises:
            CheckpointError: If the module was not found.
        """
        if module not in self.norms:
            raise self.missing(module)
        places = (
            (norm.view, norm.weight if parameter == "weight" else norm.bias)
            for norm in self.norms[module]
        )
        return [
            ParameterInput(view, *place, False) for view, place in places if place is not None
        ]

    def output(self, module: str) -> list[tuple[GraphView, str]]:
        """The tensors that a module passes on, if they are the output of its LayerNorm."""
        norms = self.norms.get(f"{module}.LayerNorm")
        if norms is None:
            raise self.missing(f"{module}.LayerNorm")
        return [(norm.view, norm.output) for norm in norms]

    def missing(self, module: str) -> CheckpointError:
        """The error that says why a module was not found."""
        if module in self.alike:
            others = ", ".join(map(repr, self.alike[module][:3])) or "another"
            return CheckpointError(
                f"module {module!r} cannot be told from {others} in the graph: their weights "
                "are equal",
                hint="insert the adapter into the model as exported, with its names",
            )
        return CheckpointError(
            f"the weight of module {module!r} in {self.label} is not in the graph",
            hint="give the weights that were exported; a layer that was fused or quantised "
            "since has others",
        )

    def lacks_head(self, head: Mapping[str, Array], names: Mapping[str, str]) -> bool:
        """Whether the graph has no layer that could be one of a head's."""
        return not any(
            key.endswith(".weight")
            and value.ndim == 2
            and (
                names.get(key.removesuffix(".weight")) in self.found
                or value.shape in self.free
                or value.shape[::-1] in self.free
            )
            for key, value in head.items()
        )


# How values find modules, by example. An optimiser has renamed every weight, and the file of
# the base's weights still has the names:
#
#     file    encoder.layer.0.query.weight  (768, 768)        graph   MatMul_12 reads const_7
#
# 1. Every layer of the graph is listed by the digest of its weight, turned into PyTorch's
#    layout and float32: {digest(const_7): [MatMul_12]}.
# 2. Every matrix of the file is rounded to each precision that the graph has, and its digest
#    is looked up: `query` is computed by MatMul_12.
#    A layer whose readers cut its columns is listed once more for each piece.
# 3. A layer that two modules claim (equal weights, as when both are still zero) belongs to
#    neither, and an edit of one of them is refused with the names of both. Only a tied
#    embedding can be told apart: the Gather is the embedding, and the MatMul is the head.


def find_by_value(
    model: Model, survey: Survey, weights: Mapping[str, Array], label: str
) -> ByValue:
    """Find modules by the values of their weights.

    Args:
        model: The model.
        survey: Its survey.
        weights: The base's state dict.
        label: The name of its file.

    Raises:
        CheckpointError: If no weight of the base is in the graph.
    """
    weights = {_current(key): value for key, value in weights.items()}
    by_value: dict[bytes, list[LayerCall]] = {}
    kinds: set[np.dtype[Any]] = set()
    for view in survey.index.views.values():
        for node in view.nodes:
            call = survey.call(view, node) if is_module_call(view, node) else None
            weight = find_weight(call.view, call.weight) if call else None
            if call is None or weight is None or weight.elem_type not in FLOATS:
                continue  # of integers no value is that of the file
            kinds.add(DTYPES[FLOATS[weight.elem_type]])
            for part in (call, *(replace(call, span=span) for span in column_spans(call))):
                by_value.setdefault(digest(read_matrix(model, part)), []).append(part)
    found, alike, claimed = _calls(by_value, kinds, weights)
    inner = _inner_weights(attention_digests(model, survey), weights)
    # Parameters of no layer, such as an LSTM's, are looked for when an edit asks for them.
    others = [key for key, v in weights.items() if v.ndim > 1 and not key.endswith(".weight")]
    if not claimed and not inner.found and not others:
        raise CheckpointError(
            f"none of the weights in {label} is in the graph",
            hint="give the weights of the very base that was exported, before any training "
            "or quantisation since",
        )
    norms, unclear = norms_by_value(model, survey, weights, found, kinds)
    free = frozenset(
        weight.dims
        for calls in by_value.values()
        for call in calls
        if id(call.node) not in claimed
        if (weight := find_weight(call.view, call.weight)) is not None
    )
    return ByValue(label, weights, found, norms, {**alike, **unclear}, free, inner)


def _inner_weights(
    by_value: Mapping[bytes, list[InnerWeight]], weights: Mapping[str, Array]
) -> InnerWeights:
    """Find the modules whose weights are inside operators; equal ones are not told apart."""
    matrices = {
        key.removesuffix(".weight"): array
        for key, array in weights.items()
        if key.endswith(".weight") and array.ndim == 2
    }
    found = {
        module: inner
        for module, array in matrices.items()
        for turned in (array, array.T)
        for kind in DTYPES.values()
        if (inner := by_value.get(digest(turned.astype(kind))))
    }
    twins = Counter(id(weight) for inner in found.values() for weight in inner)
    return InnerWeights({m: i for m, i in found.items() if twins[id(i[0])] == 1})


def _current(key: str) -> str:
    """Today's name for a key; old files have TensorFlow's names for LayerNorm."""
    key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)


def _calls(
    by_value: Mapping[bytes, list[LayerCall]],
    kinds: Iterable[np.dtype[Any]],
    weights: Mapping[str, Array],
) -> tuple[dict[str, list[LayerCall]], dict[str, list[str]], set[int]]:
    """Find the calls of each module, the modules alike, and all nodes with a module."""
    matrices = {
        key.rpartition(".")[0]: array
        for key, array in weights.items()
        if key.endswith(".weight") and array.ndim >= 2
    }
    found = {module: _same(by_value, kinds, array) for module, array in matrices.items()}
    twins = {
        module: [other for other in found if found[other] is calls]
        for module, calls in found.items()
        if calls
    }
    own = {module: _of_module(found[module], twins[module], module) for module in twins}
    owners = Counter((id(call.node), call.span) for calls in own.values() for call in calls)
    single = {
        module: calls
        for module, calls in own.items()
        if calls and all(owners[id(call.node), call.span] == 1 for call in calls)
    }
    alike = {
        module: [other for other in twins[module] if other != module]
        for module in own
        if module not in single
    }
    return single, alike, {id(call.node) for calls in found.values() for call in calls}


def _same(
    by_value: Mapping[bytes, list[LayerCall]], kinds: Iterable[np.dtype[Any]], array: Array
) -> list[LayerCall]:
    """Find the calls with these values in any precision; transposed only if none has them."""
    for turned in (array, array.T):
        for kind in kinds:
            if calls := by_value.get(digest(turned.astype(kind))):
                return calls
    return []


def _of_module(calls: list[LayerCall], twins: list[str], module: str) -> list[LayerCall]:
    """Choose between the calls that read one tied table: an embedding's Gather and a head.

    Empty if the names do not tell which of them the module is.
    """
    embeds = [call for call in calls if OPERATORS[call.node.op_type].embeds]
    heads = [call for call in calls if not OPERATORS[call.node.op_type].embeds]
    if not embeds or not heads:
        return calls
    if _EMBEDDING.search(module):
        return embeds
    return heads if any(_EMBEDDING.search(twin) for twin in twins) else []


_EMBEDDING = re.compile(r"(embed\w*|wte|wpe|shared)$")
