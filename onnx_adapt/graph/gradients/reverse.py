"""Reverse mode: the gradients of a loss with respect to weights, as nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients.backward import Way, go_back, way_back
from onnx_adapt.graph.gradients.missing import refuse_missing
from onnx_adapt.graph.gradients.opsets import TARGET
from onnx_adapt.graph.gradients.table import RULES
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.graph.index import GraphView, ModelIndex, default_opset


@dataclass(frozen=True, slots=True)
class Gradients:
    """The nodes that compute the gradients of a loss.

    Attributes:
        nodes: The nodes, to stand behind those of the forward graph.
        constants: Their initializers.
        grads: The tensor with the gradient of each weight, by the weight's name.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    grads: Mapping[str, str]


def differentiate(index: ModelIndex, loss: str, weights: Sequence[str]) -> Gradients:
    """Make the nodes that compute the gradients of a loss with respect to weights.

    Args:
        index: The forward model with its loss, as `prepare` leaves it.
        loss: A tensor of the main graph with one number.
        weights: Inputs or initializers of the main graph.

    Raises:
        GradientError: If the loss does not depend on a weight, or an operator on the way
            has no rule.
    """
    view, opset = index.main, default_opset(index.model.proto)
    if opset < TARGET:
        raise GradientError(
            f"{index.model.label} uses opset {opset}; gradients need {TARGET} or newer"
        )
    find_way(view, loss, weights)
    refuse_missing(index, loss, weights)
    tape = Tape(index.model, view, opset, rules=RULES, views=index.views)
    seed = tape.add("Expand", tape.number(1, loss), tape.shape_of(loss))
    grads = go_back(tape, {loss: seed}, weights)
    return Gradients(tuple(tape.nodes), tuple(tape.constants.values()), grads)


def find_way(view: GraphView, loss: str, weights: Sequence[str]) -> Way:
    """Find the nodes between weights and a loss.

    Raises:
        GradientError: If the loss does not depend on one of the weights.
    """
    way = way_back(view, [loss], weights)
    read = way.reads()
    if idle := [weight for weight in weights if weight not in read]:
        raise GradientError(
            f"{loss!r} does not depend on {idle[0]!r}, so it cannot be trained with it",
            hint="train only the slots that the output depends on",
        )
    return way


def weights_on_way(view: GraphView, loss: str, weights: Sequence[str]) -> list[str]:
    """The weights that a loss depends on."""
    read = way_back(view, [loss], weights).reads()
    return [weight for weight in weights if weight in read]
