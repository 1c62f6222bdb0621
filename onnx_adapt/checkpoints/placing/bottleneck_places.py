"""The tensors around a sub-layer that a bottleneck adapter changes and reads."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_adapt.checkpoints.modules.calls import block_output, norm_behind, residual_add
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.sites import Survey

PLACES = ("output", "residual", "norm")
"""Where a bottleneck can sit; `onnx_adapt.checkpoints.edits.Bottleneck` says what each is."""

READS = ("target", "residual_input", "norm", "sum", "normed_sum")
"""What it can read there."""


@dataclass(frozen=True, slots=True)
class BottleneckPlace:
    """The tensors of a graph that one place and what it reads come to.

    Attributes:
        target: The tensor that is changed.
        source: The tensor that is read, or '' for the target.
        plus: A tensor that is added to the source, or ''.
        norm: Output of the LayerNorm that is applied to what is read, or ''.
    """

    target: str
    source: str = ""
    plus: str = ""
    norm: str = ""


def bottleneck_place(
    survey: Survey, call: LayerCall, module: str, place: str, reads: str
) -> BottleneckPlace:
    """Find the tensors around one call of a sub-layer's output Linear.

    Args:
        survey: The survey of the graph.
        call: The call.
        module: The graph's path of the Linear.
        place: One of `PLACES`.
        reads: One of `READS`.

    Raises:
        CheckpointError: If there is no residual connection, or no LayerNorm behind it.
    """
    view = call.view
    output = block_output(survey, call, module)
    if place == "output" and reads == "target":
        return BottleneckPlace(output)
    total, residual = residual_add(survey, view, output)
    target = output
    if place == "norm":
        target = norm_behind(survey, view, total)
    elif place == "residual":
        target = total
    normed = reads in ("norm", "normed_sum")
    return BottleneckPlace(
        target,
        source=residual if reads == "residual_input" else "",
        plus=residual if reads in ("sum", "normed_sum") else "",
        norm=norm_behind(survey, view, total) if normed else "",
    )
