"""Calls of a module: the nodes of the graph that compute it, and their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_adapt.checkpoints.edits import Edit, LowRank, Replacement, Scaling
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import GraphView, attribute
from onnx_adapt.graph.layers import bias_add, find_weight, layer_sizes, weight_width
from onnx_adapt.graph.modules import module_output
from onnx_adapt.graph.norms import find_norms
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.sites import Survey
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor

_FUSED = {
    *("Attention", "MultiHeadAttention", "SkipLayerNormalization", "BiasGelu", "FastGelu"),
    *("EmbedLayerNormalization", "SkipSimplifiedLayerNormalization", "QAttention"),
    *("GroupQueryAttention", "BiasAdd", "FusedConv", "FusedGemm"),
    *("PackedAttention", "PackedMultiHeadAttention", "DecoderMaskedSelfAttention"),
    *("DecoderMaskedMultiHeadAttention", "DecoderAttention", "LongformerAttention"),
    *("BiasSplitGelu", "BiasDropout", "SkipGroupNorm"),
}


# What a call of a module is, by example. PyTorch's `fc = Linear(4, 8)` is exported as
#
#     a = MatMul(x, W)     y = Add(a, fc.bias)
#
# The call of `fc` has the MatMul as `node`, `x` as `data`, `W` as `weight`, `a` as `raw` and
# `y` as `output`. LoRA adds to `y`, which other modules read; DoRA, which rescales the product
# alone, adds to `a`. W is `(4, 8)` here, the transpose of PyTorch's `(8, 4)`, so
# `stored_in_out` is true; in `Gemm(x, W, b, transB=1)` it would be false, and `raw` would be
# `output`. A module that runs twice, as ALBERT's layer does, has two calls.


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One call of a module.

    Attributes:
        view: The graph it is in.
        node: The MatMul, Gemm, Conv or Gather.
        output: The module's output, with the bias.
        span: The module's columns, where the node computes several modules side by side.
    """

    view: GraphView
    node: onnx.NodeProto
    output: str
    span: tuple[int, int] | None = None

    @property
    def data(self) -> str:
        """The tensor that the layer reads; the ids for an embedding."""
        return str(self.node.input[OPERATORS[self.node.op_type].data])

    @property
    def weight(self) -> str:
        """The name of the weight that the node reads."""
        return str(self.node.input[OPERATORS[self.node.op_type].weight])

    @property
    def raw(self) -> str:
        """The node's own output, before the bias if that is a separate Add."""
        return str(self.node.output[0])

    @property
    def sizes(self) -> tuple[int, int]:
        """The module's `(in, out)`; for an embedding `in` is the size of its vocabulary."""
        reads, computes = self._node_sizes
        return reads, computes if self.span is None else self.span[1] - self.span[0]

    def spread(self, array: Array, *, axis: int = 0, fill: float = 0) -> Array:
        """Widen an array over the module's columns to all columns that the node computes."""
        if self.span is None:
            return array
        pads = [(0, 0)] * array.ndim
        pads[axis] = self.span[0], self._node_sizes[1] - self.span[1]
        return np.pad(array, pads, constant_values=fill)

    @property
    def _node_sizes(self) -> tuple[int, int]:
        reads, computes = layer_sizes(self.view, self.node)
        return reads or 0, computes or 0

    @property
    def stored_in_out(self) -> bool:
        """Whether the weight is `(in, out)` at the node, the transpose of PyTorch's."""
        return OPERATORS[self.node.op_type].is_stored_in_out(self.node)


@dataclass(frozen=True, slots=True, eq=False)
class ParameterInput:
    """One place where a parameter enters the graph.

    Attributes:
        view: The graph.
        node: The node that reads it.
        position: Which input.
        transposed: Whether the graph has the transpose of PyTorch's layout.
    """

    view: GraphView
    node: onnx.NodeProto
    position: int
    transposed: bool

    @property
    def index(self) -> int:
        """The index of the node in its graph."""
        return next(i for i, node in enumerate(self.view.nodes) if node is self.node)

    @property
    def tensor(self) -> str:
        """The tensor that is read."""
        return str(self.node.input[self.position])


def refuse_uncalled(module: str, parameters: Iterable[str]) -> None:
    """Refuse the out_proj of torch.nn.MultiheadAttention, which PyTorch never calls.

    Args:
        module: A module that is to be adapted.
        parameters: Names of the base's weights.

    Raises:
        CheckpointError: If it is one.
    """
    parent, _, name = module.rpartition(".")
    if name == "out_proj" and any(p.startswith(f"{parent}.in_proj_") for p in parameters):
        raise CheckpointError(
            f"module {module!r} belongs to a torch.nn.MultiheadAttention, which uses its "
            "weights without calling the module: in PyTorch an adapter there has no effect",
            hint="train the adapter again without out_proj",
        )


def refuse_fused(survey: Survey, edits: Iterable[Edit]) -> None:
    """Refuse graphs in which ONNX Runtime's transformer fusions merged modules into one node.

    onnxruntime-genai's builder makes such nodes from the start, so there is no unfused model
    to insert into. It keeps every Linear a node of its own, so edits of Linears are possible.

    Raises:
        CheckpointError: If there are such nodes.
    """
    built = survey.index.model.proto.producer_name == "onnxruntime-genai"
    whole = built and all(map(_needs_linears_alone, edits))
    for view in survey.index.views.values():
        for node in view.nodes:
            fused = node.domain == "com.microsoft" and node.op_type in _FUSED
            if fused and not (whole and _keeps_linears(node)):
                raise CheckpointError(
                    f"the model was optimised for ONNX Runtime: node {node.name!r} "
                    f"({node.op_type}) stands for several modules",
                    hint="insert the adapter into the model as exported, then optimise",
                )


