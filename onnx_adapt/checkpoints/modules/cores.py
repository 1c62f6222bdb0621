"""The node that computes a module: where a checkpoint's edit meets the graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_adapt.checkpoints.edits import Edit, LowRank, Replacement, Scaling
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import GraphView, attribute
from onnx_adapt.graph.layers import KINDS, bias_add, find_weight, weight_width
from onnx_adapt.graph.modules import module_output
from onnx_adapt.graph.norms import find_norms
from onnx_adapt.graph.sites import Survey
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor

CORES = {"MatMul", "Gemm", "Conv", "Gather", "FusedMatMul", "MatMulNBits"}
"""Operators that can be the call of a module."""

_FUSED = {
    *("Attention", "MultiHeadAttention", "SkipLayerNormalization", "BiasGelu", "FastGelu"),
    *("EmbedLayerNormalization", "SkipSimplifiedLayerNormalization", "QAttention"),
    *("GroupQueryAttention", "BiasAdd", "FusedConv", "FusedGemm"),
    *("PackedAttention", "PackedMultiHeadAttention", "DecoderMaskedSelfAttention"),
    *("DecoderMaskedMultiHeadAttention", "DecoderAttention", "LongformerAttention"),
    *("BiasSplitGelu", "BiasDropout", "SkipGroupNorm"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Core:
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
        """The tensor the layer reads: for an embedding the ids."""
        return str(self.node.input[1 if self.node.op_type == "Gather" else 0])

    @property
    def weight(self) -> str:
        """The input that is the weight."""
        return str(self.node.input[KINDS[self.node.op_type].weight])

    @property
    def raw(self) -> str:
        """The node's own output: without the bias where that is a separate Add."""
        return str(self.node.output[0])

    @property
    def sizes(self) -> tuple[int, int]:
        """The width of its input and output; an embedding reads its vocabulary."""
        reads, computes = self._node_sizes
        return reads, computes if self.span is None else self.span[1] - self.span[0]

    def spread(self, array: Array, *, axis: int = 0, fill: float = 0) -> Array:
        """An array over the module's columns as one over all that the node computes."""
        if self.span is None:
            return array
        pads = [(0, 0)] * array.ndim
        pads[axis] = self.span[0], self._node_sizes[1] - self.span[1]
        return np.pad(array, pads, constant_values=fill)

    @property
    def _node_sizes(self) -> tuple[int, int]:
        weight = find_weight(self.view, self.weight)
        dims = weight.dims if weight else ()
        if self.node.op_type == "MatMulNBits":
            dims = (attribute(self.node, "K", 0), attribute(self.node, "N", 0))
        elif self.node.op_type == "Conv" and dims:
            dims = (dims[1] * attribute(self.node, "group", 1), dims[0])
        elif self.node.op_type != "Gather" and not self.stored_in_out:
            dims = dims[::-1]
        return (dims[0], dims[1]) if len(dims) == 2 else (0, 0)

    @property
    def stored_in_out(self) -> bool:
        """Whether the weight is `(in, out)` at the node, the transpose of PyTorch's."""
        if self.node.op_type == "Gemm":
            return not attribute(self.node, "transB", 0)
        return self.node.op_type in ("MatMul", "FusedMatMul")


@dataclass(frozen=True, slots=True, eq=False)
class Use:
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
        """The node's place in its graph."""
        return next(i for i, node in enumerate(self.view.nodes) if node is self.node)

    @property
    def tensor(self) -> str:
        """The tensor that is read."""
        return str(self.node.input[self.position])


def refuse_uncalled(module: str, parameters: Iterable[str]) -> None:
    """Refuse the out_proj of torch.nn.MultiheadAttention, which only lends its weights.

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
    """Refuse graphs in which ONNX Runtime's transformer fusions swallowed modules.

    onnxruntime-genai's builder makes such nodes from the start, so that there is no model
    to insert into before; it keeps the Linears whole, for edits that need nothing else.

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
    """Whether an edit changes a Linear, or an embedding; the builder may change norms."""
    if isinstance(edit, Replacement):
        return edit.value.ndim > 1
    return isinstance(edit, LowRank | Scaling)


def _keeps_linears(node: onnx.NodeProto) -> bool:
    """Whether a fused node has taken in no Linear, nor the bias of one."""
    if node.op_type == "SkipSimplifiedLayerNormalization":
        return not any(node.input[3:4])
    return node.op_type == "GroupQueryAttention"


def core_at(survey: Survey, view: GraphView, node: onnx.NodeProto) -> Core:
    """The call that a node is, with the Add of its bias."""
    tensor = survey.settled(view.scope.path, node.output[0])
    bias = bias_add(view, node, tensor, weight_width(view, node))
    return Core(view, node, survey.settled(view.scope.path, bias or tensor))


def read_weight(model: Model, view: GraphView, name: str) -> Array:
    """The value of a layer's weight as the layer sees it, in float64.

    Raises:
        CheckpointError: If it is not constant, or behind an operator not known here.
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


def read_matrix(model: Model, core: Core) -> Array:
    """A core's weight in PyTorch's layout: `(out, in)`, or Conv's own."""
    value = read_weight(model, core.view, core.weight)
    alpha = next((a.f for a in core.node.attribute if a.name == "alpha"), 1.0)
    matrix = (value.T if core.stored_in_out else value) * alpha
    return matrix if core.span is None else matrix[slice(*core.span)]


def read_bias(model: Model, core: Core) -> Array | None:
    """A bias inside a core's own node, or None."""
    position = KINDS[core.node.op_type].bias
    if position < 0 or position >= len(core.node.input) or not core.node.input[position]:
        return None
    bias = core.node.input[position]
    if find_weight(core.view, bias) is None:
        raise CheckpointError(
            f"the bias {bias!r} of node {core.node.name!r} is computed, not stored",
            hint="fold the constants of the graph first (a simplifier does), or export with "
            "optimize=True",
        )
    return read_weight(model, core.view, bias)


_PASS_ON = {"Reshape", "Identity", "Cast", "Dropout", "Squeeze", "Unsqueeze"}


def block_output(survey: Survey, core: Core, module: str) -> str:
    """A module's output as the rest of the model sees it (behind Reshapes)."""
    for view, tensor in module_output(survey.modules, module):
        if view is core.view and module in survey.modules.paths:
            return survey.settled(view.scope.path, tensor)
    tensor = core.output
    while len(readers := core.view.readers(tensor)) == 1 and readers[0].op_type in _PASS_ON:
        tensor = readers[0].output[0]
    return tensor


def residual_add(view: GraphView, tensor: str) -> tuple[str, str]:
    """The Add that closes the residual around a sub-layer.

    Returns:
        The Add's output and its other operand, the residual input.

    Raises:
        CheckpointError: If there is no such Add, or not only one.
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
    """The output of the LayerNorm that reads a residual sum.

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
