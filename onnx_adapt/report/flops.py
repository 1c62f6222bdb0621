"""Floating-point operations of one run of a node, counted from the shapes it works on.

A multiply-add is two operations, so is a multiply and an add. What is counted, with one row
for each operator:

- Products and convolutions: their multiply-adds, and one for each number a bias is added to.
- Recurrent layers: the same in every step and direction, `W` and `R` with both halves of
  the bias, and a multiply-add for each peephole. Gates are not counted element by element.
- Attention: what projects (if it has weights), queries by keys, and probabilities by values.
  A mask saves nothing; so ONNX Runtime's kernels work.
- Normalisations: what the formula has for each element; see `_NORMS`.
- Reductions and pools: one for each element that they read.
- Data that is only moved: nothing. Everything else: one for each element that is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx_adapt.report.attention import (
    attention,
    experts,
    grouped_query,
    multi_head,
    projecting_attention,
)
from onnx_adapt.report.call import Call, Count, Shape, given

_ONNX = ("", "ai.onnx")
_KNOWN = (*_ONNX, "com.microsoft")
"""Domains whose operators are meant by the names in the tables."""


def is_free(op: str, domain: str) -> bool:
    """Whether an operator only moves data, or runs the graphs inside it."""
    return op in _MOVING and domain in (*_KNOWN, "ai.onnx.ml")


def is_in_table(op: str, domain: str) -> bool:
    """Whether the count needs more than the first output."""
    return domain in _KNOWN and (f"{domain}.{op}" in _COUNTS or op in _COUNTS)


def flops(call: Call) -> int | None:
    """The operations of one run of a node; None if they cannot be known."""
    if is_free(call.op, call.domain):
        return 0
    if is_in_table(call.op, call.domain):
        count = _COUNTS.get(f"{call.domain}.{call.op}") or _COUNTS[call.op]
        try:
            return count(call)
        except (LookupError, ValueError):  # an input is left out, or of another rank
            return None
    plain = call.domain in _ONNX and call.op not in _UNKNOWN
    return call.made if plain or (call.domain in _KNOWN and call.op in _BY_ELEMENT) else None


def _product(left: int = 0, bias: int | None = None) -> Count:
    """A matrix product; `left` and `bias` are inputs."""

    def count(call: Call) -> int:
        shape = call.input(left)
        inner = shape[-1]
        if call.attributes.get("transA"):
            inner = shape[0 if call.attributes.get("transBatchA") else -2]
        return 2 * call.made * inner + (call.made if call.has(bias) else 0)

    return count


def _convolution(kernel: int = 1, bias: int | None = 2, added: int | None = None) -> Count:
    """Every output meets the kernel of its channel: `(out, in / groups, places...)`."""

    def count(call: Call) -> int:
        more = call.has(bias) + call.has(added)
        return call.made * (2 * math.prod(call.input(kernel)[1:]) + more)

    return count


def _transposed(bias: int) -> Count:
    """Every input meets the kernel of its channel: `(in, out / groups, places...)`."""

    def count(call: Call) -> int:
        products = 2 * math.prod(call.input(0)) * math.prod(call.input(1)[1:])
        return products + (call.made if call.has(bias) else 0)

    return count


def _recurrent(call: Call) -> int:
    """`X (steps, batch, in)` or batch first; W, R, B and P lead with the directions."""
    rows = math.prod(call.input(0)[:2])
    products = math.prod(call.input(1)) + math.prod(call.input(2))
    peepholes = call.size(7) if call.op.endswith("LSTM") else 0
    return rows * (2 * products + call.size(3) + 2 * peepholes)


def _norm(each: int, *optional: int) -> Count:
    """So many operations for each element, and one more for each of some inputs."""
    return lambda call: call.made * (each + sum(map(call.has, optional)))


def _reads(call: Call) -> int:
    return math.prod(call.input(0))


def _pool(call: Call) -> int:
    window: Sequence[int] = call.attributes["kernel_shape"]
    return call.made * math.prod(window)


def _einsum(call: Call) -> int:
    """All indices together, times the products for each, and one more if they are summed."""
    terms, arrow, result = call.attributes["equation"].replace(" ", "").partition("->")
    shapes = [given(shape) for shape in call.inputs]
    named = [
        item
        for term, shape in zip(terms.split(","), shapes, strict=True)
        for item in zip(_labels(term, shape), shape, strict=True)
    ]
    sizes: dict[str, int] = {}
    for name, size in named:  # an axis of 1 is as long as the others
        sizes[name] = size if sizes.get(name, 1) == 1 else sizes[name]
    if arrow:
        kept = set(_labels(result, given(call.outputs[0])))
    else:  # what is there once, and the axes that have no name
        every = [name for name, _ in named]
        kept = {name for name in every if every.count(name) == 1 or name[0] == "."}
    return math.prod(sizes.values()) * (len(shapes) - 1 + (not kept.issuperset(sizes)))


def _labels(term: str, shape: Shape) -> list[str]:
    """A name for each axis; those of an ellipsis are counted from the right, as numpy's."""
    before, dots, after = term.partition("...")
    rest = len(shape) - len(before) - len(after)
    return [*before, *(f".{i}" for i in range(rest, 0, -1) if dots), *after]


