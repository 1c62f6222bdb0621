"""Running a step model: a loss and its gradients for one batch, or the outputs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.runtime_bytes import model_bytes
from onnx_adapt.ort import Providers, onnxruntime, run_session, start_session
from onnx_adapt.training.data import Batch, Dataset, in_order
from onnx_adapt.training.metrics import Metric
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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good weights are on samples.

    Attributes:
        loss: The mean loss.
        score: The metric; 0 without one.
    """

    loss: float
    score: float = 0.0


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

    def run(self, weights: Arrays, batch: Batch, step: int = 0) -> Result:
        """The loss of a batch and its gradients.

        A model that takes a fixed number of rows is run several times, and the mean is taken.

        Args:
            weights: The weights that train, by input.
            batch: Samples.
            step: How many steps were taken before.

        Raises:
            TrainingError: If the loss is not finite.
        """
        total, grads = 0.0, {name: np.zeros_like(value) for name, value in weights.items()}
        for part in batch.parts(self.step.rows or batch.size):
            share = part.size / batch.size
            values = self._run(weights, part, [self.step.loss, *self.step.grads.values()])
            loss = float(values[self.step.loss])
            require_finite_loss(loss, part, f"step {step + 1}: ")
            total += share * loss
            for name, made in self.step.grads.items():
                grads[name] += np.float32(share) * values[made].astype(np.float32)
        return Result(total, grads)

    def loss(self, weights: Arrays, batch: Batch) -> float:
        """The loss of a batch, by a forward run alone."""
        total = 0.0
        for part in batch.parts(self.step.rows or batch.size):
            values = self._run(weights, part, [self.step.loss])
            total += float(values[self.step.loss]) * part.size / batch.size
        return total

    def evaluate(
        self, weights: Arrays, data: Dataset, size: int, metric: Metric | None
    ) -> Evaluation:
        """The mean loss of samples, and a metric on them.

        Raises:
            TrainingError: If the loss of some of them is not finite.
        """
        total, seen, found = 0.0, 0, Found()
        for part in in_order(data, self.step.rows or size):
            if part.size < self.step.rows:
                continue
            values = self._run(weights, part, [self.step.loss, self.step.output])
            loss = float(values[self.step.loss])
            require_finite_loss(loss, part, "validating: ")
            total += loss * part.size
            seen += part.size
            if metric is not None:
                found = found.with_batch(self.step, metric, values[self.step.output], part)
        return Evaluation(total / max(seen, 1), found.score(metric))

    def _run(self, weights: Arrays, batch: Batch, outputs: Sequence[str]) -> dict[str, Array]:
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


@dataclass(frozen=True, slots=True)
class Found:
    """What a metric keeps of the batches so far.

    Attributes:
        kept: What it keeps of the outputs.
        labels: The labels of the same.
    """

    kept: tuple[Array, ...] = ()
    labels: tuple[Array, ...] = ()

    def with_batch(
        self, step: StepModel, metric: Metric, outputs: Array, batch: Batch
    ) -> Found:
        """The same with a further batch; what is ignored is left out."""
        kept, labels = metric.keep(outputs), batch.labels
        if step.shift:
            kept, labels = kept[:, :-1], labels[:, 1:]
        counts = labels != step.ignored if step.classes else np.ones(labels.shape, bool)
        return Found((*self.kept, kept[counts]), (*self.labels, labels[counts]))

    def score(self, metric: Metric | None) -> float:
        """The metric on all of them."""
        if metric is None or not self.kept:
            return 0.0
        return metric.compute(np.concatenate(self.kept), np.concatenate(self.labels))


def require_finite_loss(loss: float, batch: Batch, when: str) -> None:
    """Refuse a loss that is NaN or infinite, and say which samples and inputs are to blame.

    Raises:
        TrainingError: If it is not finite.
    """
    if np.isfinite(loss):
        return
    for name, value in {**batch.inputs, "labels": batch.labels}.items():
        bad = ~np.isfinite(value) if value.dtype.kind == "f" else np.zeros(value.shape, bool)
        if bad.any():
            row = int(np.argwhere(bad)[0][0]) if value.ndim else 0
            raise TrainingError(
                f"{when}{name!r} of sample {batch.numbers[row]} of {batch.label} holds NaN or "
                "infinity",
                hint="repair the data, or leave this sample out",
            )
    raise TrainingError(
        f"{when}the loss is {loss} on {batch.name}",
        hint="a lower rate may help",
    )
