"""The table of rules: how each operator passes gradients back."""

from __future__ import annotations

from onnx_adapt.graph.gradients.convolutions import CONVOLUTIONS
from onnx_adapt.graph.gradients.moving import MOVING
from onnx_adapt.graph.gradients.norms import NORMS
from onnx_adapt.graph.gradients.pointwise import POINTWISE
from onnx_adapt.graph.gradients.products import PRODUCTS
from onnx_adapt.graph.gradients.quantised import QUANTISED
from onnx_adapt.graph.gradients.reductions import REDUCTIONS
from onnx_adapt.graph.gradients.rule import Rule

RULES: dict[str, Rule] = {
    **POINTWISE,
    **PRODUCTS,
    **REDUCTIONS,
    **NORMS,
    **CONVOLUTIONS,
    **QUANTISED,
    **MOVING,
}
"""The rules by operator. To add an operator is to add a row to one of these."""

FLAT = frozenset(
    {
        *("Shape", "Size", "ConstantOfShape", "Range", "EyeLike", "OneHot", "NonZero"),
        *("Floor", "Ceil", "Round", "Sign", "ArgMax", "ArgMin", "Mod", "IsNaN", "IsInf"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("Not", "And", "Or", "Xor", "BitShift", "RandomNormalLike", "RandomUniformLike"),
    }
)
"""Operators whose outputs do not change, or jump, when their inputs change a little."""
