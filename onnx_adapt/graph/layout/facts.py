"""What each operator does to axes, and what it tells of the features.

Of an operator with weights its row in `graph.operators` tells that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from onnx_adapt.graph.layout import links
from onnx_adapt.graph.layout.links import Link, Linker
from onnx_adapt.graph.layout.lookup import Lookup, Step
from onnx_adapt.graph.layout.signs import (
    Sign,
    Strength,
    Where,
    centred,
    channels_last,
    einsum_signs,
    embedded,
    matrices,
    multiplied,
    normalised,
    per_channel,
    resized,
    sign,
)
from onnx_adapt.graph.operators import CHANNELS, LAST, OPERATORS, WeightLayout


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one operator.

    Attributes:
        links: How axes go through it; None if it ends them.
        axis: Where the features are in what it reads and makes, or a function that tells;
            None if it does not say.
        reads: The inputs that have them there.
        makes: The outputs that have them there.
        strength: How much that tells.
        more: Signs of another kind.
    """

    links: Linker | None = None
    axis: int | Where | None = None
    reads: tuple[int, ...] = (0,)
    makes: tuple[int, ...] = (0,)
    strength: Strength = Strength.DEFINED
    more: Callable[[Lookup, Step], Iterator[Sign]] | None = None


_SAME = Fact(links.same)
_BROADCAST = Fact(links.broadcast, more=per_channel)
_REDUCE = Fact(links.reduce)
_RESHAPE = Fact(links.reshape)
_CHANNELS_MADE = Fact(axis=CHANNELS)
_POOL = Fact(links.same, CHANNELS, strength=Strength.LINEAR)
_SKIP_NORM = Fact(links.broadcast, LAST, reads=(0, 1), makes=(0, 3))
_BIASED = Fact(links.same, LAST, strength=Strength.LINEAR)
_ATTENTION = Fact(axis=LAST, reads=(0, 1, 2))


def _linear(weight: int) -> Fact:
    """A product with the matrix at an input."""
    axis = multiplied(weight, ("transA",))
    return Fact(links.product_of_matrices, axis, strength=Strength.LINEAR, more=matrices)


def _rows(names: str, fact: Fact) -> dict[str, Fact]:
    return dict.fromkeys(names.split(), fact)


FACTS: dict[str, Fact] = {
    **_rows(
        "Identity Cast CastLike Clip Relu LeakyRelu Elu Selu Celu ThresholdedRelu Sigmoid "
        "HardSigmoid HardSwish Mish Swish Tanh Gelu QuickGelu Softplus Softsign Softmax "
        "LogSoftmax Hardmax Erf Exp Log Sqrt Reciprocal Neg Abs Sign Floor Ceil "
        "Round Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Not IsNaN IsInf "
        "BitwiseNot Shrink Dropout Bernoulli Pad Slice Tile CumSum TopK Trilu Compress "
        "ReverseSequence ScatterElements ScatterND Scatter GatherElements LpNormalization "
        "QuantizeLinear DequantizeLinear DynamicQuantizeLinear "
        "QLinearSigmoid QLinearLeakyRelu QLinearSoftmax BiasDropout",
        _SAME,
    ),
    **_rows(
        "Add Sub Mul Div Pow Mod Max Min Mean Sum Where PRelu And Or Xor Equal Less Greater "
        "LessOrEqual GreaterOrEqual BitShift BitwiseAnd BitwiseOr BitwiseXor QLinearAdd "
        "QLinearMul QLinearWhere",
        _BROADCAST,
    ),
    **_rows(
        "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceSumSquare ArgMax ArgMin QLinearReduceMean",
        _REDUCE,
    ),
    **_rows("Reshape Flatten", _RESHAPE),
    "Split": Fact(links.split),
    "Transpose": Fact(links.transpose),
    "Squeeze": Fact(links.squeeze),
    "Unsqueeze": Fact(links.unsqueeze),
    "Expand": Fact(links.expand),
    **_rows("Concat QLinearConcat", Fact(links.concat)),
    "Einsum": Fact(links.einsum, more=einsum_signs),
    **_rows("TransposeMatMul GemmFastGelu", _linear(1)),
    **_rows("DeformConv GridSample", _CHANNELS_MADE),
    **_rows("DepthToSpace SpaceToDepth MaxRoiPool RoiAlign Col2Im", _CHANNELS_MADE),
    **_rows("NhwcConv NhwcMaxPool", Fact(axis=LAST)),
    "LRN": Fact(links.same, CHANNELS),
    "MeanVarianceNormalization": Fact(links.same, centred),
    **_rows("GroupNorm", Fact(links.same, channels_last(1))),
    "SkipGroupNorm": Fact(links.same, channels_last(1), reads=(0, 3)),
    **_rows("MaxPool AveragePool LpPool MaxUnpool", _POOL),
    **_rows("GlobalAveragePool GlobalMaxPool GlobalLpPool", _POOL),
    **_rows(
        "QLinearAveragePool QLinearGlobalAveragePool",
        Fact(links.same, channels_last(0), strength=Strength.LINEAR),
    ),
    **_rows("Resize Upsample", Fact(links.same, resized, strength=Strength.LINEAR)),
    **_rows("SkipLayerNormalization SkipSimplifiedLayerNormalization", _SKIP_NORM),
    "EmbedLayerNormalization": Fact(axis=LAST, reads=(), makes=(0, 2)),
    **_rows("BiasGelu FastGelu BiasAdd BiasSplitGelu", _BIASED),
    **_rows("Attention MultiHeadAttention GroupQueryAttention", _ATTENTION),
    **_rows("PackedMultiHeadAttention DecoderMaskedMultiHeadAttention", _ATTENTION),
    "SparseAttention": _ATTENTION,
    **_rows("LongformerAttention DecoderAttention", Fact(axis=LAST)),
    **_rows("QAttention PackedAttention DecoderMaskedSelfAttention", Fact(axis=LAST)),
    **_rows("RotaryEmbedding MoE QMoE", Fact(links.same, LAST)),
    "GemmaRotaryEmbedding": Fact(axis=LAST, reads=(1, 3), makes=(0, 1)),
}
"""Operators without weights, and those with several inputs of features, by type.

The domain does not matter. What is said of other operators with weights is in `operators`.
"""


