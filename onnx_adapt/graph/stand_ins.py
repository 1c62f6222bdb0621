"""ONNX operators that stand in for those of ONNX Runtime in shape inference.

ONNX's shape inference stops at an operator of ONNX Runtime. In the copy that it is run
on, each such operator is replaced by a few nodes whose outputs have the same element types
and shapes; the values differ, and nothing computes them. The rules are those of ONNX
Runtime's own documentation (`docs/ContribOperators.md`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import helper

from onnx_adapt.graph.constants import Weight

Find = Callable[[str], Weight | None]
"""Gives the constant that can be read by a name, or None."""

Sizes = Callable[[str], Sequence[int]]
"""Gives the axes of an input of the model, 0 where one has no fixed size."""

_FLOAT = onnx.TensorProto.FLOAT


@dataclass(slots=True)
class Draft:
    """The nodes that stand for one node.

    Attributes:
        node: The node they stand for.
        find: Looks up constants.
        sizes: Looks up the axes of the model's inputs; () for what is none.
        prefix: Of the names of tensors between them.
        nodes: The nodes so far, the constants they read included.
    """

    node: onnx.NodeProto
    find: Find
    sizes: Sizes
    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def given(self, position: int) -> str:
        """The name of an input, or '' if it is not given."""
        return str(self.node.input[position]) if position < len(self.node.input) else ""

    def weight(self, position: int) -> Weight | None:
        """The constant that an input is, or None."""
        name = self.given(position)
        return self.find(name) if name else None

    def number(self, name: str, default: int = 0) -> int:
        """An integer attribute of the node."""
        return next((int(a.i) for a in self.node.attribute if a.name == name), default)

    def add(self, op: str, *inputs: str, output: int | None = None, **attributes: Any) -> str:
        """Add a node; its output is one of the node's own, or one in between.

        Returns:
            The name of the output.
        """
        made = f"{self.prefix}/{len(self.nodes)}"
        if output is not None:
            made = str(self.node.output[output])
        self.nodes.append(helper.make_node(op, inputs, [made], **attributes))
        return made

    def shape(self, *sizes: int) -> str:
        """A constant vector of integers."""
        value = helper.make_tensor("", onnx.TensorProto.INT64, [len(sizes)], sizes)
        return self.add("Constant", value=value)

    def matrix(self, dims: Sequence[int]) -> str:
        """A constant of which only the shape counts: it has no values."""
        return self.add("Constant", value=onnx.TensorProto(data_type=_FLOAT, dims=dims))


Rule = Callable[[Draft], None]
"""Adds the nodes; it adds none where the node does not tell."""


def _like(source: int, *outputs: int) -> Rule:
    """Outputs have the type and shape of an input; by default the first output."""

    def rule(draft: Draft) -> None:
        for output in outputs or (0,):
            if output < len(draft.node.output) and draft.node.output[output]:
                draft.add("Identity", draft.given(source), output=output)

    return rule


def _as(op: str, **attributes: str) -> Rule:
    """An operator of ONNX that has the same inputs first and the same attributes.

    Args:
        op: The operator.
        attributes: Attributes that have another name in it.
    """

    def rule(draft: Draft) -> None:
        made = onnx.NodeProto(op_type=op, input=draft.node.input, output=draft.node.output)
        made.attribute.extend(draft.node.attribute)
        for item in made.attribute:
            item.name = attributes.get(item.name, item.name)
        draft.nodes.append(made)

    return rule


def _product(width: Callable[[Draft], int | None], typed: int | None = None) -> Rule:
    """The first input with another size on its last axis.

    Args:
        width: Gives the size.
        typed: The input whose element type the output has, if it is not the first.
    """

    def rule(draft: Draft) -> None:
        size = width(draft)
        if not size or size < 0:
            return
        wide = ("MatMul", draft.given(0), draft.matrix([_depth(draft), size]))
        if typed is None:
            draft.add(*wide, output=0)
        else:
            known = draft.weight(typed)
            to = known.elem_type if known else _FLOAT
            draft.add("Cast", draft.add(*wide), output=0, to=to)

    return rule


def _depth(draft: Draft) -> int:
    """The size that the first input must have on its last axis."""
    weight = draft.weight(1)
    if "K" in {item.name for item in draft.node.attribute}:
        return draft.number("K")
    if weight is None or not weight.dims:
        return 0
    return weight.dims[-1 if draft.number("transB") else 0]


def _attribute_size(name: str) -> Callable[[Draft], int | None]:
    return lambda draft: draft.number(name) or None


def _columns(draft: Draft) -> int | None:
    """The output size of a matrix product with a constant matrix."""
    weight = draft.weight(1)
    strange = ("transA", "transBatchA", "transBatchB")
    if weight is None or len(weight.dims) != 2 or any(map(draft.number, strange)):
        return None
    return weight.dims[-2 if draft.number("transB") else -1]


def _values(draft: Draft) -> int | None:
    """The size of the values of an attention whose weights are q, k and v side by side."""
    for item in draft.node.attribute:
        if item.name == "qkv_hidden_sizes" and len(item.ints) == 3:
            return int(item.ints[2])
    for position in (1, 2):
        weight = draft.weight(position)
        if weight is not None and weight.dims:
            return weight.dims[-1] // 3
    return None


def _half_of_bias(draft: Draft) -> int | None:
    bias = draft.weight(1)
    return math.prod(bias.dims) // 2 if bias is not None else None


def _scaled_norm(draft: Draft) -> None:
    """A norm whose output has the type of its scale."""
    scale = draft.weight(1)
    if scale is None or not scale.elem_type:
        draft.add("Identity", draft.given(0), output=0)
    else:
        draft.add("Cast", draft.given(0), output=0, to=scale.elem_type)


def _embedding(draft: Draft) -> None:
    """Word, position and segment embeddings, added and normalised; the third is the sum."""
    rows = (draft.given(2), draft.given(0))
    for output in (0, 2):
        if output < len(draft.node.output) and draft.node.output[output]:
            draft.add("Gather", *rows, output=output, axis=0)
    if len(draft.node.output) > 1 and draft.node.output[1]:  # the keys of each row, `(batch,)`
        count = draft.add("ArgMax", draft.given(0), axis=1, keepdims=0)
        draft.add("Cast", count, output=1, to=onnx.TensorProto.INT32)


def _packed_heads(draft: Draft, lead: tuple[int, ...]) -> None:
    """The first of queries, keys and values of `(..., heads, 3, size)`, on one axis."""
    first = [draft.shape(number) for number in (0, 1, len(lead) + 1)]
    part = draft.add("Slice", draft.given(0), *first)
    draft.add("Reshape", part, draft.shape(*lead, -1), output=0)


def _attention(lead: tuple[int, ...]) -> Rule:
    """Queries, keys and values of their own: `(..., heads * size)` of the values.

    As far as shapes go it is `(query @ key^T) @ value`. Without a key all three are packed
    into the query, `(..., heads, 3, size)`; without a value key and value are packed into
    the key, and the values are as wide as the query. Those that are kept from one run to the
    next, inputs of the model, are `(batch, heads, length, size)`.
    """
    product = {2: "bsd,bld,blv->bsv", 1: "sd,ld,lv->sv"}[len(lead)]

    def rule(draft: Draft) -> None:
        query, key, value = map(draft.given, range(3))
        kept = [draft.sizes(name) for name in (key, value)]
        if not key:
            _packed_heads(draft, lead)
        elif not value or (len(kept[1]) == 4 and kept[0][3:] == kept[1][3:]):
            draft.add("Identity", query, output=0)
        else:
            draft.add("Einsum", query, key, value, output=0, equation=product)

    return rule


def _grouped_attention(lead: tuple[int, ...]) -> Rule:
    """Fewer heads of keys and values than of queries; without a key all are in the query."""

    def rule(draft: Draft) -> None:
        heads, shared = draft.number("num_heads"), draft.number("kv_num_heads")
        if draft.given(1):
            draft.add("Identity", draft.given(0), output=0)
        elif heads > 0 and shared > 0:
            whole = draft.shape(*lead, heads + 2 * shared, -1)
            split = draft.add("Reshape", draft.given(0), whole)
            first = [draft.shape(number) for number in (0, heads, len(lead))]
            queries = draft.add("Slice", split, *first)
            draft.add("Reshape", queries, draft.shape(*lead, -1), output=0)

    return rule


def _quantised_rows(draft: Draft) -> None:
    """Rows of a quantised table; two 4-bit numbers are in a byte."""
    table, scales = draft.weight(0), draft.weight(2)
    if table is None or not table.dims:
        return
    packed = table.elem_type == onnx.TensorProto.UINT8 and draft.number("bits", 4) == 4
    dims = [*table.dims[:-1], table.dims[-1] * (2 if packed else 1)]
    axis = draft.number("gather_axis")
    rows = draft.add("Gather", draft.matrix(dims), draft.given(1), axis=axis)
    draft.add("Cast", rows, output=0, to=scales.elem_type if scales else _FLOAT)


STAND_INS: dict[str, Rule] = {
    **dict.fromkeys(("BiasGelu", "FastGelu", "QuickGelu", "Gelu"), _like(0)),
    **dict.fromkeys(("BiasSoftmax", "BiasAdd", "BiasDropout", "Dropout"), _like(0)),
    "BiasSplitGelu": _product(_half_of_bias),
    "RotaryEmbedding": _like(0),
    "GemmaRotaryEmbedding": _like(2, 0, 1),
    "LayerNormalization": _scaled_norm,
    "RMSNormalization": _scaled_norm,
    "SimplifiedLayerNormalization": _scaled_norm,
    "SkipLayerNormalization": _like(0, 0, 3),
    "SkipSimplifiedLayerNormalization": _like(0, 0, 3),
    "EmbedLayerNormalization": _embedding,
    "GroupNormalization": _like(0),
    "MeanVarianceNormalization": _like(0),
    "GroupNorm": _like(0),
    "SkipGroupNorm": _like(0, 0, 1),
    "Attention": _product(_values),
    "PackedAttention": _product(_values),
    "DecoderMaskedSelfAttention": _product(_values),
    "QAttention": _product(_values, typed=3),
    "LongformerAttention": _like(0),
    "DecoderAttention": _like(0),
    "MultiHeadAttention": _attention((0, 0)),
    "DecoderMaskedMultiHeadAttention": _attention((0, 0)),
    "PackedMultiHeadAttention": _attention((0,)),
    "GroupQueryAttention": _grouped_attention((0, 0)),
    "SparseAttention": _grouped_attention((0, 0)),
    "PagedAttention": _grouped_attention((0,)),
    "MoE": _like(0),
    "QMoE": _like(0),
    "FusedMatMul": _product(_columns),
    "TransposeMatMul": _product(_columns),
    "GemmFastGelu": _product(_columns),
    "MatMulNBits": _product(_attribute_size("N")),
    "MatMulBnb4": _product(_attribute_size("N")),
    "DynamicQuantizeMatMul": _product(_columns),
    "MatMulIntegerToFloat": _product(_columns, typed=2),
    "FusedGemm": _as("Gemm"),
    "FusedConv": _as("Conv"),
    "DynamicQuantizeLSTM": _as("LSTM"),
    "GatherBlockQuantized": _quantised_rows,
    "GreaterOrEqual": _as("Greater"),
    "LessOrEqual": _as("Less"),
    "QuantizeLinear": _as("QuantizeLinear"),
    "DequantizeLinear": _as("DequantizeLinear"),
}
"""What each operator of ONNX Runtime is as far as types and shapes go, by operator type."""

DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Where these operators are: ONNX Runtime has some of its own in ONNX's domain."""


def stand_in(node: onnx.NodeProto, find: Find, sizes: Sizes, prefix: str) -> Draft | None:
    """The nodes that have the types and shapes of one of ONNX Runtime's operators.

    Args:
        node: The node; ONNX does not know its operator.
        find: Gives the constant that can be read by a name, or None.
        sizes: Gives the axes of an input of the model.
        prefix: Of new names.

    Returns:
        The nodes, or None if nothing is known of the operator.
    """
    rule = STAND_INS.get(node.op_type) if node.domain in DOMAINS else None
    if rule is None or not any(node.output):
        return None
    draft = Draft(node, find, sizes, prefix)
    rule(draft)
    return draft if draft.nodes else None
