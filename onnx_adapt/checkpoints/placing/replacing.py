"""Plan the replacement of weights of the base: heads, biases, norms."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import onnx

from onnx_adapt.checkpoints.edits import Edit, LowRank, Replacement
from onnx_adapt.checkpoints.modules.calls import ParameterInput
from onnx_adapt.checkpoints.modules.weights import read_matrix, read_weight
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.checkpoints.placing.vocabulary import refuse_other_vocabulary
from onnx_adapt.dtypes import DTYPES, FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.fused_bias import bias_behind
from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.replaceable import ReplacementPlan
from onnx_adapt.model.tensors import tensor_of
from onnx_adapt.slot.base_changes import ReplaceableWeight
from onnx_adapt.slot.manifest import read_manifest

_log = logging.getLogger(__name__)


def place_replacement(placement: Placement, edit: Replacement) -> None:
    """Replace one weight of the base, once; a head's bias can have two names in a checkpoint.

    Raises:
        CheckpointError: If the graph has no such weight, one of another shape, or another
            adapter replaces it already.
    """
    plan, value = _planned(placement, edit)
    manifest = read_manifest(placement.model.proto)
    if manifest and plan.weight.original in {weight.name for weight in manifest.weights}:
        raise CheckpointError(
            f"{plan.weight.original!r} of the model is replaced by an adapter already",
            hint="`onnx-adapt convert` gives another adapter for the same slots; else insert "
            "into the base model",
        )
    plans, replaced = placement.plans, placement.replaced
    twin = next((other for other in plans if {*other.readers} & {*plan.readers}), None)
    if twin is None:
        plans.append(plan)
        replaced[plan.weight.name] = value
    elif not np.array_equal(value, replaced[twin.weight.name]):
        raise CheckpointError(
            f"{plan.weight.name!r} and {twin.weight.name!r} are one weight of the graph, "
            "and the checkpoint has two values for it"
        )


def _planned(placement: Placement, edit: Replacement) -> tuple[ReplacementPlan, Array]:
    """Describe how one weight of the base becomes replaceable, and what replaces it."""
    path = f"{placement.names[edit.module]}.{edit.parameter}"
    inputs = _inputs(placement, placement.names[edit.module], edit.parameter)
    if not inputs:
        raise CheckpointError(
            f"the checkpoint replaces {path!r}, which was not found in the graph",
            hint="was it folded away by an optimiser? export the base again",
        )
    first = inputs[0]
    current = read_weight(placement.model, first.view, first.tensor)
    value = _laid_out(edit, path, first, current)
    stored = first.view.constant(first.tensor)
    direct = stored is not None and stored.name == first.tensor
    name = f"base.{placement.slot_name(edit.module)}.{edit.parameter}"
    if direct and stored is not None:
        default = onnx.TensorProto()
        default.CopyFrom(stored)
        default.name = name
    else:
        default = tensor_of(name, current.astype(value.dtype))
    weight = ReplaceableWeight(
        name=name,
        original=first.tensor,
        copied=not direct or not _is_alone(placement, inputs),
        swappable=True,
        trained=False,
    )
    readers = tuple((i.view.scope.path, i.index, i.position) for i in inputs)
    return ReplacementPlan(weight, default, readers), value


def _laid_out(edit: Replacement, path: str, place: ParameterInput, current: Array) -> Array:
    """A trained weight as the graph has the base's, in its element type.

    Raises:
        CheckpointError: If it is of another shape, or holds NaN or infinity.
    """
    value = edit.value.T if place.transposed else edit.value
    is_vector = value.size == current.size == max(current.shape, default=1)
    if is_vector:
        value = value.reshape(current.shape)  # with axes of 1 for the places of a picture
    if value.shape != current.shape:
        _refuse_shape(edit, path, current.T if place.transposed else current)
    dtype = FLOATS[_elem_type(place)]
    with np.errstate(over="ignore"):
        value = np.ascontiguousarray(value, DTYPES[dtype])
    if not np.isfinite(value.astype(np.float64)).all():
        raise CheckpointError(
            f"the checkpoint's {path!r} holds NaN or infinity in {dtype}",
            hint="the training diverged, or a setting of the checkpoint is out of range",
        )
    return value


def without_copies(placement: Placement, edits: Sequence[Edit]) -> list[Edit]:
    """Leave out the base's own weights that a checkpoint has copies of, with a warning.

    A state dict that was saved whole has `q_proj.base_layer.weight` beside `q_proj.lora_A`.
    """
    copies = [e for e in edits if isinstance(e, Replacement) and _is_copy(placement, e)]
    if copies:
        _log.warning(
            "left out base_layer.weight of %s: the base has the same weights",
            ", ".join(edit.module for edit in copies),
        )
    return [edit for edit in edits if not any(edit is copy for copy in copies)]


def _is_copy(placement: Placement, edit: Replacement) -> bool:
    """Whether a weight that the checkpoint calls the base's own is what the graph has.

    Equal is what bfloat16 rounds to the same number; the base may be stored in it.
    """
    if not edit.of_base or edit.parameter != "weight":
        return False
    for call in placement.finder.calls(placement.names[edit.module], called=False):
        base = read_matrix(placement.model, call)
        value = edit.value.T if OPERATORS[call.node.op_type].embeds else edit.value
        if base.shape != value.shape:
            return False
        return bool((np.abs(value - base) <= _BFLOAT16 * np.abs(base)).all())
    return False


_BFLOAT16 = 2.0**-8
"""How far apart, as a part of itself, a number is from its bfloat16."""


def _refuse_shape(edit: Replacement, path: str, current: Array) -> NoReturn:
    """Refuse a trained weight of another shape than the graph's."""
    if edit.value.shape[1:] == current.shape[1:]:
        refuse_other_vocabulary(edit.module, len(edit.value), len(current))
    raise CheckpointError(
        f"the checkpoint's {path!r} has shape {list(edit.value.shape)}; the graph's is "
        f"{list(current.shape)}",
        hint="was the base exported with another head?",
    )


