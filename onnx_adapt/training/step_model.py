"""The step model: an adapted model with a loss and the gradients of what trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.edit.export import require_feeds
from onnx_adapt.errors import TrainingError
from onnx_adapt.graph.gradients.prepare import index_for_gradients, prepare
from onnx_adapt.graph.gradients.reverse import differentiate
from onnx_adapt.graph.gradients.tape import INT64, Tape
from onnx_adapt.graph.index import default_opset, index_model
from onnx_adapt.model.file import Model
from onnx_adapt.training.axes import find_axes
from onnx_adapt.training.data import Dataset
from onnx_adapt.training.losses import FLOAT, IGNORED, LOSSES, Settings, settings_of

LABELS = "labels"
"""The input of a step model that takes the labels."""

LOSS = "loss"
"""The output of a step model that is the loss."""

LossFunction = Callable[[Tape, str, str], str]
"""A loss of one's own: adds nodes behind an output, given the labels, to one number."""


@dataclass(frozen=True, slots=True)
class StepModel:
    """A model that computes a loss and its gradients in one run.

    Attributes:
        model: The model. Its inputs are the base's, the weights that train, and the labels.
        loss: The output with the loss, `()`.
        output: The output of the base that the loss is on.
        grads: The output with the gradient of each weight, by the weight's name.
        labels: The input with the labels.
        label_axes: How many axes the labels have.
        classes: How many classes there are; 0 if it is not known, or labels are no classes.
    """

    model: Model
    loss: str
    output: str
    grads: Mapping[str, str]
    labels: str
    label_axes: int
    classes: int


def make_step(
    model: Model,
    weights: Sequence[str],
    *,
    loss: str | LossFunction,
    output: str = "",
    settings: Settings | None = None,
) -> StepModel:
    """Make the step model of an adapted model.

    Args:
        model: A model with swappable slots.
        weights: The inputs to differentiate for: weights of slots, and replaceable ones.
        loss: A name in `LOSSES`, or a function that adds the loss's nodes.
        output: The output that the loss is on; by default the only float output.
        settings: Settings of the loss.

    Raises:
        TrainingError: If the loss or output is unknown.
        GradientError: If the graph cannot be differentiated.
    """
    chosen = choose_output(model, output)
    result = prepare(require_feeds(model), [chosen], weights)
    known = find_axes(model, result, chosen, weights)
    _add_loss(result, chosen, loss, settings or {})
    index = index_for_gradients(result, LOSS, weights, known)
    found = differentiate(index, LOSS, weights)
    graph = result.proto.graph
    graph.node.extend(found.nodes)
    graph.initializer.extend(found.constants)
    graph.output.append(helper.make_tensor_value_info(LOSS, FLOAT, []))
    for weight in weights:
        kind = index.main.type_of(weight).elem_type
        graph.output.append(helper.make_tensor_value_info(found.grads[weight], kind, None))
    row = LOSSES.get(loss) if isinstance(loss, str) else None
    shape = index.main.type_of(chosen).shape or ()
    axes = len(shape) - (row.fewer_axes if row is not None else 0)
    last = shape[-1] if shape else None
    counted = loss == "cross_entropy" and isinstance(last, int)
    classes = int(last) if counted and last is not None else 0
    return StepModel(result, LOSS, chosen, found.grads, LABELS, axes, classes)


def check_labels(step: StepModel, data: Dataset) -> None:
    """Check that labels are what the loss of a step model takes.

    Raises:
        TrainingError: If they have another number of axes, or there is no such class.
    """
    labels = data.labels
    if labels.ndim != step.label_axes:
        raise TrainingError(
            f"the labels of {data.label} have {labels.ndim} axes, {list(labels.shape)}; for "
            f"output {step.output!r} this loss takes {step.label_axes}",
            hint="the first axis is that of the samples",
        )
    if step.classes:
        counted = labels[labels != IGNORED]
        if counted.size and not 0 <= counted.min() <= counted.max() < step.classes:
            raise TrainingError(
                f"the labels of {data.label} are {counted.min()} to {counted.max()}, and "
                f"output {step.output!r} has the classes 0 to {step.classes - 1}",
                hint=f"{IGNORED} is the label of what does not count",
            )


def choose_output(model: Model, output: str) -> str:
    """The output that a loss is on: the one named, or the only one with floats.

    Raises:
        TrainingError: If there is no such output, or none or several to choose from.
    """
    outputs = {
        value.name: value.type.tensor_type.elem_type for value in model.proto.graph.output
    }
    floats = [name for name, kind in outputs.items() if kind in FLOATS]
    if output:
        if output not in outputs:
            raise TrainingError(
                f"{model.label} has no output {output!r}",
                hint=f"its outputs are {', '.join(outputs)}",
            )
        if output not in floats:
            raise TrainingError(f"output {output!r} of {model.label} has no floats")
        return output
    if len(floats) != 1:
        raise TrainingError(
            f"{model.label} has {len(floats)} outputs with floats",
            hint=f"say which the loss is on: {', '.join(floats) or 'it has none'}",
        )
    return str(floats[0])


def _add_loss(model: Model, output: str, loss: str | LossFunction, settings: Settings) -> None:
    """Add the labels as an input, and the nodes of a loss in float32."""
    view = index_model(model).main
    if LABELS in {*view.inferred, *view.producers} or LOSS in view.producers:
        raise TrainingError(f"{model.label} has a tensor {LABELS!r} or {LOSS!r} of its own")
    tape = Tape(model, view, default_opset(model.proto), prefix="loss:")
    row = LOSSES.get(loss) if isinstance(loss, str) else None
    integers = row is not None and row.integers
    axes = tape.rank(output) - (row.fewer_axes if row is not None else 0)
    tape.elem_types[LABELS] = INT64 if integers else FLOAT
    dims = [f"{LABELS}_{axis}" for axis in range(axes)]
    declared = helper.make_tensor_value_info(LABELS, tape.elem_types[LABELS], dims)
    logits = tape.cast(output, FLOAT)
    if isinstance(loss, str):
        chosen = settings_of(loss, settings)
        made = LOSSES[loss].emit(tape, logits, LABELS, chosen)
    else:
        made = loss(tape, logits, LABELS)
    single = tape.add("Reshape", made, tape.constant(_NO_AXES))
    graph = model.proto.graph
    graph.input.append(declared)
    graph.node.extend([*tape.nodes, helper.make_node("Identity", [single], [LOSS], LOSS)])
    graph.initializer.extend(tape.constants.values())


_NO_AXES = np.zeros(0, np.int64)
"""The shape of a single number."""
