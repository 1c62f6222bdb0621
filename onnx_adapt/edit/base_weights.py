"""Replaceable weights: weights of the base that an adapter may bring its own values for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import onnx
from onnx import helper

from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.edit.weights import drop_named
from onnx_adapt.errors import AdapterError
from onnx_adapt.graph.replaceable import ReplacementPlan
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor, tensor_of
from onnx_adapt.slot.base_changes import ReplaceableWeight
from onnx_adapt.slot.manifest import write_manifest
from onnx_adapt.slot.required import default_tensors


def base_values(model: Model) -> dict[str, Array]:
    """The base's own values of the weights that adapters may replace, by name.

    Raises:
        AdapterError: If the model holds trained values instead.
        SlotError: If it has no slots.
    """
    manifest = required_manifest(model)
    if trained := [weight.name for weight in manifest.weights if weight.trained]:
        raise AdapterError(
            f"{trained[0]!r} of {model.label} has a trained value, not the base's",
            hint="give the model from before it was filled",
        )
    found = default_tensors(model.proto, manifest.weights)
    return {name: read_tensor(model, tensor) for name, tensor in found.items()}


def make_replaceable(proto: onnx.ModelProto, plans: Iterable[ReplacementPlan]) -> None:
    """Make weights of the base replaceable, in place: each becomes an input as well."""
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    graphs = {scope.path: scope.graph for scope in walk.scopes(proto.graph)}
    for plan in plans:
        weight = plan.weight
        if weight.copied:
            proto.graph.initializer.append(plan.default)
        else:
            stored[weight.original].name = weight.name
        if weight.swappable:
            declared = helper.make_tensor_value_info(
                weight.name, plan.default.data_type, list(plan.default.dims)
            )
            proto.graph.input.append(declared)
        for graph, node, position in plan.readers:
            graphs[graph].node[node].input[position] = weight.name


def undo_replaceable(proto: onnx.ModelProto, weights: Iterable[ReplaceableWeight]) -> None:
    """Undo `make_replaceable`, in place."""
    weights = tuple(weights)
    originals = {weight.name: weight.original for weight in weights}
    drop_named(proto.graph.input, set(originals))
    drop_named(proto.graph.initializer, {w.name for w in weights if w.copied})
    for tensor in proto.graph.initializer:
        if tensor.name in originals:  # setting a name would make an absent one present
            tensor.name = originals[tensor.name]
    for scope in walk.scopes(proto.graph) if weights else ():
        for node in scope.graph.node:
            for position, name in enumerate(node.input):
                if name in originals:
                    node.input[position] = originals[name]


def fill_base_weights(model: Model, values: Mapping[str, Array]) -> Model:
    """Give replaceable weights new default values.

    The base's own values stay in the model, so that `remove` can restore them.

    Args:
        model: A model with slots.
        values: Values by name; `require_fit` has checked that they fit.
    """
    model = with_defaults(model)
    manifest = required_manifest(model)
    known = {weight.name: weight for weight in manifest.weights}
    result = model.copy()
    stored = {tensor.name: tensor for tensor in result.proto.graph.initializer}
    for name, value in values.items():
        if known[name].copied:
            stored[name].CopyFrom(tensor_of(name, value))
            known[name] = replace(known[name], trained=True)
            continue
        stored[name].name = known[name].original
        result.proto.graph.initializer.append(tensor_of(name, value))
        known[name] = replace(known[name], copied=True, trained=True)
    write_manifest(result.proto, replace(manifest, weights=tuple(known.values())))
    return result
