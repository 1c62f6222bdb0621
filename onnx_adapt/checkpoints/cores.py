"""The node that computes a module: where a checkpoint's edit meets the graph."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnx_adapt.activations import DTYPES, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph import FLOATS, GraphView, attribute
from onnx_adapt.layers import (
    KINDS,
    bias_add,
    find_weight,
    is_layer,
    weight_width,
)
from onnx_adapt.model_file import Model, read_tensor
from onnx_adapt.modules import module_output
from onnx_adapt.norms import find_norms
from onnx_adapt.sites import Survey

_CORES = {"MatMul", "Gemm", "Conv", "Gather", "FusedMatMul", "MatMulNBits"}
_FUSED = {
    *("Attention", "MultiHeadAttention", "SkipLayerNormalization", "BiasGelu", "FastGelu"),
    *("EmbedLayerNormalization", "SkipSimplifiedLayerNormalization", "QAttention"),
    *("GroupQueryAttention", "BiasAdd", "FusedConv", "FusedGemm"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """One call of a module.

    Attributes:
        view: The graph it is in.
        node: The MatMul, Gemm, Conv or Gather.
        output: The module's output, with the bias.
    """

    view: GraphView
    node: onnx.NodeProto
    output: str

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
    def stored_in_out(self) -> bool:
        """Whether the weight is `(in, out)` at the node, the transpose of PyTorch's."""
        if self.node.op_type == "Gemm":
            return not attribute(self.node, "transB", 0)
        return self.node.op_type in ("MatMul", "FusedMatMul")


def refuse_fused(survey: Survey) -> None:
    """Refuse graphs in which ONNX Runtime's transformer fusions swallowed modules.

    Raises:
        CheckpointError: If there are such nodes.
    """
    for view in survey.index.views.values():
        for node in view.nodes:
            if node.domain == "com.microsoft" and node.op_type in _FUSED:
                raise CheckpointError(
                    f"the model was optimised for ONNX Runtime: node {node.name!r} "
                    f"({node.op_type}) stands for several modules",
                    hint="insert the adapter into the model as exported, then optimise",
                )


def find_cores(survey: Survey, module: str) -> list[Core]:
    """The calls of a module, in graph order; several if it runs several times."""
    found: list[Core] = []
    for path, view in survey.index.views.items():
        for scope, node in zip(survey.modules.scopes[path], view.nodes, strict=True):
            if scope == module and node.op_type in _CORES and is_layer(view, node):
                found.append(_core(survey, view, node))
    return found or _cores_by_name(survey, module)


def _cores_by_name(survey: Survey, module: str) -> list[Core]:
    """The layers whose stored weight or bias still has the module's name."""
    found = []
    for view in survey.index.views.values():
        for node in view.nodes:
            if node.op_type not in _CORES or not is_layer(view, node):
                continue
            core = _core(survey, view, node)
            kind = KINDS[node.op_type]
            inside = list(node.input[kind.bias : kind.bias + 1]) if kind.bias > 0 else []
            added = [n for r in view.readers(core.raw) if r.op_type == "Add" for n in r.input]
            if _weight_name(core) == f"{module}.weight" or f"{module}.bias" in inside + added:
                found.append(core)
    return found


def named_parameters(survey: Survey) -> list[str]:
    """Modules that stored tensors are named after: `X` for `X.weight` and `X.bias`."""
    names = (name for view in survey.index.views.values() for name in view.constants)
    return [
        module
        for module, _, parameter in (name.rpartition(".") for name in names)
        if parameter in ("weight", "bias") and module
    ]


def _weight_name(core: Core) -> str:
    weight = find_weight(core.view, core.weight)
    return weight.tensor.name if weight else ""


def _core(survey: Survey, view: GraphView, node: onnx.NodeProto) -> Core:
    tensor = survey.settled(view.scope.path, node.output[0])
    bias = bias_add(view, node, tensor, weight_width(view, node))
    return Core(view, node, survey.settled(view.scope.path, bias or tensor))


def cores_by_value(
    model: Model, survey: Survey, weights: Mapping[str, Array]
) -> dict[str, list[Core]]:
    """Find modules by the values of their weights, for a graph that lost its names.

    Args:
        model: The model.
        survey: Its survey.
        weights: The base's state dict.

    Returns:
        The calls of each module whose weight is found, as it is or transposed.
    """
    by_value: dict[bytes, list[Core]] = {}
    kinds: set[np.dtype[Any]] = set()
    for view in survey.index.views.values():
        for node in view.nodes:
            if node.op_type in _CORES and is_layer(view, node):
                core = _core(survey, view, node)
                weight = find_weight(core.view, core.weight)
                if weight is not None and weight.elem_type in FLOATS:
                    kinds.add(DTYPES[FLOATS[weight.elem_type]])
                by_value.setdefault(_digest(read_matrix(model, core)), []).append(core)
    matrices = {
        key.rpartition(".")[0]: array
        for key, array in weights.items()
        if key.endswith(".weight") and array.ndim >= 2
    }
    found = {module: _same(by_value, kinds, array) for module, array in matrices.items()}
    twins = {
        module: [other for other in found if found[other] is cores]
        for module, cores in found.items()
        if cores
    }
    own = {module: _of_module(found[module], twins[module], module) for module in twins}
    owners = Counter(id(core.node) for cores in own.values() for core in cores)
    return {
        module: cores
        for module, cores in own.items()
        if cores and all(owners[id(core.node)] == 1 for core in cores)
    }


def _same(
    by_value: Mapping[bytes, list[Core]], kinds: Iterable[np.dtype[Any]], array: Array
) -> list[Core]:
    """The cores with a weight's values in any precision; transposed only if none has it."""
    for turned in (array, array.T):
        for kind in kinds:
            if cores := by_value.get(_digest(turned.astype(kind))):
                return cores
    return []


def _of_module(cores: list[Core], twins: list[str], module: str) -> list[Core]:
    """Of the cores with a module's weight those of its kind; none if nobody can tell.

    A tied table is read by an embedding's Gather and by a head.
    """
    embeds = [core for core in cores if core.node.op_type == "Gather"]
    heads = [core for core in cores if core.node.op_type != "Gather"]
    if not embeds or not heads:
        return cores
    if _EMBEDDING.search(module):
        return embeds
    return heads if any(_EMBEDDING.search(twin) for twin in twins) else []


_EMBEDDING = re.compile(r"(embed\w*|wte|wpe|shared)$")


def _digest(value: Array) -> bytes:
    """The identity of a weight's values, in float32, and shape."""
    plain = np.ascontiguousarray(value, np.float32)
    return hashlib.sha256(repr(plain.shape).encode() + plain.tobytes()).digest()


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
    return (value.T if core.stored_in_out else value) * alpha


def read_bias(model: Model, core: Core) -> Array | None:
    """A bias inside a core's own node, or None."""
    position = KINDS[core.node.op_type].bias
    if position < 0 or position >= len(core.node.input) or not core.node.input[position]:
        return None
    return read_weight(model, core.view, core.node.input[position])


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
