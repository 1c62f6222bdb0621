"""Train an adapter for a model with slots, on the model's file alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.ort import Providers, read_providers
from onnx_adapt.proof.runner import ProviderArgument
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.fit import Stepper, fit
from onnx_adapt.training.forward_only import ForwardEngine
from onnx_adapt.training.gradient_check import Checked, check_gradients
from onnx_adapt.training.kept import keep_frozen
from onnx_adapt.training.progress import Epoch, Progress, Report, start
from onnx_adapt.training.reading import DataArgument
from onnx_adapt.training.recompute import recompute
from onnx_adapt.training.resuming import ProgressFile
from onnx_adapt.training.settings import Settings
from onnx_adapt.training.starting import adapter_of
from onnx_adapt.training.step_model import LossFunction
from onnx_adapt.training.task import Task, prepare
from onnx_adapt.training.unrounded import cut_off_alone

BOTTLENECK = 16
"""The bottleneck of slots that have none of their own."""

_SAVE_AFTER = 300.0
"""Seconds after which a long epoch is saved too."""

_CHECKED = 8
"""Samples on which the gradients are checked."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained adapter, and how it came about.

    Attributes:
        adapter: The best weights.
        epochs: What each epoch gave.
        checks: How well the gradients agreed with differences; empty if not checked.
        finished: Whether the training came to its end; False if it was stopped.
        classes: The names of the classes, if the labels were texts.
    """

    adapter: Adapter
    epochs: tuple[Epoch, ...]
    checks: tuple[Checked, ...]
    finished: bool = True
    classes: tuple[str, ...] = ()


def train(
    model: ModelLike,
    data: DataArgument,
    *,
    loss: str | LossFunction,
    name: str = "trained",
    output: str = "",
    labels: str = "labels",
    loss_settings: Mapping[str, object] | None = None,
    bottleneck: int = BOTTLENECK,
    start_from: AdapterLike | None = None,
    validation: float | DataArgument = 0.1,
    settings: Settings | None = None,
    check: bool = True,
    provider: ProviderArgument = None,
    on_step: Callable[[Report], None] | None = None,
    notice: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Trained:
    """Train an adapter for the slots of a model, without PyTorch.

    The gradients are ONNX nodes behind the model's own, which ONNX Runtime runs. The base
    stays as it is.

    Args:
        model: A model with swappable slots.
        data: What `read_dataset` takes, such as a `.npz` file or arrays, with the model's
            inputs by name and the labels.
        loss: A name in `onnx_adapt.training.losses.LOSSES`, or a function that adds its nodes.
        name: What to call the adapter.
        output: The output that the loss is on; by default the only float output.
        labels: What the labels are called in the data.
        loss_settings: Settings of the loss, such as `{"label_smoothing": 0.1}`.
        bottleneck: The bottleneck of slots that have none of their own.
        start_from: An adapter to go on from; by default the slots start as the identity.
        validation: The share of the samples that are held back to choose the best weights
            by, or samples of their own for this.
        settings: How to train.
        check: Compare the gradients with differences of the loss before the first step.
        provider: Where to run: an execution provider of ONNX Runtime, by default the CPU.
        on_step: Told of every step.
        notice: Told, in a sentence, what is worth knowing before the first step.
        stop: Asked after every step whether to stop there; the best weights so far are given.
        checkpoint: A file that keeps how far the training is: after each epoch, after some
            minutes, when it stops and when a loss is not finite.
        resume: Go on from that file, bit for bit.

    Raises:
        TrainingError: If the data, the loss or a setting does not fit; or if a loss is not
            finite, with what was trained until then.
        GradientError: If the model cannot be differentiated, or a gradient is wrong.
        RunError: If ONNX Runtime refuses the data.
        SaveError: If the checkpoint cannot be written.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> base = oa.open_model("tests/cases/peft_bert_lora_default_ts/base.onnx")
        >>> model = oa.insert(base, after="bert.encoder.layer.1.output.dense")
        >>> ids = np.random.default_rng(0).integers(1, 60, (32, 6))
        >>> data = {"input_ids": ids, "attention_mask": np.sign(ids), "labels": ids[:, 0] % 2}
        >>> trained = oa.train(model, data, loss="cross_entropy")
        >>> trained.epochs[-1].loss < trained.epochs[0].loss
        True
    """
    settings = settings or Settings()
    task = prepare(
        *(as_model(model), data, settings),
        loss=loss,
        output=output,
        labels=labels,
        loss_settings=loss_settings or {},
        bottleneck=bottleneck,
        start_from=None if start_from is None else as_adapter(start_from),
        validation=validation,
    )
    file, progress = _first_progress(task, checkpoint, resume=resume)
    checks: Sequence[Checked] = ()
    providers = read_providers(provider)
    faster = _with_kept(task, providers, notice or (lambda _: None))
    if settings.forward_only:
        engine: Stepper = ForwardEngine(
            *(faster.step, loss, loss_settings or {}, providers, settings.seed)
        )
    else:
        if settings.recompute:
            faster = _with_less_memory(faster, providers, notice or (lambda _: None))
        engine = exact = Engine(faster.step, providers)
        if check and not resume:
            checks = _check(faster, exact, providers)
    steps = fit(engine, progress, faster.samples, faster.held_back, settings, task.order)
    progress, finished, failure = _follow(steps, progress, file, on_step, stop)
    best = progress.best or progress.current
    trained = Trained(
        adapter_of(name, best, task.begun, task.model),
        progress.history,
        tuple(checks),
        finished,
        task.samples.classes,
    )
    if failure is not None:
        failure.trained = trained if progress.step else None
        raise failure
    return trained


def _check(task: Task, engine: Engine, providers: Providers) -> list[Checked]:
    """Compare the gradients of a task with differences of its loss.

    Gradients are passed straight through roundings, and a loss moves in steps there: where a
    model has ranges, it is checked without its roundings.
    """
    smooth = cut_off_alone(task.step.model)
    if smooth is not None:
        engine = Engine(replace(task.step, model=smooth), providers)
    batch = task.samples.first(max(_CHECKED, task.step.rows))
    return check_gradients(engine, task.begun, batch, task.settings.seed)


def _with_kept(task: Task, providers: Providers, notice: Callable[[str], None]) -> Task:
    """The task with what is before the first slot kept for each sample, where that fits."""
    most = task.settings.frozen_memory * 10**6
    if not most:
        return task
    found = keep_frozen(
        *(task.step, task.begun, task.samples, task.held_back),
        batch_size=task.settings.batch_size,
        most=most,
        providers=providers,
    )
    if isinstance(found, str):
        if found:
            notice(found)
        return task
    taken = f"{found.size / 1e6:.1f} MB"
    notice(f"what is before the first slot is computed once for each sample: {taken}")
    return replace(task, step=found.step, samples=found.samples, held_back=found.held_back)


def _with_less_memory(task: Task, providers: Providers, notice: Callable[[str], None]) -> Task:
    """The task with activations that are computed a second time on the way back."""
    batch = task.samples.first(task.step.rows or 1)
    size = task.step.rows or task.settings.batch_size
    made = recompute(task.step, task.begun, batch, size, providers)
    notice(
        f"activations take about {made.after / 1e6:.0f} MB for {size} samples, and "
        f"{made.before / 1e6:.0f} MB if none were recomputed"
    )
    return replace(task, step=made.step)


def _first_progress(
    task: Task, checkpoint: str | os.PathLike[str] | None, *, resume: bool
) -> tuple[ProgressFile | None, Progress]:
    """The file that keeps how far a training is, and where it begins."""
    begun = start(task.begun, task.settings.optimiser)
    if checkpoint is None:
        if resume:
            hint = "say which with --checkpoint"
            raise TrainingError("there is no checkpoint to resume", hint=hint)
        return None, begun
    file = ProgressFile(Path(checkpoint), task.identity())
    if resume:
        return file, file.load()
    file.require_new()
    return file, begun


def _follow(
    steps: Iterable[tuple[Progress, Report]],
    progress: Progress,
    file: ProgressFile | None,
    on_step: Callable[[Report], None] | None,
    stop: Callable[[], bool] | None,
) -> tuple[Progress, bool, TrainingError | None]:
    """Take the steps of a training, and save how far it is.

    Returns:
        The progress, whether it is at its end, and what went wrong before it.
    """
    saved = time.monotonic()
    finished, failure = True, None
    try:
        for progress, report in steps:
            due = report.epoch or report.step == 1 or time.monotonic() - saved > _SAVE_AFTER
            if file is not None and due:
                file.save(progress)
                saved = time.monotonic()
            if on_step is not None:
                on_step(report)
            if stop is not None and stop() and progress.step < report.steps:
                finished = False
                break
    except TrainingError as error:
        finished, failure = False, error
    finally:
        if file is not None and progress.step:
            file.save(progress)
    return progress, finished, failure
