"""From what a checkpoint asks for to slots with weights in one graph."""

from __future__ import annotations

import numpy as np

from onnx_adapt.checkpoints.edits import Bottleneck, Coupling, Edit, LowRank, Scaling
from onnx_adapt.checkpoints.modules.cores import Core, block_output, norm_behind, residual_add
from onnx_adapt.checkpoints.placing.low_rank import place_low_rank
from onnx_adapt.checkpoints.placing.workshop import Workshop
from onnx_adapt.errors import CheckpointError


def place(shop: Workshop, edit: Edit) -> None:
    """Make the slots that one edit asks for.

    Raises:
        CheckpointError: If the graph has no place for it.
    """
    if isinstance(edit, LowRank):
        for core in shop.calls(edit.module):
            place_low_rank(shop, edit, core)
    elif isinstance(edit, Scaling):
        for core in shop.calls(edit.module):
            _place_scaling(shop, edit, core)
    elif isinstance(edit, Bottleneck):
        for core in shop.calls(edit.module):
            _place_bottleneck(shop, edit, core)
    elif isinstance(edit, Coupling):
        _place_coupling(shop, edit)


def _place_scaling(shop: Workshop, edit: Scaling, core: Core) -> None:
    name = shop.names[edit.module]
    parts = {"scale": edit.vector.astype(np.float64)}
    size = core.sizes[not edit.on_input]
    if edit.vector.size != size:
        raise CheckpointError(
            f"module {edit.module!r}: {edit.vector.size} factors do not fit the {size} "
            f"{'inputs' if edit.on_input else 'outputs'} of the layer",
            hint="is it an adapter for another size of this model?",
        )
    if not edit.on_input:
        parts["scale"] = core.spread(parts["scale"], fill=1)
        shop.add(shop.survey.site(core.view, core.output), name, parts)
        return
    tensor = shop.survey.settled(core.view.scope.path, core.data)
    readers = core.view.readers(tensor)
    made = core.view.home(tensor)
    alone = len(readers) == 1 and core.span is None
    if alone and made is core.view and tensor in core.view.producers:
        shop.add(shop.survey.site(core.view, tensor), f"{name}.input", parts)
        return
    raise CheckpointError(
        f"module {edit.module!r}: its input {tensor!r} is read by "
        f"{f'{len(readers)} nodes' if core.span is None else 'other modules as well'} and "
        "cannot be scaled for one of them alone",
        hint="merge this adapter in PyTorch and export again",
    )


def _place_bottleneck(shop: Workshop, edit: Bottleneck, core: Core) -> None:
    module = shop.names[edit.module]
    view = core.view
    output = block_output(shop.survey, core, module)
    target, source, plus, norm, width = output, "", "", "", 0
    if edit.place != "output" or edit.reads != "target":
        total, residual = residual_add(view, output)
        if edit.place == "norm":
            target = norm_behind(shop.survey, view, total)
        elif edit.place == "residual":
            target = total
        if edit.reads == "residual_input":
            source, width = residual, edit.parts["down"].shape[0]
        elif edit.reads in ("sum", "normed_sum"):
            plus = residual
        if edit.reads in ("norm", "normed_sum"):
            norm = norm_behind(shop.survey, view, total)
    shop.add(
        shop.survey.site(view, shop.survey.settled(view.scope.path, target)),
        module if edit.place == "output" else f"{module}.{edit.place}",
        edit.parts,
        source=source,
        source_width=width,
        activation=edit.activation,
        plus=plus,
        norm=norm,
        norm_after=edit.norm_after,
    )


def _place_coupling(shop: Workshop, edit: Coupling) -> None:
    module = shop.names[edit.module]
    places = shop.places.output(module)
    if len(places) != 1:
        raise CheckpointError(f"the output of {module!r} was not found in the graph")
    view, tensor = places[0]
    site = shop.survey.site(view, shop.survey.settled(view.scope.path, tensor))
    shop.add(site, f"{module}.coupling", edit.parts, activation=edit.activation)
