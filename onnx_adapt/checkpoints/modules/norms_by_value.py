"""Find the normalisations of a graph that lost its names, by values and neighbours."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from onnx_adapt.checkpoints.modules.weights import read_weight
from onnx_adapt.dtypes import DTYPES, FLOATS, Array
from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight, is_module_call
from onnx_adapt.graph.liveness import VALUE_FREE
from onnx_adapt.graph.norms import BaseNorm, find_norms
from onnx_adapt.graph.sites import Survey
from onnx_adapt.model.file import Model


def digest(value: Array) -> bytes:
    """A hash of a weight's shape and its values in float32."""
    plain = np.ascontiguousarray(value, np.float32)
    return hashlib.sha256(repr(plain.shape).encode() + plain.tobytes()).digest()


# How normalisations are found, by example. Those of a trained model have values of their own
# and are found like layers, by a digest. But a normalisation that was never trained is all
# ones, and so are its neighbours:
#
#     file    layer.0.norm.weight = ones    layer.1.norm.weight = ones
#     graph   Norm_3 -> MatMul_5 (layer.0.dense)    Norm_8 -> MatMul_9 (layer.1.dense)
#
# By value both modules fit both nodes. So `_Neighbours` walks from each node, backwards and
# forwards, until it meets a layer or another normalisation. Norm_3 meets MatMul_5, which is
# known to be `layer.0.dense`. That has the same parent as `layer.0.norm`, so Norm_3 is
# `layer.0.norm`. If several nodes or none are left, the module is reported as alike.


def norms_by_value(
    model: Model,
    survey: Survey,
    weights: Mapping[str, Array],
    calls: Mapping[str, list[LayerCall]],
    kinds: Iterable[np.dtype[Any]],
) -> tuple[dict[str, list[BaseNorm]], frozenset[str], dict[str, list[str]]]:
    """Find the calls of each normalisation, those of 1 + weight, and the modules alike.

    Modules with equal values are told apart by the layers beside them.
    """
    there = [n for view in survey.index.views.values() for n in find_norms(model, view)]
    values = {id(norm): _value(model, norm) for norm in there}
    stored = (find_weight(norm.view, norm.weight_tensor) for norm in there)
    kinds = {
        *kinds,
        *(DTYPES[FLOATS[w.elem_type]] for w in stored if w and w.elem_type in FLOATS),
    }
    wanted = {
        module: _variants(weights, module, kinds) | _variants(weights, module, kinds, added=1)
        for key, array in weights.items()
        for module in (key.removesuffix(".weight"),)
        if key.endswith(".weight") and array.ndim == 1
    }
    fitting = {
        module: [norm for norm in there if values[id(norm)] in variants]
        for module, variants in wanted.items()
    }
    near = _Neighbours(there, calls)
    found: dict[str, list[BaseNorm]] = {}
    alike: dict[str, list[str]] = {}
    for module, norms in fitting.items():
        twins = [other for other in fitting if wanted[other] & wanted[module]]
        alone = len(twins) == 1 and (len(norms) < 2 or not _is_fresh(weights, module))
        chosen = norms if alone else near.of(module, norms)
        if norms and not alone and len(chosen) != 1:
            alike[module] = [other for other in twins if other != module]
        elif norms:
            found[module] = chosen
    owners = Counter(id(norm) for norms in found.values() for norm in norms)
    shared = [m for m in found if any(owners[id(norm)] > 1 for norm in found[m])]
    alike |= {module: [other for other in shared if other != module] for module in shared}
    known = {module: found[module] for module in found if module not in alike}
    sums = frozenset(
        module
        for module, norms in known.items()
        if values[id(norms[0])] in _variants(weights, module, kinds, added=1)
        and values[id(norms[0])] not in _variants(weights, module, kinds)
    )
    return known, sums, alike


def _is_fresh(weights: Mapping[str, Array], module: str) -> bool:
    """Whether a normalisation was never trained, so that others may have the same values."""
    return bool(np.ptp(weights[f"{module}.weight"]) == 0)


def _value(model: Model, norm: BaseNorm) -> tuple[bytes, bytes]:
    weight = read_weight(model, norm.view, norm.weight_tensor)
    bias = read_weight(model, norm.view, norm.bias_tensor) if norm.bias else np.zeros(0)
    return digest(weight), digest(bias)


def _variants(
    weights: Mapping[str, Array],
    module: str,
    kinds: Iterable[np.dtype[Any]],
    added: float = 0.0,
) -> set[tuple[bytes, bytes]]:
    """A normalisation's weight and bias in any precision of the graph.

    Gemma adds its 1 in float32, whatever the precision of the weight.
    """
    weight, bias = weights[f"{module}.weight"], weights.get(f"{module}.bias", np.zeros(0))
    if added:
        weight = weight.astype(np.float32) + np.float32(added)
    return {(digest(weight.astype(kind)), digest(bias.astype(kind))) for kind in kinds}


class _Neighbours:
    """The layers beside a normalisation: those that it reads, and those that read it.

    Args:
        norms: All of the graph.
        calls: The calls of each module.
    """

    def __init__(self, norms: list[BaseNorm], calls: Mapping[str, list[LayerCall]]) -> None:
        self._calls = calls
        self._made = {norm.output for norm in norms}
        self._read = {norm.read for norm in norms}

    def of(self, module: str, norms: list[BaseNorm]) -> list[BaseNorm]:
        """The normalisations that are beside a layer with the same parent as the module."""
        parent = module.rpartition(".")[0] + "."
        siblings = {
            id(call.node)
            for name, calls in self._calls.items()
            if name.startswith(parent)
            for call in calls
        }
        return [norm for norm in norms if siblings.intersection(self._beside(norm))]

    def _beside(self, norm: BaseNorm) -> Iterator[int]:
        """Yield the nodes that can be reached without passing a layer or a normalisation."""
        view = norm.view
        waiting, seen = [norm.read], {norm.read}
        while waiting:
            tensor = waiting.pop()
            made = view.producer(tensor)
            if made is None or made[0] is not view:
                continue
            yield id(made[1])
            if not self._is_layer(made[1], view) and made[1].op_type not in VALUE_FREE:
                new = {str(name) for name in made[1].input} - seen - self._made
                seen |= new
                waiting += new
        waiting, seen = [norm.output], {norm.output}
        while waiting:
            for node in view.readers(waiting.pop()):
                yield id(node)
                if not self._is_layer(node, view) and node.op_type not in VALUE_FREE:
                    new = {str(name) for name in node.output} - seen - self._read
                    seen |= new
                    waiting += new

    def _is_layer(self, node: onnx.NodeProto, view: GraphView) -> bool:
        return is_module_call(view, node)