def as_low_rank(placement: Placement, edit: Replacement) -> LowRank | None:
    """A trained weight as what it adds to the base's, where that cannot be replaced.

    That is so where the base's is quantised, or packed with those of other modules: for
    example a classifier of 3 classes becomes LoRA of rank 3 with A = trained - base.

    Returns:
        The edit; None if the weight can be replaced, or is of another shape.
    """
    if edit.parameter != "weight" or edit.value.ndim != 2:
        return None
    module = placement.names[edit.module]
    for call in placement.finder.calls(module, called=False):
        weight = find_weight(call.view, call.weight)
        if weight is not None and weight.elem_type in FLOATS and call.span is None:
            return None
        base = read_matrix(placement.model, call)
        if base.shape != edit.value.shape:
            return None
        added = edit.value.astype(np.float64) - base
        if OPERATORS[call.node.op_type].embeds:
            added = added.T
        makes, reads = added.shape
        a, b = (added, np.eye(makes)) if makes <= reads else (np.eye(reads), added)
        _log.warning(
            "%r: its weight in the graph is %s, so the trained one is a slot of rank %d",
            *(module, "quantised" if call.span is None else "packed with others", len(a)),
        )
        return LowRank(edit.module, a, b, 1.0)
    return None


def _elem_type(item: ParameterInput) -> int:
    weight = find_weight(item.view, item.tensor)
    elem_type = weight.elem_type if weight else 0
    if elem_type not in FLOATS:
        raise CheckpointError(
            f"{item.tensor!r} is quantised or no float; a trained weight cannot replace it",
            hint="insert the adapter into the model before it is quantised",
        )
    return elem_type


def _is_alone(placement: Placement, inputs: list[ParameterInput]) -> bool:
    """Whether only these inputs read the tensor, and it is stored in the main graph."""
    tensor, known = inputs[0].tensor, {(id(item.node), item.position) for item in inputs}
    home = inputs[0].view.home(tensor)
    if home is not placement.survey.index.main or tensor in home.outputs:
        return False
    if any(tensor == value.name for value in home.scope.graph.input):
        return False
    readers = [
        (id(node), position)
        for view in placement.survey.index.views.values()
        for node in view.nodes
        for position, name in enumerate(node.input)
        if name == tensor
    ]
    return set(readers) == known and all(item.tensor == tensor for item in inputs)


def _inputs(placement: Placement, module: str, parameter: str) -> list[ParameterInput]:
    found: list[ParameterInput] = []
    for call in placement.finder.calls(module, called=False):
        operator = OPERATORS[call.node.op_type]
        if call.span is not None:
            raise CheckpointError(
                f"the checkpoint replaces '{module}.{parameter}', which is packed with "
                f"others in node {call.node.name!r}",
                hint="build the model with --extra_options fuse_qkv=false",
            )
        if parameter == "weight":
            found.append(
                ParameterInput(call.view, call.node, operator.weight, call.stored_in_out)
            )
        elif operator.bias is not None and operator.has_bias(call.node):
            found.append(ParameterInput(call.view, call.node, operator.bias, False))
        else:
            found += _added_bias(call.view, call.raw, call.output)
            found += _fused_bias(placement, call)
    return found or placement.finder.norm_inputs(module, parameter)


def _fused_bias(placement: Placement, call: LayerCall) -> list[ParameterInput]:
    """Where a call's bias is added by a node behind it, if it is the node's only bias."""
    behind = bias_behind(placement.survey.index, call.view, call.output, call.sizes[1])
    weight = find_weight(call.view, behind.bias) if behind else None
    if behind is None or weight is None or weight.dims != (call.sizes[1],):
        return []
    return [ParameterInput(call.view, behind.node, behind.position, False)]


def _added_bias(view: GraphView, raw: str, output: str) -> list[ParameterInput]:
    return [
        ParameterInput(view, node, 1 - list(node.input).index(raw), False)
        for node in view.readers(raw)
        if node.op_type == "Add" and output in node.output
    ]
