"""A whole training step as one ONNX model, for programs that train without Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.errors import TrainingError
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.graph.index import default_opset, index_model
from onnx_adapt.model.file import Model
from onnx_adapt.training.optimiser_nodes import clipped, updated
from onnx_adapt.training.optimisers import Optimiser, require_rule
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_model import LossFunction, StepModel, make_step

FLOAT = onnx.TensorProto.FLOAT

RATE = "rate"
"""The input of a training step that takes the learning rate."""

STEP = "step"
"""The input that counts the steps that were taken before."""

NEXT = "next:"
"""What the name of an output begins with that is the next value of an input."""

MASTER = "master:"
"""What the name of a weight begins with that the model has in another type than float32."""


@dataclass(frozen=True, slots=True)
class StepFile:
    """A training step as a model, and what to feed to the first.

    Attributes:
        model: The step. Its inputs are those of the base, the labels, the rate and what is
            carried from step to step; its outputs are the loss, the output that the loss is
            on, and the next values of what is carried, under the name of the input with
            `next:` before it.
        start: A model without inputs, whose outputs are the first values of what is carried.
        inputs: The inputs of the base.
        carried: The names of what is carried: the weights, the memory of the optimiser, and
            the number of steps.
        output: The output that the loss is on.
    """

    model: Model
    start: onnx.ModelProto
    inputs: tuple[str, ...]
    carried: tuple[str, ...]
    output: str


def train_graph(
    model: Model,
    *,
    loss: str | LossFunction,
    output: str = "",
    loss_settings: Mapping[str, object] | None = None,
    optimiser: Optimiser | None = None,
    bottleneck: int = 16,
    start_from: Adapter | None = None,
    seed: int = 0,
) -> StepFile:
    """Make a model of which each run takes one step of training.

    Stock ONNX Runtime runs it, from C++, JavaScript or on a phone. A weight has the name of
    the input that takes it in the adapted model.

    Args:
        model: A model with swappable slots.
        loss: A name in `onnx_adapt.training.losses.LOSSES`, or a function that adds its nodes.
        output: The output that the loss is on; by default the only float output.
        loss_settings: Settings of the loss.
        optimiser: The optimiser; by default AdamW.
        bottleneck: The bottleneck of slots that have none of their own.
        start_from: An adapter to go on from.
        seed: Seed of the first weights.

    Raises:
        TrainingError: If the loss, the output or the optimiser is unknown, or the model has
            tensors of these names.
        GradientError: If the model cannot be differentiated.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("tests/cases/peft_bert_lora_default_ts/base.onnx")
        >>> adapted = oa.insert(base, after="bert.encoder.layer.1.output.dense")
        >>> step = train_graph(adapted, loss="cross_entropy", optimiser=Optimiser("sgd"))
        >>> step.carried[0]
        'adapter.bert.encoder.layer.1.output.dense.down'
        >>> [value.name for value in step.model.proto.graph.output][:2]
        ['loss', 'logits']
    """
    optimiser = optimiser or Optimiser()
    require_rule(optimiser.name)
    model = with_defaults(model)
    begun = weights_to_train(model, bottleneck, start_from, seed)
    step = make_step(model, list(begun), loss=loss, output=output, settings=loss_settings)
    result = step.model.copy()
    graph = result.proto.graph
    view = index_model(result).main
    tape = Tape(result, view, default_opset(result.proto), prefix="optimiser:")
    _require_free(step, begun)
    carried = _Carried(tape, result, optimiser)
    after = carried.step(step, begun)
    graph.node.extend(tape.nodes)
    graph.initializer.extend(tape.constants.values())
    shown = {value.name: value for value in graph.output}
    outputs = [shown[step.loss], shown[step.output]]
    del graph.output[:], result.proto.metadata_props[:]
    graph.output.extend(outputs)
    for name, made in after.items():
        graph.node.append(
            helper.make_node("Identity", [made], [f"{NEXT}{name}"], f"{NEXT}{name}")
        )
        kind = helper.make_tensor_value_info(f"{NEXT}{name}", FLOAT, carried.shapes[name])
        graph.output.append(kind)
    start = _start(carried.first, result.proto)
    return StepFile(result, start, tuple(step.inputs), tuple(after), step.output)


def _require_free(step: StepModel, begun: Mapping[str, Array]) -> None:
    """Refuse a base that has tensors of the names that are needed."""
    graph = step.model.proto.graph
    taken = {name for node in graph.node for name in node.output}
    taken |= {value.name for value in graph.input} | {item.name for item in graph.initializer}
    wanted = {RATE, STEP, *(f"{NEXT}{name}" for name in begun)}
    if found := sorted(taken & wanted):
        raise TrainingError(f"{step.model.label} has a tensor {found[0]!r} of its own")


class _Carried:
    """What is carried from step to step, while the nodes of a step are added.

    Attributes:
        first: The first value of each, by the name of its input.
        shapes: The shape of each in the model.
    """

    def __init__(self, tape: Tape, model: Model, optimiser: Optimiser) -> None:
        self.tape, self.graph, self.optimiser = tape, model.proto.graph, optimiser
        self.first: dict[str, Array] = {}
        self.shapes: dict[str, tuple[int | str | None, ...]] = {}

    def step(self, step: StepModel, begun: Mapping[str, Array]) -> dict[str, str]:
        """Add the nodes of one step; the next value of each input that is carried."""
        tape, optimiser = self.tape, self.optimiser
        after: dict[str, str] = {}
        grads = [tape.cast(made, FLOAT) for made in step.grads.values()]
        grads = clipped(tape, grads, optimiser.clip)
        inputs = {name: self._weight(name, value) for name, value in begun.items()}
        count = tape.plus(self._add_input(STEP, np.zeros((), np.float32), ()), 1)
        rate = self._add_input(RATE, None, ())
        for (name, weight), grad in zip(inputs.items(), grads, strict=True):
            value = self.first[weight]
            memory = {
                part: self._add_input(
                    f"{part}:{name}", np.zeros_like(value), self.shapes[weight]
                )
                for part in optimiser.rule.memory
            }
            after[weight], kept = updated(
                *(tape, optimiser, weight, grad, memory),
                count=count,
                rate=rate,
                decays=value.ndim > 1,
            )
            after |= {memory[part]: made for part, made in kept.items()}
        return after | {STEP: count}

    def _weight(self, name: str, value: Array) -> str:
        """The input with a weight in float32; the slot reads it in its own type."""
        tape = self.tape
        shape = tape.shape(name)
        self.shapes[name], self.first[name] = shape, value.astype(np.float32)
        if value.dtype == np.float32:
            return name
        declared = next(item for item in self.graph.input if item.name == name)
        self.graph.input.remove(declared)
        single = self._add_input(f"{MASTER}{name}", self.first.pop(name), shape)
        elem_type = int(helper.np_dtype_to_tensor_dtype(value.dtype))
        cast = helper.make_node("Cast", [single], [name], single, to=elem_type)
        self.graph.node.insert(0, cast)
        return single

    def _add_input(
        self, name: str, value: Array | None, shape: tuple[int | str | None, ...]
    ) -> str:
        self.graph.input.append(helper.make_tensor_value_info(name, FLOAT, shape))
        self.tape.elem_types[name] = FLOAT
        if value is not None:
            self.first[name], self.shapes[name] = value, shape
        return name


def _start(first: Mapping[str, Array], step: onnx.ModelProto) -> onnx.ModelProto:
    """A model without inputs that gives these values; zeros take no room in it."""
    nodes, stored, outputs = [], [], []
    for number, (name, value) in enumerate(first.items()):
        outputs.append(helper.make_tensor_value_info(name, FLOAT, value.shape))
        source = f"value:{number}"
        if value.any():
            stored.append(numpy_helper.from_array(value, source))
            nodes.append(helper.make_node("Identity", [source], [name], name))
        else:
            stored.append(numpy_helper.from_array(np.array(value.shape, np.int64), source))
            nodes.append(helper.make_node("ConstantOfShape", [source], [name], name))
    graph = helper.make_graph(nodes, "start", [], outputs, stored)
    opsets = [helper.make_opsetid("", default_opset(step))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=step.ir_version)
