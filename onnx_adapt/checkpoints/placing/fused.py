"""Which fused nodes hold a tensor that the edits of a checkpoint need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from onnx_adapt.checkpoints.edits import Bottleneck, Edit, LowRank, Scaling
from onnx_adapt.checkpoints.modules.calls import moved_output
from onnx_adapt.checkpoints.placing.placement import ModuleFinder
from onnx_adapt.graph.fused_bias import bias_behind
from onnx_adapt.graph.fused_draft import FusedPlace
from onnx_adapt.graph.fused_layers import inside_layer
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.sites import Survey
from onnx_adapt.graph.unfusing import can_write_out, is_known

_SUMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def fused_nodes(
    survey: Survey, finder: ModuleFinder, names: Mapping[str, str], edits: Iterable[Edit]
) -> list[FusedPlace]:
    """Find the fused nodes that must be written out for some edits.

    LoRA needs none of them but where an activation is in the layer's own node: it goes on the
    product, wherever the bias is added.

    Args:
        survey: The survey of the graph.
        finder: Finds the modules in it.
        names: The graph's path for each module of the checkpoint.
        edits: The edits.
    """
    return [
        place
        for edit in edits
        if isinstance(edit, Bottleneck | LowRank | Scaling)
        for call in finder.calls(names[edit.module])
        for place in _places(survey, call, edit)
    ]


def _places(
    survey: Survey, call: LayerCall, edit: Bottleneck | LowRank | Scaling
) -> Iterator[FusedPlace]:
    path = call.view.scope.path
    if isinstance(edit, Scaling) and edit.on_input:
        return
    adds = isinstance(edit, LowRank) and edit.magnitude is None
    inside = inside_layer(call.node)
    if (call.activation or (inside and not adds)) and is_known(call.node):
        yield FusedPlace(path, call.raw, "")
    if isinstance(edit, LowRank) and not (edit.magnitude is not None and edit.scales_bias):
        return
    around = isinstance(edit, Bottleneck) and (edit.place, edit.reads) != ("output", "target")
    behind = bias_behind(survey.index, call.view, call.output, call.sizes[1])
    if behind is not None and can_write_out(behind):
        sums = around and behind.node.op_type in _SUMS
        yield FusedPlace(path, str(behind.node.output[0]), call.output, sums)
    elif around and not inside and not (behind and behind.unsure):
        tensor = moved_output(survey, call.view, call.output)
        for node in call.view.readers(tensor):
            if node.op_type in _SUMS and tensor in node.input[:2]:
                yield FusedPlace(path, str(node.output[0]), tensor, residual=True)
