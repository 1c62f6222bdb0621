"""Place the edits that compute a weight from the base's own.

An example. OFT multiplies the weight of `query`, `(64, 64)`, by a rotation. That changes it by
a matrix of full rank, so the trained weight replaces the base's, and an adapter has 64 * 64
numbers for it. HRA with 8 reflections changes it by a matrix of rank 8:

    W' - W = B A      with B (64, 8) and A (8, 64)

That is LoRA, a slot of 2 * 8 * 64 numbers. Where the graph has a quantised weight, or one that
several modules have columns of, it cannot be replaced. Then the change becomes a slot as well,
of whatever rank: B is W' - W and A the identity, or the other way round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from onnx_adapt.checkpoints.edits import LowRank, Replacement, Reweight
from onnx_adapt.checkpoints.modules.calls import ParameterInput
from onnx_adapt.checkpoints.modules.inner_weights import InnerWeight
from onnx_adapt.checkpoints.modules.weights import read_bias, read_matrix, read_weight
from onnx_adapt.checkpoints.placing.changes import (
    Change,
    as_bias_slot,
    as_low_rank_slot,
    as_whole_slot,
    change_of,
)
from onnx_adapt.checkpoints.placing.low_rank import place_low_rank
from onnx_adapt.checkpoints.placing.on_weights import place_low_rank_on_weights
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.checkpoints.placing.replacing import place_replacement
from onnx_adapt.dtypes import FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.fused_bias import bias_behind
from onnx_adapt.graph.index import attribute
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import bias_add, find_weight, weight_width
from onnx_adapt.graph.operators import OPERATORS

_log = logging.getLogger(__name__)


def place_reweight(placement: Placement, edit: Reweight) -> None:
    """Replace a weight by what is computed from it, or make a slot of the difference.

    Raises:
        CheckpointError: If the trained weight does not fit the layer, or the graph has no
            place for it.
    """
    inner = placement.inner_weights(edit.module)
    path = placement.names[edit.module]
    if not inner and not placement.finder.calls(path, called=False):
        norms = placement.finder.norm_inputs(path, "weight")
        if norms:
            _place_norm(placement, edit, norms[0])
            return
    for tensor in dict.fromkeys(weight.tensor for weight in inner):
        _place_inside(placement, edit, [w for w in inner if w.tensor == tensor])
    calls = placement.calls(edit.module, needed=not inner)
    changes = list(_changes(placement, edit, calls))
    slots = [_small_slot(edit, *pair) for pair in zip(calls, changes, strict=True)]
    same = all(change.is_same(changes[0]) for change in changes)
    if None in slots and same and all(map(_is_replaceable, calls)):
        _replace(placement, edit, calls, changes[0])
        return
    for call, slot, change in zip(calls, slots, changes, strict=True):
        place_low_rank(placement, slot or _whole_slot(edit, call, change), call)


def _place_norm(placement: Placement, edit: Reweight, scale: ParameterInput) -> None:
    """Replace the weight and the bias of a normalisation by what is computed from them."""
    shifts = placement.finder.norm_inputs(placement.names[edit.module], "bias")
    weight, *bias = (
        read_weight(placement.model, place.view, place.tensor).reshape(-1)
        for place in (scale, *shifts[:1])
    )
    change = change_of(edit, weight, bias[0] if bias else None)
    if change.added.any():
        place_replacement(placement, Replacement(edit.module, "weight", change.weight))
    if change.bias is not None:
        place_replacement(placement, Replacement(edit.module, "bias", change.bias))


def _changes(
    placement: Placement, edit: Reweight, calls: Sequence[LayerCall]
) -> Iterator[Change]:
    """What each call is trained to be; computed once where they read one weight."""
    known: dict[object, Change] = {}
    for call in calls:
        bias = _bias_of(placement, call)
        given = None if bias is None else bias.tobytes()
        key = call.view.scope.path, call.weight, call.span, given
        if key not in known:
            known[key] = change_of(edit, read_matrix(placement.model, call), bias)
        yield known[key]


def _bias_of(placement: Placement, call: LayerCall) -> Array | None:
    """Read the bias of a call, `(out,)`, wherever it is added; None if it has none."""
    model, view = placement.model, call.view
    width = weight_width(view, call.node)
    bias = read_bias(model, call)
    if bias is None:
        shown = placement.survey.after_slots(view.scope.path, call.raw)
        added = bias_add(view, call.node, shown, width)
        made = view.producer(added) if added else None
        behind = bias_behind(placement.survey.index, view, call.output, width)
        if made is not None:
            name = next(n for n in made[1].input if find_weight(view, n) is not None)
            bias = read_weight(model, view, name)
        elif behind is not None:
            bias = read_weight(model, view, behind.bias)
    if bias is None:
        return None
    return bias.reshape(-1) if call.span is None else bias.reshape(-1)[slice(*call.span)]


def _small_slot(edit: Reweight, call: LayerCall, change: Change) -> LowRank | None:
    """A change as a slot that is smaller than the weight; None if it is none."""
    if _why_no_slot(call):
        return None
    return as_low_rank_slot(edit, change, embeds=OPERATORS[call.node.op_type].embeds)


def _whole_slot(edit: Reweight, call: LayerCall, change: Change) -> LowRank:
    """A change as a slot of whatever rank.

    Raises:
        CheckpointError: If no slot does it.
    """
    if why := _why_no_slot(call):
        raise CheckpointError(
            f"module {edit.module!r}: the weight of node {call.label!r} cannot be replaced "
            f"as it is stored, nor can a slot change it: {why}",
            hint="insert the adapter into the float model as it was exported",
        )
    slot = as_whole_slot(edit, change, embeds=OPERATORS[call.node.op_type].embeds)
    _log.warning(
        "%r: its weight in the graph is %s, so the trained one is a slot of rank %d",
        edit.module,
        "not its own" if call.span is None else "packed with others",
        len(slot.a),
    )
    return slot


def _why_no_slot(call: LayerCall) -> str:
    """Why a slot cannot do what a changed weight does, or ''."""
    if call.activation:
        return f"the activation {call.activation} is in the same node"
    if not OPERATORS[call.node.op_type].convolves:
        return ""
    if attribute(call.node, "group", 1) != 1:
        return "it is a convolution in groups"
    steps = next((list(a.ints) for a in call.node.attribute if a.name == "dilations"), [])
    return "it is a dilated convolution" if any(step != 1 for step in steps) else ""


def _is_replaceable(call: LayerCall) -> bool:
    """Whether a call reads a weight of floats that is stored as PyTorch has it."""
    weight = find_weight(call.view, call.weight)
    if weight is None or weight.elem_type not in FLOATS or call.span is not None:
        return False
    if call.node.op_type == "Gemm":  # read_matrix has multiplied the weight by it
        return all(item.f == 1 for item in call.node.attribute if item.name == "alpha")
    return len(weight.dims) == 2 or OPERATORS[call.node.op_type].convolves


def _replace(
    placement: Placement, edit: Reweight, calls: Sequence[LayerCall], change: Change
) -> None:
    """Replace a weight, and the bias if that changes; a new bias becomes a slot."""
    place_replacement(placement, Replacement(edit.module, "weight", change.weight))
    if change.bias is not None and change.has_bias:
        place_replacement(placement, Replacement(edit.module, "bias", change.bias))
    elif change.bias is not None:
        for call in calls:
            embeds = OPERATORS[call.node.op_type].embeds
            place_low_rank(placement, as_bias_slot(edit, change, embeds=embeds), call)


def _place_inside(placement: Placement, edit: Reweight, inner: Sequence[InnerWeight]) -> None:
    """Make the slot on a weight inside an operator, where nothing else can be changed."""
    first = inner[0]
    whole = read_weight(placement.model, first.view, first.tensor)
    own = whole if first.span is None else whole[:, slice(*first.span)]
    change = change_of(edit, own.T, _inner_bias(placement, first))
    slot = as_low_rank_slot(edit, change, embeds=False)
    slot = slot or as_whole_slot(edit, change, embeds=False)
    place_low_rank_on_weights(placement, slot, inner)


def _inner_bias(placement: Placement, inner: InnerWeight) -> Array | None:
    """Read the bias of a module inside an operator; None if it has none."""
    names = [] if inner.bias is None else inner.node.input[inner.bias : inner.bias + 1]
    if not any(names):
        return None
    bias = read_weight(placement.model, inner.view, names[0])
    return bias if inner.span is None else bias[slice(*inner.span)]
