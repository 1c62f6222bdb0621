"""The proof of `verify --gradients`: the gradient nodes against differences in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from onnx_adapt.dtypes import FLOATS, Array
from onnx_adapt.edit.export import require_feeds
from onnx_adapt.edit.remove import remove
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients.prepare import index_for_gradients, prepare
from onnx_adapt.graph.gradients.reverse import differentiate, find_way, weights_on_way
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.graph.index import ModelIndex, default_opset, index_model
from onnx_adapt.model.file import Model
from onnx_adapt.ort import CPU
from onnx_adapt.proof.inputs import Inputs, inputs_for
from onnx_adapt.proof.result import Check
from onnx_adapt.proof.runner import Runner
from onnx_adapt.training.axes import find_axes
from onnx_adapt.training.double import DoubleLoss
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.unrounded import node_that_rounds, without_rounding
from onnx_adapt.words import count

# The loss is a fixed random combination of all numbers of the float outputs. A gradient g says
# that a small move d of a weight changes it by the sum of g * d. For two directions d, along
# the gradient and at random, this is held against the central difference
#
#     D(h) = (L(w + h d) - L(w - h d)) / (2 h)
#
# with the loss in float64. The error of D(h) falls with h ** 2, so two steps say how sharp it
# is. An example: D(0.004) = 2.0031 and D(0.001) = 2.0002. Their distance, 0.0029, is 15/16 of
# the error of the first, so the limit is 2.0002 - 0.0029 / 15 = 2.0000, and it is sharp to
# less than 0.0029. A ReLU that changes sides between the two steps shows as a large distance,
# and then smaller steps are tried. The pair is chosen by its distance alone, whatever the
# gradient says.

LOSS = "gradient-proof:loss"

BOTTLENECK = 4
"""The bottleneck of slots that have none of their own."""

STEPS = tuple(4.0**-power for power in range(4, 11))
"""How far a weight is moved, relative to its norm; each a quarter of the one before."""

_SHARP = 1e-4
"""Two steps that are as close as this are close enough."""

_LARGEST = 0.05
"""Differences that are less sharp than this say nothing."""

ROUNDING = {"float64": 1e-6, "float32": 5e-3, "float16": 0.05, "bfloat16": 0.2}
"""How far a gradient in these types may be off by rounding, relative to its size.

