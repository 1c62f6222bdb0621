"""Make the weights of normalisations replaceable, so that adapters can bring their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import onnx

from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import FLOATS
from onnx_adapt.edit.base_weights import make_replaceable
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.errors import SlotError
from onnx_adapt.graph.index import GraphView, index_model
from onnx_adapt.graph.norms import find_norms
from onnx_adapt.graph.replaceable import ReplacementPlan
from onnx_adapt.model.file import Model
from onnx_adapt.slot.base_changes import ReplaceableWeight
from onnx_adapt.slot.manifest import write_manifest

_log = logging.getLogger(__name__)


def replaceable_norms(model: Model) -> Model:
    """Make the weights and biases of all LayerNorms and RMSNorms replaceable.

    Only those of the main graph are; nothing else may read them.

    Args:
        model: A model with slots; it is left as it was.

    Raises:
        SlotError: If it has no slots, or no such weights.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("tests/cases/bases/bert_headless/base.onnx")
        >>> model = oa.insert(base, after="encoder.layer.1.output.dense")
        >>> model = replaceable_norms(model)
        >>> model.proto.graph.input[-1].name
        'base.encoder.layer.1.output.LayerNorm.bias'
    """
    manifest = required_manifest(model)
    model = with_defaults(model)
    index = index_model(model)
    known = {weight.name for weight in manifest.weights}
    plans = {
        plan.weight.name: plan
        for norm in find_norms(model, index.main)
        for node, position in (norm.weight, *filter(None, (norm.bias,)))
        for plan in _plans(index.main, str(node.input[position]), known)
    }
    if not plans:
        raise SlotError(
            f"no LayerNorm or RMSNorm of {model.label} has weights that can be replaced",
            hint="train slots only",
        )
    result = model.copy()
    make_replaceable(result.proto, plans.values())
    weights = (*manifest.weights, *(plan.weight for plan in plans.values()))
    write_manifest(result.proto, replace(manifest, weights=weights))
    return result


def _plans(view: GraphView, tensor: str, known: set[str]) -> Iterator[ReplacementPlan]:
    """The plan for one weight; none if it cannot be replaced, or is already."""
    stored = view.constants.get(tensor)
    if tensor in known or stored is None or stored.data_type not in FLOATS:
        return
    kept = {item.name for item in view.scope.graph.initializer}
    declared = {value.name for value in view.scope.graph.input}
    if tensor not in kept or tensor in declared | view.outputs:
        _log.warning("left out %s: it is no stored weight of its own", tensor)
        return
    default = onnx.TensorProto()
    default.CopyFrom(stored)
    default.name = f"base.{tensor}"
    readers = tuple(
        (view.scope.path, place, position)
        for place in sorted({*view.consumers.get(tensor, ())})
        for position, name in enumerate(view.nodes[place].input)
        if name == tensor
    )
    weight = ReplaceableWeight(
        default.name, original=tensor, copied=False, swappable=True, trained=False
    )
    yield ReplacementPlan(weight, default, readers)
