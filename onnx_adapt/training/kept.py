"""Keep for each sample what the layers before the first slot give, which never changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import RunError
from onnx_adapt.ort import Providers
from onnx_adapt.training.data import Batch, Dataset
from onnx_adapt.training.evaluation import require_finite_inputs
from onnx_adapt.training.frozen import Cut, cut
from onnx_adapt.training.session import TrainingSession
from onnx_adapt.training.step_model import StepModel

# A sample has the same length in every batch, because samples of one shape are batched
# together and are padded before. So what is before the first slot gives the same numbers for
# it, except for rounding, as long as the samples of a batch do not change each other. They
# do where a range is taken over the whole batch, as in a model that is quantised while it
# runs. This is tried: some samples are run together and one by one. A tensor whose rows do
# not come out the same is not kept, and what makes it is tried in its place. An example:
# `(batch * heads, tokens, width)` has no row for each sample; the `(batch, tokens, heads *
# width)` that it was reshaped from has.
#
# What is kept is computed batch by batch in the order of the data, not in that of the
# training, so a training that is resumed has the same numbers, bit for bit.

_TRIED = 3
"""How many samples are run together and one by one."""

_TRIES = 8
"""How often other tensors are tried."""

_NEAR = {"float16": 2e-2, "float32": 1e-4, "float64": 1e-9}
"""How far the rows of two runs may be apart by rounding, relative to the largest number."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A training on what is kept.

    Attributes:
        step: The step model without what is before the first slot.
        samples: The samples to train with; what is kept are inputs of theirs.
        held_back: The samples to choose the best weights by, if any.
        size: The bytes that are kept.
    """

    step: StepModel
    samples: Dataset
    held_back: Dataset | None
    size: int


def keep_frozen(
    step: StepModel,
    weights: Mapping[str, Array],
    samples: Dataset,
    held_back: Dataset | None,
    *,
    batch_size: int,
    most: int,
    providers: Providers,
) -> Kept | str:
    """Compute what is before the first slot once for each sample, and keep it in memory.

    Args:
        step: The step model.
        weights: The weights that train, by input.
        samples: The samples to train with.
        held_back: The samples to choose the best weights by, if any.
        batch_size: Samples in one run.
        most: How many bytes may be kept.
        providers: Where to run.

    Returns:
        The training on what is kept, or why all is computed in every step; '' if nothing that
        costs time is before the first slot.

    Raises:
        TrainingError: If an input of a sample holds NaN.
    """
    data = [item for item in (samples, held_back) if item is not None]
    found = _find_cut(step, list(weights), data, providers)
    if isinstance(found, str):
        return found
    session = TrainingSession(found.frozen, providers)
    sizes = [_size(found, session, item) for item in data]
    if sum(sizes) > most:
        return (
            f"what is before the first slot is computed in every step: to keep it would take "
            f"{sum(sizes) / 1e6:.0f} MB, and {most / 1e6:.0f} MB are allowed"
        )
    batch = samples.first(step.rows or _TRIED)
    values = _run(found, session, batch)
    rest = replace(step, model=found.rest(values))
    fed = {**batch.feeds(step.labels), **weights}
    whole, again = (
        _output(part, {**fed, **values}, batch, providers) for part in (step, rest)
    )
    if not _same(whole, again):
        return "the model gives something else in parts, so nothing before the slots is kept"
    size = step.rows or batch_size
    done = [_computed(found, session, rest, item, size) for item in data]
    kept = [item for item in done if item is not None]
    if len(kept) < len(data):
        return _MIXED
    return Kept(rest, kept[0], kept[1] if held_back is not None else None, sum(sizes))


_MIXED = "samples change each other before the first slot, so nothing is kept for each"


def _find_cut(
    step: StepModel, weights: Sequence[str], data: Sequence[Dataset], providers: Providers
) -> Cut | str:
    """Where the model can be cut so that each sample has rows of its own."""
    wanted = {step.loss, step.output, *step.grads.values()}
    results = [v.name for v in step.model.proto.graph.output if v.name in wanted]
    if step.rows > 1:
        return f"the model takes {step.rows} samples at once, so nothing is kept for each"
    batches = [item.first(1 if step.rows else _TRIED) for item in data]
    batch = max(batches, key=lambda item: item.size)
    again: set[str] = set()
    for _ in range(_TRIES):
        found = cut(step.model, results, [*weights, step.labels], again)
        if found is None:
            break
        try:
            session = TrainingSession(found.frozen, providers)
            mixed = _mixed(found, session, batch)
        except RunError:
            return "what is before the first slot cannot be read from the model"
        if not mixed:
            return found
        again |= mixed
    return _MIXED if again else ""


def _mixed(found: Cut, session: TrainingSession, batch: Batch) -> set[str]:
    """The tensors that do not have, for each sample of a batch, the rows of it alone."""
    whole = _run(found, session, batch)
    wrong = {name for name, value in whole.items() if value.shape[:1] != (batch.size,)}
    for row in range(batch.size if batch.size > 1 else 0):
        alone = _run(found, session, batch.take(np.array([row])))
        wrong |= {
            name
            for name in set(whole) - wrong
            if not _same(whole[name][row : row + 1], alone[name])
        }
    return wrong


def _same(row: Array, alone: Array) -> bool:
    if row.shape != alone.shape:
        return False
    finite = row[np.isfinite(row)]
    largest = np.abs(finite).max(initial=0)
    near = _NEAR.get(str(row.dtype), 0) * float(largest)
    return bool(np.allclose(row, alone, rtol=0, atol=near))


def _output(
    step: StepModel, feeds: Mapping[str, Array], batch: Batch, providers: Providers
) -> Array:
    """The output of the base by a step model, of what of some feeds it reads."""
    session = TrainingSession(step.model, providers)
    inputs = {value.name for value in step.model.proto.graph.input}
    read = {name: value for name, value in feeds.items() if name in inputs}
    return session.run(read, [step.output], batch.name)[step.output]


def _run(found: Cut, session: TrainingSession, batch: Batch) -> dict[str, Array]:
    read = {value.name for value in found.frozen.proto.graph.input}
    feeds = {k: np.ascontiguousarray(v) for k, v in batch.inputs.items() if k in read}
    return session.run(feeds, found.kept, batch.name)


def _size(found: Cut, session: TrainingSession, data: Dataset) -> int:
    """How many bytes are kept of samples: those of one of each group, times their number."""
    total = 0
    for group in data.groups:
        values = _run(found, session, data.read(group, group.rows[:1]))
        total += len(group.rows) * sum(value.nbytes for value in values.values())
    return total


def _computed(
    found: Cut, session: TrainingSession, rest: StepModel, data: Dataset, size: int
) -> Dataset | None:
    """Samples whose inputs are what is kept, and what the rest reads besides.

    Returns:
        None if some samples do not have rows of their own.
    """
    groups = []
    for group in data.groups:
        inputs = {name: v for name, v in group.inputs.items() if name in rest.inputs}
        for start in range(0, len(group.rows), size):
            rows = group.rows[start : start + size]
            batch = data.read(group, rows)
            for name, value in _run(found, session, batch).items():
                if not np.isfinite(value).all():
                    require_finite_inputs(batch)
                if name not in inputs:  # rows that are never written take no memory
                    shape = (len(group.numbers), *value.shape[1:])
                    inputs[name] = np.empty(shape, value.dtype)
                if value.shape != (batch.size, *inputs[name].shape[1:]):
                    return None
                inputs[name][rows] = value
        groups.append(replace(group, inputs=inputs))
    return replace(data, groups=tuple(groups))
