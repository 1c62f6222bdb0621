"""Check that data is what a step model takes, before anything is trained."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from onnx import helper

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.training.data import Dataset, Group
from onnx_adapt.training.step_model import StepModel

_log = logging.getLogger(__name__)


def for_step(step: StepModel, data: Dataset) -> Dataset:
    """The samples with the inputs that a step model has; further ones are left out.

    Raises:
        TrainingError: If an input is missing or holds fractions where the model takes
            integers; if the labels have another number of axes, or there is no such class.
    """
    wanted = step.inputs
    given = data.groups[0].inputs
    if missing := [name for name in wanted if name not in given]:
        raise TrainingError(
            f"{data.label} has no {missing[0]!r}, which {step.model.label} reads; it has "
            f"{', '.join(given) or 'only labels'}",
            hint=f"the model's inputs are {', '.join(wanted)}",
        )
    if further := [name for name in given if name not in wanted]:
        _log.warning(
            "left out %s of %s: the model has no such input", ", ".join(further), data.label
        )
    dtypes = {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in step.model.proto.graph.input
    }
    groups = tuple(
        replace(group, inputs={name: group.inputs[name] for name in wanted})
        for group in data.groups
    )
    for group in groups:
        for name in wanted:
            if dtypes[name].kind in "iu":
                _require_integers(group.inputs[name], name, group, data.label)
        _check_labels(step, data, group)
    return replace(data, groups=groups)


def _require_integers(values: Array, name: str, group: Group, label: str) -> None:
    """Refuse fractions, NaN and infinity where the model or the loss takes integers."""
    if values.dtype.kind != "f":
        return
    whole = np.isfinite(values) & (values == np.floor(values))
    if not whole.all():
        row = int(np.argwhere(~whole)[0][0]) if values.ndim else 0
        raise TrainingError(
            f"{name!r} of sample {group.numbers[row]} of {label} is "
            f"{values[~whole].flat[0]}, and integers are taken",
            hint="repair the data, or leave this sample out",
        )


def _check_labels(step: StepModel, data: Dataset, group: Group) -> None:
    labels = group.labels
    known = zip(labels.shape[1:], step.label_shape[1:], strict=False)
    fits = all(ours == size for ours, size in known if isinstance(size, int))
    if labels.ndim != len(step.label_shape) or not fits:
        wanted = ["samples", *("any" if s is None else s for s in step.label_shape[1:])]
        raise TrainingError(
            f"the labels of {data.label} have the shape {list(labels.shape)}; for output "
            f"{step.output!r} this loss takes ({', '.join(map(str, wanted))})",
            hint="the first axis is that of the samples",
        )
    if step.integers:
        _require_integers(labels, "labels", group, data.label)
    if not step.classes:
        return
    wrong = (labels != step.ignored) & ((labels < 0) | (labels >= step.classes))
    if np.any(wrong):
        row = int(np.argwhere(wrong)[0][0])
        raise TrainingError(
            f"sample {group.numbers[row]} of {data.label} has the label "
            f"{labels[wrong].flat[0]}, and output {step.output!r} has the classes 0 to "
            f"{step.classes - 1}",
            hint=f"{step.ignored} is the label of what does not count",
        )
