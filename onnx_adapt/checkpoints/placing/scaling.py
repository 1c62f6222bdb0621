"""Place IA3 on the layers of a graph: vectors on what they make, or on what they read.

An example. `q_proj`, `k_proj` and `v_proj` read one tensor `x`, and IA3 multiplies the input
of `v_proj` alone. Its slot makes a new tensor of `x`, which the MatMul of `v_proj` reads:

    q = MatMul(x, Wq)    k = MatMul(x, Wk)    v = MatMul(Mul(x, scale), Wv)

A tensor that one layer alone reads is scaled itself, as any site is.
"""

from __future__ import annotations

import numpy as np

from onnx_adapt.checkpoints.edits import Scaling
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.checkpoints.placing.stacking import in_front_of, refuse_second_scaling
from onnx_adapt.dtypes import FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import text
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.slot.form import InputTarget
from onnx_adapt.slot.manifest import read_manifest


def place_scaling(placement: Placement, edit: Scaling, call: LayerCall) -> None:
    """Make the slot that IA3 asks for on one call of a module.

    Raises:
        CheckpointError: If the vector does not fit, or the graph has no tensor to scale.
    """
    parts = {"scale": edit.vector.astype(np.float64)}
    size = call.sizes[not edit.on_input]
    if edit.vector.size != size:
        raise CheckpointError(
            f"module {edit.module!r}: {edit.vector.size} factors do not fit the {size} "
            f"{'inputs' if edit.on_input else 'outputs'} of the layer",
            hint="is it an adapter for another size of this model?",
        )
    if edit.on_input:
        _scale_input(placement, edit, call, parts)
        return
    parts["scale"] = call.spread(parts["scale"], fill=1)
    refuse_second_scaling(placement, edit.module, call)
    target = placement.with_bias(edit.module, call)
    front = in_front_of(placement, call)
    if call.packing is None:
        placement.add(target, placement.slot_name(edit.module), parts, front=front)
    else:
        placement.add_beside(edit.module, target, call.packing, parts, front=front)


def _scale_input(
    placement: Placement, edit: Scaling, call: LayerCall, parts: dict[str, Array]
) -> None:
    name = f"{placement.slot_name(edit.module)}.input"
    tensor = placement.survey.after_slots(call.view.scope.path, call.source)
    if call.span is not None:
        raise CheckpointError(
            f"module {edit.module!r}: node {call.label!r} computes it together with other "
            "modules, and its input cannot be scaled for one of them alone",
            hint="merge this adapter in PyTorch and export again, or export the model with "
            "separate projections",
        )
    home = call.view.home(tensor)
    made = home is call.view and tensor in call.view.producers
    if made and len(call.view.readers(tensor)) == 1 and not _changed_for(placement, tensor):
        placement.add(placement.survey.site(call.view, tensor), name, parts)
    else:
        placement.add_on_input(_input_target(placement, edit, call, tensor), name, parts)


def _changed_for(placement: Placement, tensor: str) -> str:
    """The tensor of which a slot makes what one layer reads, if this is it, or ''."""
    manifest = read_manifest(placement.model.proto)
    slots = manifest.slots if manifest else ()
    found = (slot.tensor for slot in slots if slot.on_edge and slot.output == tensor)
    return next(found, "")


def _input_target(
    placement: Placement, edit: Scaling, call: LayerCall, tensor: str
) -> InputTarget:
    """The input of a layer that other nodes read as well.

    Raises:
        CheckpointError: If these share the node that quantises it, or it is no float.
    """
    data = OPERATORS[call.node.op_type].data
    home, known = call.view.home(tensor), call.view.type_of(tensor)
    if not call.source or str(call.node.input[data]) != tensor or home is None:
        raise CheckpointError(
            f"module {edit.module!r}: its input {tensor!r} is quantised for several layers at "
            f"once, and cannot be scaled for node {call.label!r} alone",
            hint="insert the adapter into the float model, and quantise the result",
        )
    weight = find_weight(call.view, call.weight)
    channels = OPERATORS[call.node.op_type].convolves
    if known.elem_type not in FLOATS or weight is None:
        raise CheckpointError(
            f"module {edit.module!r}: its input {tensor!r} is no float tensor",
            hint="insert the adapter into the model as it was exported",
        )
    return InputTarget(
        graph=home.scope.path,
        tensor=_changed_for(placement, tensor) or tensor,
        width=edit.vector.size,
        dtype=FLOATS[known.elem_type],
        axis=1 if channels else -1,
        rank=len(weight.dims) if channels else 0,
        node=text(call.node.name),
        module=placement.names[edit.module],
        readers=(f"{call.view.scope.path}:{call.node.output[0]}",),
    )
