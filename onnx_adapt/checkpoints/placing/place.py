"""Place each edit of a checkpoint in a graph, as slots with weights."""

from __future__ import annotations

from onnx_adapt.checkpoints.edits import (
    Bottleneck,
    Coupling,
    Edit,
    LowRank,
    ParameterLowRank,
    Replacement,
    Reweight,
    Scaling,
    TokenRows,
)
from onnx_adapt.checkpoints.placing.bottleneck_places import bottleneck_place
from onnx_adapt.checkpoints.placing.low_rank import place_low_rank
from onnx_adapt.checkpoints.placing.on_weights import (
    place_low_rank_on_weights,
    place_parameter,
    place_scaling_on_weights,
)
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.checkpoints.placing.replacing import as_low_rank, place_replacement
from onnx_adapt.checkpoints.placing.reweighting import place_reweight
from onnx_adapt.checkpoints.placing.scaling import place_scaling
from onnx_adapt.checkpoints.placing.stacking import (
    refuse_second_coupling,
    refuse_second_on_weight,
    refuse_unlike_stack,
)
from onnx_adapt.checkpoints.placing.token_rows import place_token_rows
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.slot.form import Form


def place(placement: Placement, edit: Edit) -> None:
    """Make the slots that one edit asks for, or replace a weight.

    Raises:
        CheckpointError: If the graph has no place for it.
    """
    if isinstance(edit, Replacement):
        edit = as_low_rank(placement, edit) or edit
    if isinstance(edit, Replacement):
        place_replacement(placement, edit)
        return
    if isinstance(edit, Reweight):
        place_reweight(placement, edit)
        return
    if isinstance(edit, ParameterLowRank):
        place_parameter(placement, edit)
        return
    if isinstance(edit, TokenRows):
        place_token_rows(placement, edit)
        return
    inner = placement.inner_weights(edit.module)
    if inner:
        refuse_second_on_weight(placement, edit.module)
    if isinstance(edit, LowRank):
        if inner:
            place_low_rank_on_weights(placement, edit, inner)
        for call in placement.calls(edit.module, needed=not inner):
            place_low_rank(placement, edit, call)
    elif isinstance(edit, Scaling):
        if inner:
            place_scaling_on_weights(placement, edit, inner)
        for call in placement.calls(edit.module, needed=not inner):
            place_scaling(placement, edit, call)
    elif isinstance(edit, Bottleneck):
        for call in placement.calls(edit.module):
            _place_bottleneck(placement, edit, call)
    elif isinstance(edit, Coupling):
        _place_coupling(placement, edit)


def _place_bottleneck(placement: Placement, edit: Bottleneck, call: LayerCall) -> None:
    module, name = placement.names[edit.module], placement.slot_name(edit.module)
    view = call.view
    placement.with_bias(edit.module, call)
    refuse_unlike_stack(placement, edit, call)
    place = bottleneck_place(placement.survey, call, module, edit.place, edit.reads)
    width = edit.parts["down"].shape[0] if place.source else 0
    target = placement.survey.after_slots(view.scope.path, place.target)
    placement.add(
        placement.survey.site(view, target),
        name if edit.place == "output" else f"{name}.{edit.place}",
        edit.parts,
        Form(
            activation=edit.activation,
            source=place.source,
            source_width=width,
            plus=place.plus,
            norm=place.norm,
            norm_after=edit.norm_after,
        ),
    )


def _place_coupling(placement: Placement, edit: Coupling) -> None:
    refuse_second_coupling(placement, edit.module)
    module = placement.names[edit.module]
    outputs = placement.finder.output(module)
    if len(outputs) != 1:
        raise CheckpointError(f"the output of {module!r} was not found in the graph")
    view, tensor = outputs[0]
    site = placement.survey.site(view, placement.survey.after_slots(view.scope.path, tensor))
    placement.add(
        site,
        f"{placement.slot_name(edit.module)}.coupling",
        edit.parts,
        Form(activation=edit.activation),
    )
