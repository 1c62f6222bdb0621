"""Place each edit of a checkpoint in a graph, as slots with weights."""

from __future__ import annotations

import numpy as np

from onnx_adapt.checkpoints.edits import (
    Bottleneck,
    Coupling,
    Edit,
    LowRank,
    ParameterLowRank,
    Scaling,
)
from onnx_adapt.checkpoints.placing.bottleneck_places import bottleneck_place
from onnx_adapt.checkpoints.placing.low_rank import place_low_rank
from onnx_adapt.checkpoints.placing.on_weights import (
    place_low_rank_on_weights,
    place_parameter,
    place_scaling_on_weights,
)
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.slot.form import Form


def place(placement: Placement, edit: Edit) -> None:
    """Make the slots that one edit asks for.

    Raises:
        CheckpointError: If the graph has no place for it.
    """
    if isinstance(edit, ParameterLowRank):
        place_parameter(placement, edit)
        return
    inner = placement.inner_weights(edit.module)
    if isinstance(edit, LowRank):
        if inner:
            place_low_rank_on_weights(placement, edit, inner)
        for call in placement.calls(edit.module, needed=not inner):
            place_low_rank(placement, edit, call)
    elif isinstance(edit, Scaling):
        if inner:
            place_scaling_on_weights(placement, edit, inner)
        for call in placement.calls(edit.module, needed=not inner):
            _place_scaling(placement, edit, call)
    elif isinstance(edit, Bottleneck):
        for call in placement.calls(edit.module):
            _place_bottleneck(placement, edit, call)
    elif isinstance(edit, Coupling):
        _place_coupling(placement, edit)


def _place_scaling(placement: Placement, edit: Scaling, call: LayerCall) -> None:
    name = placement.slot_name(edit.module)
    parts = {"scale": edit.vector.astype(np.float64)}
    size = call.sizes[not edit.on_input]
    if edit.vector.size != size:
        raise CheckpointError(
            f"module {edit.module!r}: {edit.vector.size} factors do not fit the {size} "
            f"{'inputs' if edit.on_input else 'outputs'} of the layer",
            hint="is it an adapter for another size of this model?",
        )
    if not edit.on_input:
        parts["scale"] = call.spread(parts["scale"], fill=1)
        target = placement.with_bias(edit.module, call)
        if call.packing is None:
            placement.add(target, name, parts)
        else:
            placement.add_beside(edit.module, target, call.packing, parts)
        return
    tensor = placement.survey.after_slots(call.view.scope.path, call.source)
    readers = call.view.readers(tensor)
    made = call.view.home(tensor)
    alone = len(readers) == 1 and call.span is None
    if alone and made is call.view and tensor in call.view.producers:
        placement.add(placement.survey.site(call.view, tensor), f"{name}.input", parts)
        return
    raise CheckpointError(
        f"module {edit.module!r}: its input {tensor!r} is read by "
        f"{f'{len(readers)} nodes' if call.span is None else 'other modules as well'} and "
        "cannot be scaled for one of them alone",
        hint="merge this adapter in PyTorch and export again",
    )


def _place_bottleneck(placement: Placement, edit: Bottleneck, call: LayerCall) -> None:
    module, name = placement.names[edit.module], placement.slot_name(edit.module)
    view = call.view
    placement.with_bias(edit.module, call)
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
