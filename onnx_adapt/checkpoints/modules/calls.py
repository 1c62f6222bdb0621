"""Calls of a module: the nodes of the graph that compute it, and their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.graph.modules import module_output
from onnx_adapt.graph.norms import find_norms
from onnx_adapt.graph.sites import Survey
from onnx_adapt.slot.manifest import slot_of


@dataclass(frozen=True, slots=True, eq=False)
class ParameterInput:
    """One place where a parameter enters the graph.

    Attributes:
        view: The graph.
        node: The node that reads it.
        position: Which input.
        transposed: Whether the graph has the transpose of PyTorch's layout.
        added: What the graph's value has more than PyTorch's: 1 where it has the sum that a
            normalisation such as Gemma's multiplies by, `1 + weight`.
    """

    view: GraphView
    node: onnx.NodeProto
    position: int
    transposed: bool
    added: float = 0.0

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
    if is_attention_projection(module, parameters):
        raise CheckpointError(
            f"module {module!r} belongs to a torch.nn.MultiheadAttention, which uses its "
            "weights without calling the module: in PyTorch an adapter there has no effect",
            hint="train the adapter again without out_proj",
        )


def is_attention_projection(module: str, parameters: Iterable[str]) -> bool:
    """Whether a module may be the out_proj of a torch.nn.MultiheadAttention.

    Args:
        module: The module.
        parameters: Names of the base's weights.
    """
    parent, _, name = module.rpartition(".")
    return name == "out_proj" and any(p.startswith(f"{parent}.in_proj_") for p in parameters)


_PASS_ON = {"Reshape", "Identity", "Cast", "Dropout", "Squeeze", "Unsqueeze"}


def block_output(survey: Survey, call: LayerCall, module: str) -> str:
    """Find a module's output as the rest of the model reads it, behind any Reshapes."""
    for view, tensor in module_output(survey.modules, module):
        if view is call.view and module in survey.modules.paths:
            return survey.after_slots(view.scope.path, tensor)
    return moved_output(survey, call.view, call.output)


def moved_output(survey: Survey, view: GraphView, tensor: str) -> str:
    """Follow a tensor through Reshapes and the like, as long as nothing else reads it."""
    while len(readers := _base_readers(view, tensor)) == 1 and readers[0].op_type in _PASS_ON:
        tensor = survey.after_slots(view.scope.path, str(readers[0].output[0]))
    return tensor


def _base_readers(view: GraphView, tensor: str) -> list[onnx.NodeProto]:
    """The nodes of the base that read a tensor; those of slots are not among them."""
    return [node for node in view.readers(tensor) if not slot_of(node)]


def residual_add(survey: Survey, view: GraphView, tensor: str) -> tuple[str, str]:
    """Find the Add that closes the residual connection around a sub-layer.

    Returns:
        The Add's output behind the slots that are on it, and its other operand, the
        residual input.

    Raises:
        CheckpointError: If there is no such Add, or more than one.
    """
    found = [
        (
            survey.after_slots(view.scope.path, str(node.output[0])),
            str(node.input[1 - list(node.input).index(tensor)]),
        )
        for node in _base_readers(view, tensor)
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
