"""Running a step model: a loss and its gradients for one batch, or the outputs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import helper

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.runtime_bytes import model_bytes
from onnx_adapt.ort import Providers, onnxruntime, run_session, start_session
from onnx_adapt.training.data import Dataset, in_order
from onnx_adapt.training.step_model import StepModel

Arrays = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of a step model gave.

    Attributes:
        loss: The loss.
        grads: The gradient of each weight, in float32.
    """

    loss: float
    grads: dict[str, Array]


class Engine:
    """A step model in ONNX Runtime.

    Args:
        step: The step model.
        providers: Where to run it.

    Raises:
        RunError: If ONNX Runtime refuses the model.
    """

    def __init__(self, step: StepModel, providers: Providers) -> None:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.step = step
        self._forward = ort.RunOptions()
        self._forward.only_execute_path_to_fetches = True
        self._session = start_session(
            model_bytes(step.model, options),
            options,
            providers,
            label=step.model.label,
            hint="`onnx-adapt verify` says whether the adapted model runs",
        )
        self._dtypes = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for value in step.model.proto.graph.input
        }
        self.rows = fixed_rows(step)

    def run(self, weights: Arrays, batch: Dataset) -> Result:
        """The loss of a batch and its gradients.

        A model that takes a fixed number of rows is run several times, and the mean is taken.

        Raises:
            TrainingError: If the loss is not finite.
        """
        total, grads = 0.0, {name: np.zeros_like(value) for name, value in weights.items()}
        for part in in_order(batch, self.rows or batch.size):
            share = part.size / batch.size
            values = self._run(weights, part, [self.step.loss, *self.step.grads.values()])
            loss = float(values[self.step.loss])
            if not np.isfinite(loss):
                raise TrainingError(
                    f"the loss of a batch of {part.label} is {loss}",
                    hint="is there NaN in its inputs? a lower rate or a smaller clip may help",
                )
            total += share * loss
            for name, made in self.step.grads.items():
                grads[name] += np.float32(share) * values[made].astype(np.float32)
        return Result(total, grads)

    def loss(self, weights: Arrays, batch: Dataset) -> float:
        """The loss of a batch, by a forward run alone."""
        return self.evaluate(weights, batch, batch.size)[0]

    def evaluate(self, weights: Arrays, data: Dataset, size: int) -> tuple[float, Array]:
        """The mean loss of samples, and their outputs `(samples, ...)`."""
        total, outputs = 0.0, []
        for part in in_order(data, self.rows or size):
            values = self._run(weights, part, [self.step.loss, self.step.output])
            total += float(values[self.step.loss]) * part.size / data.size
            outputs.append(values[self.step.output])
        return total, np.concatenate(outputs)

    def _run(self, weights: Arrays, batch: Dataset, outputs: list[str]) -> dict[str, Array]:
        feeds = {**batch.feeds(self.step.labels), **weights}
        typed = {
            name: np.asarray(value, self._dtypes.get(name, value.dtype))
            for name, value in feeds.items()
        }
        values = run_session(
            self._session,
            outputs,
            typed,
            label=self.step.model.label,
            run_options=self._forward,
        )
        return dict(zip(outputs, values, strict=True))


def fixed_rows(step: StepModel) -> int:
    """How many rows the base takes in a run; 0 if any number of them."""
    fed = {*step.grads, step.labels}
    sizes = [
        value.type.tensor_type.shape.dim[0].dim_value
        for value in step.model.proto.graph.input
        if value.name not in fed and value.type.tensor_type.shape.dim
    ]
    return max(sizes, default=0)
