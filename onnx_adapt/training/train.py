"""Train an adapter for a model with slots, on the model's file alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.edit.weights import read_weights
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.file import Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.ort import read_providers
from onnx_adapt.proof.runner import ProviderArgument
from onnx_adapt.slot.manifest import Manifest, Slot
from onnx_adapt.slot.names import weight_name
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.required import default_tensors
from onnx_adapt.slot.weights import fresh_weights, is_off
from onnx_adapt.training.data import DataArgument, Dataset, read_dataset, split
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.fit import Epoch, Progress, Report, Settings, fit, start
from onnx_adapt.training.gradient_check import Checked, check_gradients
from onnx_adapt.training.step_model import LossFunction, StepModel, check_labels, make_step

BOTTLENECK = 16
"""The bottleneck of slots that have none of their own."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained adapter, and how it came about.

    Attributes:
        adapter: The best weights.
        epochs: What each epoch gave.
        checks: How well the gradients agreed with differences; empty if not checked.
    """

    adapter: Adapter
    epochs: tuple[Epoch, ...]
    checks: tuple[Checked, ...]


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
) -> Trained:
    """Train an adapter for the slots of a model, without PyTorch.

    The gradients are ONNX nodes behind the model's own, which ONNX Runtime runs. The base
    stays as it is.

    Args:
        model: A model with swappable slots.
        data: A `.npz` file, a folder of `.npy` files, or arrays, with the model's inputs by
            name and the labels.
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

    Raises:
        TrainingError: If the data, the loss or a setting does not fit.
        GradientError: If the model cannot be differentiated, or a gradient is wrong.
        RunError: If ONNX Runtime refuses the data.

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
    model = as_model(model)
    settings = settings or Settings()
    model = with_defaults(model)
    begin = None if start_from is None else as_adapter(start_from)
    slots, weights = _weights_to_train(model, bottleneck, begin, settings.seed)
    step = make_step(model, list(weights), loss=loss, output=output, settings=loss_settings)
    samples, held_back = _samples(data, validation, labels, step, settings.seed)
    for part in (samples, held_back):
        if part is not None and part.size:
            check_labels(step, part)
    engine = Engine(step, read_providers(provider))
    checks: Sequence[Checked] = ()
    if check:
        few = np.arange(min(samples.size, max(8, engine.rows)))
        checks = check_gradients(engine, weights, samples.take(few), settings.seed)
    progress = start(weights, settings)
    for report in fit(engine, progress, samples, held_back, settings):
        if on_step is not None:
            on_step(report)
    adapter = _adapter(name, progress, slots, required_manifest(model))
    return Trained(adapter, tuple(progress.history), tuple(checks))


def _weights_to_train(
    model: Model, bottleneck: int, begin: Adapter | None, seed: int
) -> tuple[list[Slot], dict[str, Array]]:
    """The slots that train, and their weights before the first step, by input."""
    manifest = required_manifest(model)
    slots = [slot for slot in owners(manifest.slots) if slot.swappable]
    if not slots:
        raise TrainingError(
            f"the slots of {model.label} are baked, so nothing can be fed to them",
            hint="insert without --baked, train, and fill the result",
        )
    stored = read_weights(model, slots)
    rng = np.random.default_rng((seed, 2))
    weights: dict[str, Array] = {}
    for slot in slots:
        made: Mapping[str, Array] = fresh_weights(slot, slot.bottleneck or bottleneck, rng)
        if begin is not None and slot.name in begin.weights:
            made = begin.weights[slot.name]
        elif not is_off(stored[slot.name]):
            made = stored[slot.name]
        weights |= {weight_name(slot.name, part): value for part, value in made.items()}
    return slots, weights | _heads(model, manifest, begin)


def _heads(model: Model, manifest: Manifest, begin: Adapter | None) -> dict[str, Array]:
    """The replaceable weights of the base, such as a head, which train as well."""
    swappable = [weight for weight in manifest.weights if weight.swappable]
    stored = default_tensors(model.proto, swappable)
    given = begin.replaced if begin is not None else {}
    return {
        name: given[name] if name in given else read_tensor(model, tensor)
        for name, tensor in stored.items()
    }


def _samples(
    data: DataArgument,
    validation: float | DataArgument,
    labels: str,
    step: StepModel,
    seed: int,
) -> tuple[Dataset, Dataset | None]:
    """The samples to train with, and those to validate with."""
    samples = read_dataset(data, labels)
    if isinstance(validation, int | float):
        if not 0 <= validation < 1:
            raise TrainingError(
                f"a validation share of {validation} is not possible", hint="give 0 to 0.99"
            )
        return split(samples, float(validation), seed)
    return samples, read_dataset(validation, labels)


def _adapter(
    name: str, progress: Progress, slots: Sequence[Slot], manifest: Manifest
) -> Adapter:
    """The best weights as an adapter, in the slots' element types."""
    weights = {
        slot.name: {
            part: np.ascontiguousarray(
                progress.best[weight_name(slot.name, part)], DTYPES[slot.dtype]
            )
            for part in slot.parts
        }
        for slot in slots
    }
    heads = [weight.name for weight in manifest.weights if weight.swappable]
    replaced = {key: progress.best[key] for key in heads}
    activations = {slot.name: slot.activation for slot in slots}
    return Adapter(name, weights, replaced, activations, manifest.fingerprint)
