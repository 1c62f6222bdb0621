"""The operators with weights, one row each: all that the package knows of one is here.

To add an operator, add a row to `OPERATORS`. A column has no default, so that a row with a
column missing is an error when the module is imported; a row like another one is
`replace(_PRODUCT, bias=5)`. From its row an operator is found as a site, gets its width and
axis, is followed by the layout analysis, can be the call of a PyTorch module and is counted
in the costs of a report.

Operators without weights have tables where they are needed: how axes go through them
(`layout.facts`), what stands in for them in shape inference (`stand_ins`), which of them add
a bias that an optimiser moved into them (`fused_bias`), and their operations
(`report.flops`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import onnx

from onnx_adapt.graph import einsum, operations
from onnx_adapt.graph.operations import NodeRun, Operations

LAST, CHANNELS = -1, 1


class WeightLayout(Enum):
    """How the weight of an operator is stored."""

    IN_OUT = "(in, out)"
    BY_TRANS_B = "(in, out), or (out, in) where the attribute transB says so"
    BY_EQUATION = "(in, out) or (out, in), as the attribute equation says"
    BLOCKS = "(out, in) in blocks of integers; the attributes K and N are in and out"
    BNB4 = "(out, in), two numbers of a table of 16 in each byte; K and N are in and out"
    CONV = "(out, in / groups, places...)"
    CONV_TRANSPOSED = "(in, out / groups, places...)"
    TABLE = "(entries, out): rows that are looked up"
    PACKED_TABLE = "rows that are looked up, in blocks of integers of a size not told"
    VECTOR = "(features,), one number for each"
    GROUPS = "one number for each group or channel, by opset: it tells no width"
    GATES = "(directions, gates * out, in); the attribute hidden_size is out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """What is known of one operator with weights.

    Attributes:
        weight: The input that is its weight.
        constant: Whether a node is a layer only where that input is constant.
        layout: How the weight is stored, and so how wide the output is.
        data: The input that it computes on; for an embedding the ids.
        axis: The feature axis of the output.
        weight_scale: The input with the scale of a quantised weight, or None.
        weight_zero: The input with its zero point, or None.
        bias: The input that may hold a bias, or None.
        bias_add: Whether a constant that a following Add adds is its bias.
        outputs: How many of its outputs, the first ones, are outputs of a layer.
        keeps_type: Whether a float output has the element type of a float input.
        module_call: Whether it can be the call of a module that a checkpoint adapts.
        operations: The rule that counts its floating-point operations.
    """

    weight: int
    constant: bool
    layout: WeightLayout
    data: int
    axis: int
    weight_scale: int | None
    weight_zero: int | None
    bias: int | None
    bias_add: bool
    outputs: int
    keeps_type: bool
    module_call: bool
    operations: Operations

    @property
    def embeds(self) -> bool:
        """Whether it looks rows up in a table."""
        return self.layout in (WeightLayout.TABLE, WeightLayout.PACKED_TABLE)

    @property
    def multiplies(self) -> bool:
        """Whether its weight is a matrix or a kernel, not a table or a vector."""
        vectors = (WeightLayout.VECTOR, WeightLayout.GROUPS)
        return not self.embeds and self.layout not in vectors

    @property
    def convolves(self) -> bool:
        """Whether its weight is that of a convolution, with as many axes as its output."""
        return self.layout in (WeightLayout.CONV, WeightLayout.CONV_TRANSPOSED)

    def has_bias(self, node: onnx.NodeProto) -> bool:
        """Whether a node of this operator has a bias as an input of its own."""
        return self.bias is not None and any(node.input[self.bias : self.bias + 1])

    def sizes(
        self, node: onnx.NodeProto, dims: Sequence[int]
    ) -> tuple[int | None, int | None]:
        """The width that a node reads and the one that it makes, None where unknown.

        Of a batch of matrices, one for each head or expert, only the second is told.

        Args:
            node: A node of this operator.
            dims: The shape of its weight, () if that is unknown.
        """
        match self.layout:
            case WeightLayout.BLOCKS | WeightLayout.BNB4:
                return _number(node, "K", 0) or None, _number(node, "N", 0) or None
            case WeightLayout.GATES:
                return None, _number(node, "hidden_size", 0) or None
            case WeightLayout.PACKED_TABLE | WeightLayout.GROUPS:
                return None, None
            case WeightLayout.VECTOR:
                return (dims[-1], dims[-1]) if dims else (None, None)
            case WeightLayout.CONV if dims:
                wide = dims[1] * _number(node, "group", 1) if len(dims) > 1 else None
                return wide, dims[0]
        if len(dims) < 2:
            return None, None
        if self.layout is WeightLayout.CONV_TRANSPOSED:
            return dims[0], dims[1] * _number(node, "group", 1)
        in_out = self.embeds or self.is_stored_in_out(node)
        reads, makes = dims[-2:] if in_out else (dims[-1], dims[-2])
        return (reads if math.prod(dims[:-2]) == 1 else None), makes

    def is_stored_in_out(self, node: onnx.NodeProto) -> bool:
        """Whether a node's weight is `(in, out)`, the transpose of PyTorch's."""
        if self.layout is WeightLayout.BY_TRANS_B:
            return not _number(node, "transB", 0)
        if self.layout is WeightLayout.BY_EQUATION:
            return einsum.linear_order(node) == "(in, out)"
        return self.layout is WeightLayout.IN_OUT

    def count(self, run: NodeRun) -> int:
        """The floating-point operations of one run of a node of this operator.

        Raises:
            LookupError: If an input that tells them is left out.
        """
        return self.operations(run, weight=self.weight, bias=self.bias)


def _number(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


_PRODUCT = Operator(
    weight=1,
    constant=True,
    layout=WeightLayout.IN_OUT,
    data=0,
    axis=LAST,
    weight_scale=None,
    weight_zero=None,
    bias=None,
    bias_add=True,
    outputs=1,
    keeps_type=True,
    module_call=False,
    operations=operations.product,
)
_GEMM = replace(_PRODUCT, layout=WeightLayout.BY_TRANS_B, bias=2)
_CONV = Operator(
    weight=1,
    constant=True,
    layout=WeightLayout.CONV,
    data=0,
    axis=CHANNELS,
    weight_scale=None,
    weight_zero=None,
    bias=2,
    bias_add=True,
    outputs=1,
    keeps_type=True,
    module_call=False,
    operations=operations.convolution,
)
_LAYER_NORM = Operator(
    weight=1,
    constant=False,
    layout=WeightLayout.VECTOR,
    data=0,
    axis=LAST,
    weight_scale=None,
    weight_zero=None,
    bias=2,
    bias_add=False,
    outputs=1,
    keeps_type=True,
    module_call=False,
    # mean, difference, its square, their sum, times the deviation, times the weight
    operations=operations.normalisation(6),
)
_RMS_NORM = replace(  # square, sum, times the root, times the weight
    _LAYER_NORM, bias=None, operations=operations.normalisation(4)
)
_CHANNEL_NORM = replace(_LAYER_NORM, constant=True, axis=CHANNELS)
_TABLE = Operator(
    weight=0,
    constant=True,
    layout=WeightLayout.TABLE,
    data=1,
    axis=LAST,
    weight_scale=None,
    weight_zero=None,
    bias=None,
    bias_add=False,
    outputs=1,
    keeps_type=True,
    module_call=False,
    operations=operations.table_lookup,
)
_RECURRENT = Operator(
    weight=1,
    constant=False,
    layout=WeightLayout.GATES,
    data=0,
    axis=LAST,
    weight_scale=None,
    weight_zero=None,
    bias=3,
    bias_add=False,
    outputs=3,
    keeps_type=True,
    module_call=False,
    operations=operations.recurrence,
)

OPERATORS: dict[str, Operator] = {
    "MatMul": replace(_PRODUCT, module_call=True),
    "FusedMatMul": replace(_PRODUCT, layout=WeightLayout.BY_TRANS_B, module_call=True),
    "Einsum": replace(
        _PRODUCT,
        layout=WeightLayout.BY_EQUATION,
        module_call=True,
        operations=operations.summed_products,
    ),
    "MatMulInteger": replace(_PRODUCT, weight_zero=3, keeps_type=False, module_call=True),
    "MatMulIntegerToFloat": replace(
        _PRODUCT, weight_scale=3, weight_zero=5, bias=6, module_call=True
    ),
    "DynamicQuantizeMatMul": replace(
        _PRODUCT, weight_scale=2, weight_zero=3, bias=4, module_call=True
    ),
    "MatMulNBits": replace(_PRODUCT, layout=WeightLayout.BLOCKS, bias=5, module_call=True),
    "MatMulBnb4": replace(_PRODUCT, layout=WeightLayout.BNB4, module_call=True),
    "QLinearMatMul": replace(_PRODUCT, weight=3, bias_add=False, keeps_type=False),
    "Gemm": replace(_GEMM, module_call=True),
    "FusedGemm": replace(_GEMM, module_call=True),
    "GemmFloat8": replace(_GEMM, keeps_type=False),
    "QGemm": replace(_GEMM, weight=3, bias=6, bias_add=False, keeps_type=False),
    "Conv": replace(_CONV, module_call=True),
    "FusedConv": replace(_CONV, operations=operations.convolution_and_sum, module_call=True),
    "ConvTranspose": replace(
        _CONV,
        layout=WeightLayout.CONV_TRANSPOSED,
        operations=operations.transposed_convolution,
    ),
    "ConvInteger": replace(
        _CONV, weight_zero=3, bias=None, keeps_type=False, module_call=True
    ),
    "QLinearConv": replace(_CONV, weight=3, bias=8, bias_add=False, keeps_type=False),
    "NhwcFusedConv": replace(
        _CONV, axis=LAST, bias_add=False, operations=operations.convolution_and_sum
    ),
    "LayerNormalization": _LAYER_NORM,
    "RMSNormalization": _RMS_NORM,
    "SimplifiedLayerNormalization": _RMS_NORM,
    # The same of a sum: of two inputs and, at the position given, of a Linear's bias.
    "SkipLayerNormalization": replace(
        _LAYER_NORM, weight=2, bias=3, operations=operations.normalisation(7, 4)
    ),
    "SkipSimplifiedLayerNormalization": replace(
        _RMS_NORM, weight=2, operations=operations.normalisation(5, 3)
    ),
    "EmbedLayerNormalization": replace(  # of words and positions, and maybe of segments
        _LAYER_NORM, weight=5, bias=6, operations=operations.normalisation(7, 4)
    ),
    "BatchNormalization": replace(  # its four vectors are two: a multiply-add
        _CHANNEL_NORM, operations=operations.normalisation(1)
    ),
    "InstanceNormalization": _CHANNEL_NORM,
    "GroupNormalization": replace(_CHANNEL_NORM, constant=False, layout=WeightLayout.GROUPS),
    "Gather": replace(_TABLE, module_call=True),
    "GatherBlockQuantized": replace(
        _TABLE,
        layout=WeightLayout.PACKED_TABLE,
        operations=operations.quantised_table_lookup,
    ),
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "DynamicQuantizeLSTM": _RECURRENT,
}
"""The operators with weights by type; the domain does not matter."""
