"""The table of rules: how each operator passes gradients back."""

from __future__ import annotations

from onnx_adapt.graph.gradients.branches import choose_branch
from onnx_adapt.graph.gradients.convolutions import CONVOLUTIONS
from onnx_adapt.graph.gradients.moving import MOVING
from onnx_adapt.graph.gradients.norms import NORMS
from onnx_adapt.graph.gradients.pointwise import POINTWISE
from onnx_adapt.graph.gradients.products import PRODUCTS
from onnx_adapt.graph.gradients.quantised import QUANTISED
from onnx_adapt.graph.gradients.recurrent import RECURRENT
from onnx_adapt.graph.gradients.reductions import REDUCTIONS
from onnx_adapt.graph.gradients.resizing import RESIZING
from onnx_adapt.graph.gradients.rule import Rule

RULES: dict[str, Rule] = {
    **POINTWISE,
    **PRODUCTS,
    **REDUCTIONS,
    **NORMS,
    **CONVOLUTIONS,
    **QUANTISED,
    **MOVING,
    **RESIZING,
    **RECURRENT,
    "If": choose_branch,
}
"""The rules by operator. To add an operator is to add a row to one of these."""