def fact_of(op: str) -> Fact | None:
    """What is known of an operator, or None."""
    fact = FACTS.get(op)
    if fact is None and op in OPERATORS:
        return _of_weights(op)
    return fact


@cache
def _of_weights(op: str) -> Fact:
    """What the row of an operator with weights says of axes."""
    operator = OPERATORS[op]
    match operator.layout:
        case WeightLayout.IN_OUT | WeightLayout.BY_TRANS_B | WeightLayout.BY_EQUATION:
            return _linear(operator.weight)
        case WeightLayout.BLOCKS | WeightLayout.BNB4:
            return Fact(links.product_of_matrices, LAST, strength=Strength.LINEAR)
        case WeightLayout.CONV | WeightLayout.CONV_TRANSPOSED:
            return Fact(axis=channels_last(0) if operator.axis == CHANNELS else LAST)
        case WeightLayout.TABLE:
            return Fact(links.gather, embedded, reads=())
        case WeightLayout.PACKED_TABLE:
            return Fact(axis=LAST, reads=())
        case WeightLayout.VECTOR | WeightLayout.GROUPS:
            return Fact(links.same, CHANNELS if operator.axis == CHANNELS else normalised)
        case WeightLayout.GATES:
            return Fact(axis=LAST, reads=(0, 5, 6), makes=tuple(range(operator.outputs)))


def links_of(lookup: Lookup, step: Step) -> Iterator[Link]:
    """How axes go through a node that has no bodies."""
    fact = fact_of(step.node.op_type)
    if fact is None:
        yield from _unknown(lookup, step)
    elif fact.links is not None and step.outputs:
        yield from fact.links(lookup, step)


def _unknown(lookup: Lookup, step: Step) -> Iterator[Link]:
    """An operator that is not in the table keeps axes whose sizes are all different."""
    if not step.outputs:
        return
    after = lookup.shape(step.view, step.outputs[0])
    alike = after is not None and None not in after and len(set(after)) == len(after)
    if alike and lookup.shape(step.view, step.read(0)) == after:
        yield from links.same(lookup, step)


def own_axis(lookup: Lookup, step: Step) -> int | None:
    """Where an operator puts the features of what it makes, or None if it does not say."""
    fact = fact_of(step.node.op_type)
    return _axis(fact, lookup, step) if fact else None


def _axis(fact: Fact, lookup: Lookup, step: Step) -> int | None:
    if not step.outputs:
        return None
    return fact.axis(lookup, step) if callable(fact.axis) else fact.axis


def signs_of(lookup: Lookup, step: Step) -> Iterator[Sign]:
    """What a node tells of its inputs and outputs."""
    fact = fact_of(step.node.op_type)
    if fact is None:
        return
    if fact.more is not None:
        yield from fact.more(lookup, step)
    axis = _axis(fact, lookup, step)
    if axis is None:
        return
    for position in fact.reads:
        yield from sign(lookup, step, position, axis, fact.strength, makes=False)
    for position in fact.makes:
        yield from sign(lookup, step, position, axis, fact.strength, makes=True)
