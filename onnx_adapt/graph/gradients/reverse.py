"""Reverse mode: the gradients of a loss with respect to weights, as nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients.backward import Way, go_back, way_back
from onnx_adapt.graph.gradients.missing import refuse_missing
from onnx_adapt.graph.gradients.opsets import TARGET
from onnx_adapt.graph.gradients.table import RULES
from onnx_adapt.graph.gradients.tape import FLOAT, FLOAT16, Tape
from onnx_adapt.graph.index import GraphView, ModelIndex, default_opset


@dataclass(frozen=True, slots=True)
class Gradients:
    """The nodes that compute the gradients of a loss.

    Attributes:
        nodes: The nodes, to stand behind those of the forward graph.
        constants: Their initializers.
        grads: The tensor with the gradient of each weight, by the weight's name.
        elem_types: Their element types.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    grads: Mapping[str, str]
    elem_types: Mapping[str, int]


# Half-precision numbers below 6e-8 are 0, and gradients are often smaller: of a BERT whose
# loss was multiplied by 1e-5 all were lost. So the gradient of the output, which is there in
# float32, is multiplied by a power of two that makes its largest number about 1/16, and the
# gradients of the weights are divided by it in float32 (loss scaling, Micikevicius et al.,
# 2018, with a factor for each batch). Powers of two change no digits.

_LARGEST = -4
"""The power of two that the largest number of the output's gradient is brought to."""

_MOST = 100.0
"""The largest power of two that gradients are multiplied by."""


def differentiate(
    index: ModelIndex, loss: str, weights: Sequence[str], output: str = ""
) -> Gradients:
    """Make the nodes that compute the gradients of a loss with respect to weights.

    Args:
        index: The forward model with its loss, as `prepare` leaves it.
        loss: A tensor of the main graph with one number.
        weights: Inputs or initializers of the main graph.
        output: A tensor through which the loss depends on all weights. If it is given,
            gradients of half-precision numbers are scaled, and those of weights in float32.

    Raises:
        GradientError: If the loss does not depend on a weight, or only through steps; or if
            an operator on the way has no rule.
    """
    view, opset = index.main, default_opset(index.model.proto)
    if opset < TARGET:
        raise GradientError(
            f"{index.model.label} uses opset {opset}; gradients need {TARGET} or newer"
        )
    way = find_way(view, loss, weights)
    refuse_missing(index, loss, weights)
    tape = Tape(index.model, view, opset, rules=RULES, views=index.views)
    seed = tape.add("Expand", tape.number(1, loss), tape.shape_of(loss))
    if output and any(view.type_of(name).elem_type == FLOAT16 for name in way.reads()):
        grads = _scaled(tape, loss, seed, weights, output)
    else:
        grads = go_back(tape, {loss: seed}, weights)
    if flat := [weight for weight in weights if weight not in grads]:
        raise GradientError(
            f"{loss!r} has no gradient for {flat[0]!r}: what is behind it is made of steps",
            hint="put the slot behind the steps, nearer to the output",
        )
    kinds = {weight: tape.elem_type(grad) for weight, grad in grads.items()}
    return Gradients(tuple(tape.nodes), tuple(tape.constants.values()), grads, kinds)


def _scaled(
    tape: Tape, loss: str, seed: str, weights: Sequence[str], output: str
) -> dict[str, str]:
    """The gradients of weights in float32, by scaled ones in half precision, if there are."""
    found = go_back(tape, {loss: seed}, [output])
    if not found:
        return {}
    own = tape.cast(found[output], FLOAT)
    largest = tape.add("ReduceMax", tape.add("Abs", own), keepdims=0)
    power = tape.times(tape.add("Log", largest), -1 / math.log(2))
    power = tape.plus(tape.add("Floor", power), _LARGEST)
    limits = (tape.number(-_MOST, power), tape.number(_MOST, power))
    factor = tape.add("Pow", tape.number(2, own), tape.add("Clip", power, *limits))
    scaled = tape.cast(tape.add("Mul", own, factor), tape.elem_type(output))
    grads = go_back(tape, {output: scaled}, weights)
    return {
        weight: tape.add("Div", tape.cast(grad, FLOAT), factor)
        for weight, grad in grads.items()
    }


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