def _needs_linears_alone(edit: Edit) -> bool:
    """Whether an edit changes Linears or embeddings only; the builder may change norms."""
    if isinstance(edit, Replacement):
        return edit.value.ndim > 1
    return isinstance(edit, LowRank | Scaling)


def _keeps_linears(node: onnx.NodeProto) -> bool:
    """Whether a fused node contains neither a Linear nor the bias of one."""
    if node.op_type == "SkipSimplifiedLayerNormalization":
        return not any(node.input[3:4])
    return node.op_type == "GroupQueryAttention"


def call_at(survey: Survey, view: GraphView, node: onnx.NodeProto) -> LayerCall:
    """Describe the call that a node makes, with the Add of its bias."""
    tensor = survey.after_slots(view.scope.path, node.output[0])
    bias = bias_add(view, node, tensor, weight_width(view, node))
    return LayerCall(view, node, survey.after_slots(view.scope.path, bias or tensor))


def read_weight(model: Model, view: GraphView, name: str) -> Array:
    """Read a layer's weight as the layer sees it, in float64.

    Raises:
        CheckpointError: If it is not constant, or is computed by an unknown operator.
    """
    stored = view.constant(name)
    if stored is not None:
        return read_tensor(model, stored).astype(np.float64)
    made = view.producer(name)
    if made is None:
        raise CheckpointError(f"weight {name!r} is not constant")
    home, node = made
    inputs = [read_weight(model, home, item) for item in node.input if item]
    value = inputs[0]
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return np.transpose(value, order)
    if node.op_type == "DequantizeLinear":
        axis = attribute(node, "axis", 1)
        shape = [1] * value.ndim
        if inputs[1].size > 1:
            shape[axis] = inputs[1].size
        zero = inputs[2].reshape(shape) if len(inputs) > 2 else 0
        return np.asarray((value - zero) * inputs[1].reshape(shape))
    if node.op_type == "Mul":
        return np.asarray(value * inputs[1])
    if node.op_type in ("Cast", "Identity"):
        return value
    raise CheckpointError(f"weight {name!r} is computed by {node.op_type}")


def read_matrix(model: Model, call: LayerCall) -> Array:
    """Read a call's weight in PyTorch's layout: `(out, in)`, or Conv's own."""
    value = read_weight(model, call.view, call.weight)
    alpha = next((a.f for a in call.node.attribute if a.name == "alpha"), 1.0)
    matrix = (value.T if call.stored_in_out else value) * alpha
    return matrix if call.span is None else matrix[slice(*call.span)]


def read_bias(model: Model, call: LayerCall) -> Array | None:
    """Read the bias inside a call's own node; None if it has none there."""
    operator = OPERATORS[call.node.op_type]
    if operator.bias is None or not operator.has_bias(call.node):
        return None
    bias = call.node.input[operator.bias]
    if find_weight(call.view, bias) is None:
        raise CheckpointError(
            f"the bias {bias!r} of node {call.node.name!r} is computed, not stored",
            hint="fold the constants of the graph first (a simplifier does), or export with "
            "optimize=True",
        )
    return read_weight(model, call.view, bias)


_PASS_ON = {"Reshape", "Identity", "Cast", "Dropout", "Squeeze", "Unsqueeze"}


def block_output(survey: Survey, call: LayerCall, module: str) -> str:
    """Find a module's output as the rest of the model reads it, behind any Reshapes."""
    for view, tensor in module_output(survey.modules, module):
        if view is call.view and module in survey.modules.paths:
            return survey.after_slots(view.scope.path, tensor)
    tensor = call.output
    while len(readers := call.view.readers(tensor)) == 1 and readers[0].op_type in _PASS_ON:
        tensor = readers[0].output[0]
    return tensor


def residual_add(view: GraphView, tensor: str) -> tuple[str, str]:
    """Find the Add that closes the residual connection around a sub-layer.

    Returns:
        The Add's output and its other operand, the residual input.

    Raises:
        CheckpointError: If there is no such Add, or more than one.
    """
    found = [
        (str(node.output[0]), str(node.input[1 - list(node.input).index(tensor)]))
        for node in view.readers(tensor)
        if node.op_type == "Add" and list(node.input).count(tensor) == 1
        if find_weight(view, node.input[1 - list(node.input).index(tensor)]) is None
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"the residual connection after {tensor!r} was not found ({len(found)} Adds)",
            hint="was the model optimised? insert the adapter into it as exported",
        )
    return found[0]


def norm_behind(survey: Survey, view: GraphView, tensor: str) -> str:
    """Find the output of the LayerNorm that reads a residual sum.

    Raises:
        CheckpointError: If there is none, or several.
    """
    norms = find_norms(survey.index.model, view)
    found = [norm.output for norm in norms if norm.centred and norm.read == tensor]
    if len(found) != 1:
        raise CheckpointError(
            f"the residual sum {tensor!r} is read by {len(found)} LayerNorms, not by one",
            hint="was the model optimised? insert the adapter into it as exported",
        )
    return found[0]
