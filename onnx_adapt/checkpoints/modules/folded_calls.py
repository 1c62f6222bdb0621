"""Calls of a module that constant folding has computed and taken out of the graph.

An example. DeBERTa calls `query_proj` on the tokens, and a second time on its table of
relative positions, which no input changes:

    a = MatMul(tokens, W)    b = MatMul(table, W)    scores = MatMul(keys, Transpose(b))

An optimiser leaves `scores = MatMul(keys, Transpose(constant))`. An adapter on the first call
alone is not the trained one. What gives the second away is the name of the constant:
`/encoder/layer.0/attention/self/Expand_output_0` is no parameter of the model, but a tensor
that the module around `query_proj` had computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import onnx

from onnx_adapt.checkpoints.modules.by_name import ByName
from onnx_adapt.checkpoints.modules.by_value import ByValue
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import GraphView, text
from onnx_adapt.graph.modules import module_of_tensor
from onnx_adapt.graph.sites import Survey

_MOVING = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile"}
_PRODUCTS = ("MatMul", "FusedMatMul")
_MOST = 16


def refuse_folded(survey: Survey, finder: ByName | ByValue, module: str) -> None:
    """Refuse a module if one of its calls may have been folded into a constant.

    Args:
        survey: The sites of the model.
        finder: Finds modules of the model.
        module: The path of a module that a checkpoint adapts.

    Raises:
        CheckpointError: If a product of the module around it reads such a constant, and the
            constant has the module's width.
    """
    around = module.rpartition(".")[0]
    for node, constant in _folded(survey, around):
        widths = {call.sizes[1] for call in finder.calls(module)}
        if any(width and prod(constant.dims) % width == 0 for width in widths):
            label = text(node.name) or text(node.output[0])
            raise CheckpointError(
                f"a call of module {module!r} may be missing in the graph: node {label!r} "
                f"({node.op_type}) reads {constant.name!r}, which {around!r} computes in "
                "PyTorch and an optimiser made a constant",
                hint="insert into the model as it was exported, without constant folding",
            )


def _folded(survey: Survey, around: str) -> Iterator[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """The products inside a module with constants that the module itself computed."""
    for path, inside in survey.modules.members.get(around, {}).items():
        view = survey.index.views[path]
        for node in (view.nodes[i] for i in inside):
            if node.op_type not in _PRODUCTS:
                continue
            for name in node.input:
                constant = _constant_behind(view, str(name))
                if constant is not None and module_of_tensor(constant.name) == around:
                    yield node, constant


def _constant_behind(view: GraphView, tensor: str) -> onnx.TensorProto | None:
    """The matrix that a tensor is, behind nodes that only move or repeat its numbers."""
    for _ in range(_MOST):
        found = view.constant(tensor)
        if found is not None:
            return found if len(found.dims) > 1 else None
        made = view.producer(tensor)
        if made is None or made[1].op_type not in _MOVING or not made[1].input:
            return None
        view, tensor = made[0], str(made[1].input[0])
    return None
