"""Find the weights of the base that a checkpoint replaces: heads, biases, norms."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_adapt.checkpoints.edits import Replacement
from onnx_adapt.checkpoints.modules.cores import Use, read_weight
from onnx_adapt.checkpoints.placing.workshop import Workshop
from onnx_adapt.dtypes import DTYPES, FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.replaceable import Opening
from onnx_adapt.model.tensors import tensor_of
from onnx_adapt.slot.manifest import OpenWeight


def open_weight(shop: Workshop, edit: Replacement) -> tuple[Opening, Array]:
    """Describe how one weight of the base becomes replaceable, and what replaces it.

    Raises:
        CheckpointError: If the graph has no such weight, or one of another shape.
    """
    path = f"{shop.names[edit.module]}.{edit.parameter}"
    uses = _uses(shop, shop.names[edit.module], edit.parameter)
    if not uses:
        raise CheckpointError(
            f"the checkpoint replaces {path!r}, which was not found in the graph",
            hint="was it folded away by an optimiser? export the base again",
        )
    first = uses[0]
    current = read_weight(shop.model, first.view, first.tensor)
    value = edit.value.T if first.transposed else edit.value
    if value.shape != current.shape:
        raise CheckpointError(
            f"the checkpoint's {path!r} has shape {list(edit.value.shape)}; the graph's is "
            f"{list(current.T.shape if first.transposed else current.shape)}",
            hint="was the base exported with another head?",
        )
    stored = first.view.constant(first.tensor)
    direct = stored is not None and stored.name == first.tensor
    elem_type = _elem_type(first)
    dtype = DTYPES[FLOATS[elem_type]]
    name = f"base.{path}"
    if direct and stored is not None:
        default = onnx.TensorProto()
        default.CopyFrom(stored)
        default.name = name
    else:
        default = tensor_of(name, current.astype(dtype))
    weight = OpenWeight(
        name=name,
        original=first.tensor,
        copied=not direct or not _is_alone(shop, uses),
        swappable=True,
        trained=False,
    )
    places = tuple((u.view.scope.path, u.index, u.position) for u in uses)
    return Opening(weight, default, places), np.ascontiguousarray(value, dtype)


def _elem_type(use: Use) -> int:
    weight = find_weight(use.view, use.tensor)
    elem_type = weight.elem_type if weight else 0
    if elem_type not in FLOATS:
        raise CheckpointError(
            f"{use.tensor!r} is quantised or no float; a trained weight cannot replace it",
            hint="insert the adapter into the model before it is quantised",
        )
    return elem_type


def _is_alone(shop: Workshop, uses: list[Use]) -> bool:
    """Whether nobody but these uses reads the tensor, and it is in the main graph."""
    tensor, known = uses[0].tensor, {(id(use.node), use.position) for use in uses}
    home = uses[0].view.home(tensor)
    if home is not shop.survey.index.main or tensor in home.outputs:
        return False
    if any(tensor == value.name for value in home.scope.graph.input):
        return False
    readers = [
        (id(node), position)
        for view in shop.survey.index.views.values()
        for node in view.nodes
        for position, name in enumerate(node.input)
        if name == tensor
    ]
    return set(readers) == known and all(use.tensor == tensor for use in uses)


def _uses(shop: Workshop, module: str, parameter: str) -> list[Use]:
    found: list[Use] = []
    for core in shop.places.cores(module, called=False):
        operator = OPERATORS[core.node.op_type]
        if core.span is not None:
            raise CheckpointError(
                f"the checkpoint replaces '{module}.{parameter}', which is packed with "
                f"others in node {core.node.name!r}",
                hint="build the model with --extra_options fuse_qkv=false",
            )
        if parameter == "weight":
            found.append(Use(core.view, core.node, operator.weight, core.stored_in_out))
        elif operator.bias is not None and operator.has_bias(core.node):
            found.append(Use(core.view, core.node, operator.bias, False))
        else:
            found += _added_bias(core.view, core.raw, core.output)
    return found or shop.places.norm_uses(module, parameter)


def _added_bias(view: GraphView, raw: str, output: str) -> list[Use]:
    return [
        Use(view, node, 1 - list(node.input).index(raw), False)
        for node in view.readers(raw)
        if node.op_type == "Add" and output in node.output
    ]
