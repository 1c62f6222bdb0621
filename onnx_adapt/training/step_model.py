"""The step model: an adapted model with a loss and the gradients of what trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import helper

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.edit.export import require_feeds
from onnx_adapt.errors import TrainingError
from onnx_adapt.graph.gradients.prepare import index_for_gradients, prepare
from onnx_adapt.graph.gradients.reverse import differentiate
from onnx_adapt.graph.gradients.tape import INT64, Tape
from onnx_adapt.graph.index import Shape, default_opset, index_model
from onnx_adapt.model.file import Model
from onnx_adapt.slot.manifest import read_manifest
from onnx_adapt.training.axes import find_axes
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
        label_shape: The shape of the labels, as far as it is known.
        integers: Whether the labels are integers.
        classes: How many classes there are; 0 if it is not known, or labels are no classes.
        ignored: The label of what does not count.
        shift: Whether each position is held against the label of the next one.
        paired: Whether the loss compares samples of one label with each other.
        rows: How many rows the base takes in a run; 0 if any number of them.
    """

    model: Model
    loss: str
    output: str
    grads: Mapping[str, str]
    labels: str
    label_shape: Shape
    integers: bool = False
    classes: int = 0
    ignored: int = IGNORED
    shift: bool = False
    paired: bool = False
    rows: int = 0

    @property
    def inputs(self) -> list[str]:
        """The inputs of the base."""
        own = {*self.grads, self.labels}
        names = [value.name for value in self.model.proto.graph.input]
        stored = {tensor.name for tensor in self.model.proto.graph.initializer}
        return [name for name in names if name not in own | stored]


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
    known = find_axes(model, result, [chosen], weights)
    add_loss(result, chosen, loss, settings or {})
    index = index_for_gradients(result, LOSS, weights, known)
    found = differentiate(index, LOSS, weights, chosen)
    graph = result.proto.graph
    graph.node.extend(found.nodes)
    graph.initializer.extend(found.constants)
    graph.output.append(helper.make_tensor_value_info(LOSS, FLOAT, []))
    for weight in weights:
        grad, kind = found.grads[weight], found.elem_types[weight]
        graph.output.append(helper.make_tensor_value_info(grad, kind, None))
    shape = index.main.type_of(chosen).shape or ()
    made = StepModel(result, LOSS, chosen, found.grads, LABELS, shape)
    return with_labels(made, loss, settings or {})


def with_labels(step: StepModel, loss: str | LossFunction, settings: Settings) -> StepModel:
    """A step model with what is known of its rows, and of the labels of its loss.

    Args:
        step: A step model whose labels have the shape of its output.
        loss: The loss.
        settings: Its settings.

    Raises:
        TrainingError: If the loss or a setting is unknown, or does not fit the output.
    """
    step, shape = replace(step, rows=_fixed_rows(step)), step.label_shape
    if not isinstance(loss, str):
        return step
    chosen, row = settings_of(loss, settings), LOSSES[loss]
    last = shape[-1] if shape else None
    if row.paired and len(shape) != 2:
        raise TrainingError(
            f"loss {loss!r} compares one vector for each sample, and output {step.output!r} "
            f"has {len(shape)} axes",
            hint="choose an output of two axes, (samples, width)",
        )
    weights = chosen.get("class_weights")
    if weights is not None and isinstance(last, int) and len(weights) != last:
        raise TrainingError(
            f"there are {len(weights)} class weights, and output {step.output!r} has {last} "
            "classes",
            hint="give one weight for each class",
        )
    return replace(
        step,
        label_shape=shape[: len(shape) - row.fewer_axes],
        integers=row.integers,
        classes=last if row.classes and isinstance(last, int) else 0,
        ignored=chosen.get("ignore_index", IGNORED),
        shift=bool(chosen.get("shift", False)),
        paired=row.paired,
    )


def _fixed_rows(step: StepModel) -> int:
    sizes = [
        value.type.tensor_type.shape.dim[0].dim_value
        for value in step.model.proto.graph.input
        if value.name in step.inputs and value.type.tensor_type.shape.dim
    ]
    return max(sizes, default=0)


def choose_output(model: Model, output: str) -> str:
    """The output that a loss is on: the one named, a head's, or the only one with floats.

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
    manifest = read_manifest(model.proto)
    heads = [head.name for head in manifest.heads] if manifest else []
    floats = heads if len(heads) == 1 else floats
    if len(floats) != 1:
        raise TrainingError(
            f"{model.label} has {len(floats)} outputs with floats",
            hint=f"say which the loss is on: {', '.join(floats) or 'it has none'}",
        )
    return str(floats[0])


def add_loss(model: Model, output: str, loss: str | LossFunction, settings: Settings) -> None:
    """Add the labels as an input and the nodes of a loss in float32, in place.

    Raises:
        TrainingError: If the loss or a setting is unknown, or the names are taken.
    """
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
        chosen, wanted = settings_of(loss, settings), LABELS
        if not LOSSES[loss].fewer_axes:  # so that labels of another shape are not repeated
            wanted = tape.add("Reshape", LABELS, tape.once("Shape", output, elem_type=INT64))
        made = LOSSES[loss].emit(tape, logits, wanted, chosen)
    else:
        made = loss(tape, logits, LABELS)
    single = tape.add("Reshape", made, tape.constant(_NO_AXES))
    graph = model.proto.graph
    graph.input.append(declared)
    graph.node.extend([*tape.nodes, helper.make_node("Identity", [single], [LOSS], LOSS)])
    graph.initializer.extend(tape.constants.values())


_NO_AXES = np.zeros(0, np.int64)
"""The shape of a single number."""
