"""Floating-point operations of one run of a node, counted from the shapes it works on.

A multiply-add is two operations; so is a multiply and an add. Counted are:

- Operators with weights: by the rule in their row of `graph.operators`.
- Attention: its projections (if it has weights), queries by keys, and probabilities by
  values. A mask saves nothing, because ONNX Runtime's kernels compute what it hides.
- Reductions and pools: one for each element that they read.
- Operators that only move data: nothing.
- All other operators: one for each element that they make.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from onnx_adapt.graph.operations import (
    NodeRun,
    convolution,
    normalisation,
    product,
    table_lookup,
    transposed_convolution,
)
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.report.attention import (
    Count,
    attention,
    experts,
    grouped_query,
    multi_head,
    projecting_attention,
)

_ONNX = ("", "ai.onnx")
_KNOWN = (*_ONNX, "com.microsoft")
"""Domains whose operators are meant by the names in the tables."""


def is_free(op: str, domain: str) -> bool:
    """Whether an operator only moves data, or runs the graphs inside it."""
    operator = OPERATORS.get(op)
    moves = op in _MOVING or (operator is not None and operator.operations is table_lookup)
    return moves and domain in (*_KNOWN, "ai.onnx.ml")


def is_in_table(op: str, domain: str) -> bool:
    """Whether the count needs more than the first output."""
    return _rule(op, domain) is not None


def _rule(op: str, domain: str) -> Count | None:
    """The rule that counts an operator from more than what it makes, or None."""
    if domain not in _KNOWN:
        return None
    rule = _COUNTS.get(f"{domain}.{op}") or _COUNTS.get(op)
    operator = OPERATORS.get(op)
    return operator.count if rule is None and operator else rule


def flops(run: NodeRun) -> int | None:
    """The operations of one run of a node; None if they cannot be known."""
    if is_free(run.op, run.domain):
        return 0
    rule = _rule(run.op, run.domain)
    if rule is not None:
        try:
            return rule(run)
        except (LookupError, ValueError):  # an input is left out, or of another rank
            return None
    plain = run.domain in _ONNX and run.op not in _UNKNOWN
    return run.made if plain or (run.domain in _KNOWN and run.op in _BY_ELEMENT) else None


def _reads(run: NodeRun) -> int:
    return math.prod(run.input(0))


def _pool(run: NodeRun) -> int:
    window: Sequence[int] = run.attributes["kernel_shape"]
    return run.made * math.prod(window)


_COUNTS: dict[str, Count] = {
    "TransposeMatMul": partial(product, weight=1, bias=None),
    "GemmFastGelu": partial(product, weight=1, bias=2),
    "DeformConv": partial(convolution, weight=1, bias=3),
    "ConvTransposeWithDynamicPads": partial(transposed_convolution, weight=1, bias=3),
    "GroupNorm": partial(normalisation(6), weight=1, bias=2),
    "SkipGroupNorm": partial(normalisation(7, 4), weight=1, bias=2),
    "MeanVarianceNormalization": lambda run: 5 * run.made,
    "Attention": attention,
    "com.microsoft.Attention": projecting_attention(past=4),
    "QAttention": projecting_attention(past=8),
    "MultiHeadAttention": multi_head,
    "GroupQueryAttention": grouped_query,
    "MoE": experts(2, 4, 6),
    "QMoE": experts(2, 5, 8, packed=True),
    **dict.fromkeys(
        (
            *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
            *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
            *("ArgMax", "ArgMin", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"),
            *("QLinearReduceMean", "QLinearGlobalAveragePool"),
        ),
        _reads,
    ),
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool", "QLinearAveragePool"), _pool),
}
"""The operators without a row in `OPERATORS` whose work is more than one per element made."""

_MOVING = {
    *("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Dropout"),
    *("Expand", "EyeLike", "Flatten", "GatherElements", "GatherND", "Identity"),
    *("NonZero", "OneHot", "Pad", "QLinearConcat", "Range", "Reshape", "Scatter"),
    *("ScatterElements", "ScatterND", "Shape", "Size", "Slice", "SpaceToDepth", "Split"),
    *("Squeeze", "TensorScatter", "Tile", "Transpose", "Trilu", "Unsqueeze", "ZipMap"),
    *("If", "Loop", "Scan", "SequenceMap", "SequenceAt", "SequenceConstruct"),
    *("SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"),
    *("ConcatFromSequence", "SplitToSequence", "Optional", "OptionalGetElement"),
    "OptionalHasElement",
}
"""Operators that move data, or run the graphs inside them."""

_UNKNOWN = {"DFT", "STFT", "Det", "LinearAttention"}
"""ONNX's operators whose work cannot be told from the elements that they make."""

_BY_ELEMENT = {
    *(
        "BiasAdd",
        "BiasDropout",
        "BiasGelu",
        "BiasSoftmax",
        "BiasSplitGelu",
        "DequantizeLinear",
    ),
    *(
        "DynamicQuantizeLinear",
        "FastGelu",
        "Gelu",
        "QLinearAdd",
        "QLinearLeakyRelu",
    ),
    *("QLinearMul", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere", "QuantizeLinear"),
    *("QuickGelu", "RotaryEmbedding"),
}
"""Operators of com.microsoft that have one operation for each element that they make."""
