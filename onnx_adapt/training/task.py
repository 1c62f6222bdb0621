"""The task of a training: the step model, the samples and the values to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.errors import GradientError, TrainingError
from onnx_adapt.model.file import Model
from onnx_adapt.training.data import Dataset, Order, split
from onnx_adapt.training.fitting_data import for_step
from onnx_adapt.training.forward_only import forward_model
from onnx_adapt.training.metrics import require_labels
from onnx_adapt.training.reading import DataArgument, read_dataset
from onnx_adapt.training.resuming import fingerprint_arrays, fingerprint_data
from onnx_adapt.training.settings import Settings
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_model import LossFunction, StepModel, make_step


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained on what.

    Attributes:
        model: The adapted model, with its defaults.
        begun: The weights that train, before the first step, by input.
        step: The step model.
        samples: The samples to train with.
        held_back: The samples to choose the best weights by, if any.
        settings: How to train.
        order: The order of the samples.
        loss: The loss.
        loss_settings: Its settings.
    """

    model: Model
    begun: Mapping[str, Array]
    step: StepModel
    samples: Dataset
    held_back: Dataset | None
    settings: Settings
    order: Order
    loss: str | LossFunction
    loss_settings: Mapping[str, object]

    def identity(self) -> dict[str, Any]:
        """What must be the same when the training is resumed, by what people call it."""
        held_back = fingerprint_data(self.held_back) if self.held_back is not None else ""
        settings, loss = asdict(self.settings), self.loss
        chosen = ", ".join(f"{key}={v}" for key, v in sorted(self.loss_settings.items()))
        name = loss if isinstance(loss, str) else getattr(loss, "__qualname__", "")
        return {
            "base": required_manifest(self.model).fingerprint,
            "model output": self.step.output,
            "loss": str(name),
            "settings of the loss": chosen,
            "data": fingerprint_data(self.samples),
            "validation data": held_back,
            **{key.replace("_", " "): value for key, value in settings.items()},
            "weights": [[name, list(v.shape)] for name, v in self.begun.items()],
            "first weights": fingerprint_arrays(self.begun),
        }


def prepare(
    model: Model,
    data: DataArgument,
    settings: Settings,
    *,
    loss: str | LossFunction,
    output: str,
    labels: str,
    loss_settings: Mapping[str, object],
    bottleneck: int,
    start_from: Adapter | None,
    validation: float | DataArgument,
) -> Task:
    """Make the task of a training; the arguments are those of `train`.

    Raises:
        TrainingError: If the data, the loss or a setting does not fit.
        GradientError: If the model cannot be differentiated.
    """
    settings.check()
    model = with_defaults(model)
    begun = weights_to_train(model, bottleneck, start_from, settings.seed)
    asked: dict[str, Any] = {"loss": loss, "output": output, "settings": loss_settings}
    if settings.forward_only:
        step = forward_model(model, **asked)
    else:
        step = _differentiable(model, list(begun), asked)
    require_labels(
        settings.metric,
        classes=step.integers and not step.paired,
        groups=step.integers and len(step.label_shape) == 1,
    )
    samples, held_back = _samples(data, validation, labels, step, settings.seed)
    chooses = settings.metric != "loss" or settings.patience
    if chooses and held_back is None:
        raise TrainingError(
            "a metric and patience need samples that are held back, and there are none",
            hint="hold a larger share back, or give samples to validate with",
        )
    if held_back is not None and all(len(g.rows) < step.rows for g in held_back.groups):
        raise TrainingError(
            f"{held_back.size} samples are held back, and the model takes {step.rows} at once",
            hint="hold a larger share back, or none",
        )
    size = settings.batch_size
    if step.rows > 1:
        size = max(1, size // step.rows) * step.rows
    order = Order(size, settings.seed, step.paired, step.rows > 1)
    parts = (model, begun, step, samples, held_back, settings, order)
    return Task(*parts, loss, loss_settings)


def _differentiable(model: Model, weights: list[str], asked: Mapping[str, Any]) -> StepModel:
    try:
        return make_step(model, weights, **asked)
    except GradientError as error:
        hint = f"{error.hint}; --forward-only trains without gradients, slowly"
        raise GradientError(error.message, hint=hint) from error


def _samples(
    data: DataArgument,
    validation: float | DataArgument,
    labels: str,
    step: StepModel,
    seed: int,
) -> tuple[Dataset, Dataset | None]:
    """The samples to train with, and those to validate with."""
    samples = for_step(step, read_dataset(data, labels))
    if not isinstance(validation, int | float):
        held_back = read_dataset(validation, labels, classes=samples.classes)
        return samples, for_step(step, held_back)
    if not 0 <= validation < 1:
        raise TrainingError(
            f"a validation share of {validation} is not possible", hint="give 0 to 0.99"
        )
    if not validation:
        return samples, None
    kept, held_back = split(samples, float(validation), seed, paired=step.paired)
    return kept, held_back if held_back.size else None
