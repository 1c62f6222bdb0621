"""Make a forward model ready to be differentiated, without changing what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx.inliner

from onnx_adapt.graph.gradients.lowering import lower
from onnx_adapt.graph.gradients.opsets import raise_opset
from onnx_adapt.graph.gradients.types import infer_further, note_axes, without_axes
from onnx_adapt.graph.index import ModelIndex, index_model
from onnx_adapt.model.file import Model


def prepare(model: Model, results: Sequence[str], weights: Sequence[str]) -> Model:
    """A model whose gradients can be written: of plain nodes, in a newer operator set.

    Its own functions are written out, an older operator set is raised, and fused nodes
    between weights and results are lowered.

    Raises:
        GradientError: If its operator set is too old, or a fused node cannot be lowered.
    """
    return lower(raise_opset(_without_functions(model)), results, weights)


def _without_functions(model: Model) -> Model:
    if not model.proto.functions:
        return model
    result = model.copy()
    inlined = onnx.inliner.inline_local_functions(result.proto)
    result.proto.CopyFrom(inlined)
    return result


def index_for_gradients(
    model: Model, loss: str, weights: Sequence[str], axes: Mapping[str, int]
) -> ModelIndex:
    """The index of a model with its loss, with all that is known of numbers of axes.

    Args:
        model: The forward model with its loss.
        loss: A tensor of the main graph.
        weights: What is differentiated for.
        axes: The numbers of axes of tensors that shape inference says nothing of.
    """
    index = index_model(model)
    if without_axes(index, [loss], weights):
        note_axes(index, axes)
        infer_further(index)
    return index