Along a random direction the gradient of a slot of smart-turn (400 positions, float32) was off
by 3.2e-3, and by 3e-4 along itself.
"""


@dataclass(frozen=True, slots=True)
class Slope:
    """How a loss changes along one direction of one weight.

    Attributes:
        weight: The weight.
        gradient: The change that the gradient tells, for a move of 1.
        difference: The change that differences in float64 found.
        sharpness: How sharp the difference is.
        size: What the sharpness and the distance of the two are relative to.
        rounding: How far the gradient may be off by rounding, relative to the size.
    """

    weight: str
    gradient: float
    difference: float
    sharpness: float
    size: float
    rounding: float

    @property
    def says(self) -> bool:
        """Whether the difference is sharp enough to say something."""
        return self.size > 0 and self.sharpness <= _LARGEST * self.size

    @property
    def error(self) -> float:
        """How far the two are apart, relative to the size."""
        return abs(self.gradient - self.difference) / self.size if self.size else 0.0

    @property
    def agrees(self) -> bool:
        """Whether the two are as close as they have to be."""
        return self.error * self.size <= self.sharpness + self.rounding * self.size


def check_gradient_nodes(
    adapted: Model,
    *,
    inputs: Inputs | Sequence[Inputs] | None = None,
    seed: int = 0,
    stage: Callable[[str], None] | None = None,
) -> Check:
    """Hold the gradient of each weight of each slot against differences in float64.

    Rounding of activations in a quantised model (QuantizeLinear and DequantizeLinear) is
    left out on both sides, because a loss behind it moves in steps.

    Args:
        adapted: A model with swappable slots.
        inputs: An `.npz` file or arrays by name, or several; made up if not given.
        seed: Seed of the random numbers.
        stage: Called with what is being done, before it is done.

    Returns:
        The check `gradients`.

    Raises:
        TrainingError: If the slots are baked.
        RunError: If ONNX Runtime refuses the model that computes the gradients.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("tests/cases/peft_bert_lora_default_ts/base.onnx")
        >>> adapted = oa.insert(base, after="bert.encoder.layer.1.output.dense")
        >>> check_gradient_nodes(adapted).passed
        True
    """
    tell = stage or (lambda _: None)
    model = with_defaults(adapted)
    begun = weights_to_train(model, BOTTLENECK, None, seed)
    fed = require_feeds(model)
    outputs = [
        value.name
        for value in fed.proto.graph.output
        if value.type.tensor_type.elem_type in FLOATS
    ]
    try:
        prepared = prepare(fed, outputs, list(begun))
    except GradientError as error:
        return _refused(error)
    known = find_axes(model, prepared, outputs, list(begun))
    forward, rounded = without_rounding(prepared)
    index = index_for_gradients(_with_functional(forward), LOSS, list(begun), known)
    moving = weights_on_way(index.main, LOSS, list(begun))
    if not moving:
        return Check("gradients", False, "no output depends on a slot")
    if node := node_that_rounds(find_way(index.main, LOSS, moving)):
        what = f"{node.op_type} {node.name or node.output[0]!r}"
        return Check(
            "gradients", False, f"cannot be shown: {what} rounds, so outputs move in steps"
        )
    tell("building the gradients")
    try:
        proof = _Proof(forward, index, begun, moving, seed)
    except GradientError as error:
        return _refused(error)
    slopes: list[Slope] = []
    feeds = inputs_for(remove(adapted), inputs, seed)
    for number, item in enumerate(feeds, 1):
        tell(f"comparing gradients with differences, inputs {number} of {len(feeds)}")
        slopes += proof.slopes(item)
    return _judge(slopes, list(begun), rounded)


def _refused(error: GradientError) -> Check:
    return Check("gradients", False, " ".join(filter(None, (error.message, error.hint))))


def _judge(slopes: Sequence[Slope], weights: Sequence[str], rounded: int) -> Check:
    telling = [slope for slope in slopes if slope.says]
    # The negation lets a NaN fail.
    wrong = [slope for slope in slopes if not np.isfinite(slope.error)]
    wrong += [slope for slope in telling if not slope.agrees]
    shown = {slope.weight for slope in telling}
    if wrong:
        bad = wrong[0]
        detail = (
            f"the gradient of {bad.weight!r} says {bad.gradient:.4g}, and differences in "
            f"float64 {bad.difference:.4g}"
        )
        return Check("gradients", False, detail)
    if not telling:
        return Check("gradients", False, "nothing was shown: the outputs do not move smoothly")
    worst = max(slope.error for slope in telling)
    detail = f"{count(len(shown), 'weight')} within {worst:.1e} of differences in float64"
    if rounded:
        detail += f"; {count(rounded, 'rounding')} of activations left out"
    warnings = tuple(
        f"the gradient of {name!r} was not shown with these inputs"
        for name in weights
        if name not in shown
    )
    return Check("gradients", True, detail, warnings)


def _factors(output: str) -> str:
    return f"gradient-proof:{output}"


def _float_outputs(model: Model) -> list[str]:
    found = model.proto.graph.output
    return [value.name for value in found if value.type.tensor_type.elem_type in FLOATS]


def _with_functional(model: Model) -> Model:
    """Add the loss: all numbers of the float outputs, each times a number that is fed."""
    result = model.copy()
    graph = result.proto.graph
    single = onnx.TensorProto.FLOAT
    view = index_model(result).main
    tape = Tape(result, view, default_opset(result.proto), prefix="proof:")
    terms = []
    for name in _float_outputs(result):
        shape = tape.shape(name)
        graph.input.append(helper.make_tensor_value_info(_factors(name), single, shape))
        tape.elem_types[_factors(name)] = single
        weighted = tape.add("Mul", tape.cast(name, single), _factors(name))
        total = tape.add("ReduceSum", weighted, keepdims=0)
        terms.append(tape.add("Reshape", total, tape.constant(np.zeros(0, np.int64))))
    loss = helper.make_node("Sum", terms, [LOSS], LOSS)
    graph.node.extend([*tape.nodes, loss] if terms else [])
    graph.initializer.extend(tape.constants.values())
    return result


class _Proof:
    """The runs of one proof: a model of the gradients, and one of the loss in float64."""

    def __init__(
        self,
        forward: Model,
        index: ModelIndex,
        begun: Mapping[str, Array],
        moving: Sequence[str],
        seed: int,
    ) -> None:
        self.index, self.moving = index, moving
        self.outputs = _float_outputs(forward)
        self.rng = np.random.default_rng(seed)
        self.weights = {name: _moved(value, self.rng) for name, value in begun.items()}
        found = differentiate(index, LOSS, moving)
        self.grads = {name: found.grads[name] for name in moving}
        self.forward = Runner(forward, CPU, optimised=True, fuse_quantised=False)
        backward = self._with_gradients(index, found.nodes, found.constants)
        self.gradient = Runner(backward, CPU, optimised=True, fuse_quantised=False)

    def _with_gradients(
        self,
        index: ModelIndex,
        nodes: Sequence[onnx.NodeProto],
        constants: Sequence[onnx.TensorProto],
    ) -> Model:
        result = index.model.copy()
        graph = result.proto.graph
        graph.node.extend(nodes)
        graph.initializer.extend(constants)
        for name, made in self.grads.items():
            kind = index.main.type_of(name).elem_type
            graph.output.append(helper.make_tensor_value_info(made, kind, None))
        return result

    def slopes(self, feeds: Mapping[str, Array]) -> list[Slope]:
        """Both sides for two directions of each weight, with one set of inputs."""
        fed = {**feeds, **self.weights}
        values = self.forward.run(fed)
        for name in self.outputs:
            factors = self.rng.standard_normal(np.shape(values[name]))
            fed[_factors(name)] = (factors / max(1, factors.size) ** 0.5).astype(np.float32)
        grads = self.gradient.run(fed, list(self.grads.values()))
        loss = DoubleLoss(self.index.model, LOSS, self.moving, fed)
        return [
            self._slope(loss, name, grads[made].astype(np.float64), direction)
            for name, made in self.grads.items()
            for direction in self._directions(grads[made])
        ]

    def _directions(self, grad: Array) -> list[Array]:
        """Along the gradient and at random, both of length 1."""
        given = (grad.astype(np.float64), self.rng.standard_normal(grad.shape))
        return [np.asarray(item / np.linalg.norm(item)) for item in given if np.any(item)]

    def _slope(self, loss: DoubleLoss, name: str, grad: Array, direction: Array) -> Slope:
        """The slope along one direction by the gradient and by differences."""
        weight = loss.weight(name)
        length = max(float(np.linalg.norm(weight)), 1e-3)
        expected = float(np.vdot(grad, direction))
        usual = float(np.linalg.norm(grad)) / max(1, grad.size) ** 0.5
        best = (np.inf, 0.0)
        before = None
        for step in STEPS:
            move = step * length * direction
            up, down = (loss.at(name, weight + s * move) for s in (1, -1))
            now = (up - down) / (2 * step * length)
            if before is not None:
                best = min(best, (abs(now - before), now + (now - before) / 15))
                if best[0] <= _SHARP * max(abs(now), usual):
                    break
            before = now
        size = max(abs(expected), abs(best[1]), usual)
        rounding = ROUNDING[FLOATS[self._elem_type(name)]]
        return Slope(name, expected, best[1], best[0], size, rounding)

    def _elem_type(self, name: str) -> int:
        return int(helper.np_dtype_to_tensor_dtype(self.weights[name].dtype))


def _moved(value: Array, rng: np.random.Generator) -> Array:
    """A weight with random numbers added, large enough that the slot has an effect."""
    scale = max(float(np.abs(value).mean()), max(value.shape, default=1) ** -0.5)
    return np.asarray(value + scale * rng.standard_normal(value.shape)).astype(value.dtype)