_NORMS: dict[str, Count] = {
    "BatchNormalization": _norm(2),  # a multiply-add: its four vectors are two
    # mean, difference, its square, their sum, times the deviation, times the weight (bias)
    "LayerNormalization": _norm(6, 2),
    "InstanceNormalization": _norm(7),
    "GroupNormalization": _norm(7),
    "GroupNorm": _norm(7),
    "MeanVarianceNormalization": _norm(5),
    # square, sum, times the root, times the weight
    "RMSNormalization": _norm(4),
    "SimplifiedLayerNormalization": _norm(4),
    # the same after a sum of two, and of a bias
    "SkipLayerNormalization": _norm(7, 3, 4),
    "SkipSimplifiedLayerNormalization": _norm(5, 3),
    "SkipGroupNorm": _norm(8, 4),
    "EmbedLayerNormalization": _norm(8, 4),  # positions, and segments
}

_COUNTS: dict[str, Count] = {
    "MatMul": _product(),
    "MatMulInteger": _product(),
    "QLinearMatMul": _product(),
    "FusedMatMul": _product(),
    "TransposeMatMul": _product(),
    "MatMulBnb4": _product(),
    "MatMulNBits": _product(bias=5),
    "MatMulIntegerToFloat": _product(bias=6),
    "DynamicQuantizeMatMul": _product(bias=4),
    "Gemm": _product(bias=2),
    "FusedGemm": _product(bias=2),
    "GemmFloat8": _product(bias=2),
    "GemmFastGelu": _product(bias=2),
    "QGemm": _product(bias=6),
    "Conv": _convolution(),
    "FusedConv": _convolution(added=3),
    "NhwcFusedConv": _convolution(added=3),
    "ConvInteger": _convolution(bias=None),
    "QLinearConv": _convolution(kernel=3, bias=8),
    "DeformConv": _convolution(bias=3),
    "ConvTranspose": _transposed(bias=2),
    "ConvTransposeWithDynamicPads": _transposed(bias=3),
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "DynamicQuantizeLSTM": _recurrent,
    "Einsum": _einsum,
    "Attention": attention,
    "com.microsoft.Attention": projecting_attention(past=4),
    "QAttention": projecting_attention(past=8),
    "MultiHeadAttention": multi_head,
    "GroupQueryAttention": grouped_query,
    "MoE": experts(2, 4, 6),
    "QMoE": experts(2, 5, 8, packed=True),
    **_NORMS,
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
"""The operators whose work is more than the elements of what they make."""

_MOVING = {
    *("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Dropout"),
    *("Expand", "EyeLike", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
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
        "GatherBlockQuantized",
        "Gelu",
        "QLinearAdd",
        "QLinearLeakyRelu",
    ),
    *("QLinearMul", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere", "QuantizeLinear"),
    *("QuickGelu", "RotaryEmbedding"),
}
"""Operators of com.microsoft that have one operation for each element that they make."""
