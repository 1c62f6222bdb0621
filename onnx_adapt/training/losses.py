"""Losses as nodes: from an output of a model and the labels to one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnx_adapt.errors import TrainingError
from onnx_adapt.graph.gradients.tape import INT64, Tape

FLOAT = onnx.TensorProto.FLOAT

IGNORED = -100
"""The label of what does not count, as in PyTorch."""


Settings = Mapping[str, Any]

Emit = Callable[[Tape, str, str, Settings], str]
"""Adds the nodes of a loss behind an output, given the labels; returns the loss, `()`."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss that can be trained with.

    Attributes:
        emit: Adds its nodes.
        integers: Whether its labels are classes; else they are floats.
        fewer_axes: How many axes fewer than the output the labels have.
        what: What it is for, in a few words.
        settings: Its settings, and what they are by default.
        classes: Whether the last axis of the output counts classes.
        paired: Whether it compares samples of one label with each other.
    """

    emit: Emit
    integers: bool
    fewer_axes: int
    what: str
    settings: Settings
    classes: bool = False
    paired: bool = False


def cross_entropy(tape: Tape, output: str, labels: str, settings: Settings) -> str:
    """Softmax cross entropy of `(batch, ..., classes)`, the mean over what counts.

    As `torch.nn.functional.cross_entropy`: with class weights it is the weighted mean, and
    label smoothing mixes in the mean over all classes. If nothing counts it is 0, where
    PyTorch has NaN. With `shift` the output at each position is held against the label of the
    next one, as causal language models are trained.
    """
    if settings["shift"]:
        output = _cut(tape, output, 0, -1)
        labels = _cut(tape, labels, 1, np.iinfo(np.int64).max)
    logs = tape.add("LogSoftmax", output, axis=-1)
    ignored = tape.number(settings["ignore_index"], labels)
    counts = tape.add("Not", tape.compare("Equal", labels, ignored))
    places = tape.where(counts, labels, tape.number(0, labels))
    picked = tape.add("GatherElements", logs, tape.unsqueezed(places, -1), axis=-1)
    picked = tape.squeezed(picked, -1)
    weights = tape.cast(counts, FLOAT)
    share = weights
    if settings["class_weights"] is not None:
        table = tape.constant(np.asarray(settings["class_weights"], np.float32))
        share = tape.add("Mul", weights, tape.add("Gather", table, places, axis=0))
    gained = tape.add("Mul", picked, share)
    smoothing = float(settings["label_smoothing"])
    if smoothing:
        spread = logs
        if settings["class_weights"] is not None:
            spread = tape.add("Mul", logs, table)
        mean = tape.add("ReduceSum", spread, tape.integers(-1), keepdims=0)
        size = tape.add("Gather", tape.add("Shape", logs, elem_type=INT64), tape.integers(-1))
        mean = tape.add("Div", mean, tape.cast(size, FLOAT))
        rest = tape.times(tape.add("Mul", mean, weights), smoothing)
        gained = tape.add("Add", tape.times(gained, 1 - smoothing), rest)
    return tape.add("Neg", _ratio(tape, gained, share))


def _cut(tape: Tape, tensor: str, start: int, end: int) -> str:
    """Some positions of `(batch, positions, ...)`."""
    return tape.add("Slice", tensor, *(tape.integers(i) for i in (start, end, 1)))


def _sum(tape: Tape, tensor: str) -> str:
    return tape.add("ReduceSum", tensor, keepdims=0)


def _mean(tape: Tape, tensor: str) -> str:
    return tape.add("ReduceMean", tensor, keepdims=0)


def _ratio(tape: Tape, part: str, whole: str) -> str:
    """The ratio of two sums; 0 where nothing counts, so that such a batch does no harm."""
    counted = _sum(tape, whole)
    return tape.add("Div", _sum(tape, part), tape.add("Max", counted, tape.constant(_TINY)))


_TINY = np.array(1e-12, np.float32)


def mean_squared(tape: Tape, output: str, labels: str, settings: Settings) -> str:
    """The mean of `(x - y) ** 2`."""
    apart = tape.add("Sub", output, labels)
    return _mean(tape, tape.add("Mul", apart, apart))


def mean_absolute(tape: Tape, output: str, labels: str, settings: Settings) -> str:
    """The mean of `|x - y|`."""
    return _mean(tape, tape.add("Abs", tape.add("Sub", output, labels)))


def huber(tape: Tape, output: str, labels: str, settings: Settings) -> str:
    """The mean of `x ** 2 / 2` up to `delta`, and of `delta (|x| - delta / 2)` beyond."""
    delta = float(settings["delta"])
    size = tape.add("Abs", tape.add("Sub", output, labels))
    inside = tape.compare("LessOrEqual", size, tape.number(delta, size))
    square = tape.times(tape.add("Mul", size, size), 0.5)
    line = tape.times(tape.plus(size, -delta / 2), delta)
    return _mean(tape, tape.where(inside, square, line))


def binary(tape: Tape, output: str, labels: str, settings: Settings) -> str:
    """Binary cross entropy of logits: the mean of `softplus(x) - x y`."""
    return _mean(
        tape,
        tape.add("Sub", tape.add("Softplus", output), tape.add("Mul", output, labels)),
    )


def cosine(tape: Tape, output: str, labels: str, settings: Settings) -> str:
    """The mean of `1 - cos(x, y)` over the last axis."""
    pair = [tape.add("LpNormalization", t, axis=-1, p=2) for t in (output, labels)]
    likeness = tape.add("ReduceSum", tape.add("Mul", *pair), tape.integers(-1), keepdims=0)
    return tape.add("Sub", tape.number(1, likeness), _mean(tape, likeness))


def contrastive(tape: Tape, output: str, labels: str, settings: Settings) -> str:
    """Rows of one label are alike, rows of others are not (Khosla et al., 2020).

    `(batch, width)` is normalised; each row is compared with all others of the batch. With
    two rows of each label it is InfoNCE (van den Oord et al., 2018).
    """
    rows = tape.add("LpNormalization", output, axis=-1, p=2)
    likeness = tape.add("MatMul", rows, tape.swapped(rows, 2))
    likeness = tape.times(likeness, 1 / float(settings["temperature"]))
    size = tape.add("Shape", labels, elem_type=INT64)
    square = tape.joined(size, size)
    empty = tape.add("Expand", tape.constant(np.array(0, np.float32)), square)
    itself = tape.cast(tape.add("EyeLike", empty), FLOAT)
    likeness = tape.add("Sub", likeness, tape.times(itself, 1e9))
    logs = tape.add("LogSoftmax", likeness, axis=-1)
    alike = tape.compare("Equal", tape.unsqueezed(labels, 0), tape.unsqueezed(labels, 1))
    pairs = tape.add("Sub", tape.cast(alike, FLOAT), itself)
    found = tape.add("ReduceSum", tape.add("Mul", logs, pairs), tape.integers(1), keepdims=0)
    count = tape.add("ReduceSum", pairs, tape.integers(1), keepdims=0)
    one = tape.number(1, count)
    each = tape.add("Div", found, tape.add("Max", count, one))
    paired = tape.add("Min", count, one)
    return tape.add("Neg", _ratio(tape, each, tape.add("Max", paired, tape.number(0, count))))


def triplet(tape: Tape, output: str, labels: str, settings: Settings) -> str:
    """Each row is nearer to its label than to others, by a margin (Hermans et al., 2017).

    For each row of `(batch, width)` the farthest row of its label and the nearest of another
    are taken: the mean of `max(0, farthest - nearest + margin)` over rows that have both.
    """
    apart = tape.add("Sub", tape.unsqueezed(output, 0), tape.unsqueezed(output, 1))
    square = tape.add("ReduceSum", tape.add("Mul", apart, apart), tape.integers(2), keepdims=0)
    distance = tape.add("Sqrt", tape.add("Max", square, tape.constant(_TINY)))
    alike = tape.compare("Equal", tape.unsqueezed(labels, 0), tape.unsqueezed(labels, 1))
    # A row is at no distance from itself, so it is never the farthest if there is another.
    far = tape.where(alike, distance, tape.number(0, distance))
    near = tape.where(alike, tape.number(_FAR, distance), distance)
    farthest, nearest = _extreme(tape, "ReduceMax", far), _extreme(tape, "ReduceMin", near)
    wanted = tape.plus(tape.add("Sub", farthest, nearest), float(settings["margin"]))
    same = tape.add("ReduceSum", tape.cast(alike, FLOAT), tape.integers(1), keepdims=0)
    others = tape.compare("Less", nearest, tape.number(_FAR, nearest))
    both = tape.add("And", tape.compare("Greater", same, tape.number(1, same)), others)
    counts = tape.cast(both, FLOAT)
    return _ratio(tape, tape.add("Mul", tape.add("Relu", wanted), counts), counts)


_FAR = 1e9
"""Farther than any row is."""


def _extreme(tape: Tape, op: str, tensor: str) -> str:
    """The largest or smallest number of each row of `(rows, columns)`: `(rows,)`."""
    if tape.opset >= 18:
        return tape.add(op, tensor, tape.integers(1), keepdims=0)
    return tape.add(op, tensor, axes=[1], keepdims=0)


def distillation(tape: Tape, output: str, labels: str, settings: Settings) -> str:
    """`t ** 2 KL(softmax(y / t) || softmax(x / t))` (Hinton et al., 2015); y are logits."""
    temperature = float(settings["temperature"])
    ours, theirs = (
        tape.add("LogSoftmax", tape.times(t, 1 / temperature), axis=-1)
        for t in (output, labels)
    )
    each = tape.add("Mul", tape.add("Exp", theirs), tape.add("Sub", theirs, ours))
    total = tape.add("ReduceSum", each, tape.integers(-1), keepdims=0)
    return tape.times(_mean(tape, total), temperature**2)


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        cross_entropy,
        integers=True,
        fewer_axes=1,
        what="one class for each row or position",
        settings={
            "class_weights": None,
            "label_smoothing": 0.0,
            "ignore_index": IGNORED,
            "shift": False,
        },
        classes=True,
    ),
    "mse": Loss(mean_squared, False, 0, "numbers, by their squared distance", {}),
    "mae": Loss(mean_absolute, False, 0, "numbers, by their distance", {}),
    "huber": Loss(huber, False, 0, "numbers, few of them far off", {"delta": 1.0}),
    "bce": Loss(binary, False, 0, "several labels of 0 or 1 for each row", {}),
    "cosine": Loss(cosine, False, 0, "vectors, by their direction", {}),
    "contrastive": Loss(
        contrastive,
        True,
        1,
        "embeddings that group by label",
        {"temperature": 0.05},
        paired=True,
    ),
    "triplet": Loss(
        triplet,
        True,
        1,
        "embeddings that group by label, by their distance",
        {"margin": 1.0},
        paired=True,
    ),
    "kl": Loss(distillation, False, 0, "the logits of another model", {"temperature": 1.0}),
}
"""The losses by name; to add one, add a row."""


def settings_of(name: str, given: Settings) -> dict[str, Any]:
    """The settings of a loss: those given, and the others as they are by default.

    Raises:
        TrainingError: If the loss or a setting is unknown.
    """
    if name not in LOSSES:
        raise TrainingError(f"unknown loss {name!r}", hint=f"one of {', '.join(LOSSES)}")
    known = LOSSES[name].settings
    if unknown := sorted(set(given) - set(known)):
        takes = ", ".join(known) or "no settings"
        raise TrainingError(
            f"loss {name!r} has no setting {unknown[0]!r}", hint=f"it takes {takes}"
        )
    return {**known, **{key: _checked(name, key, known[key], given[key]) for key in given}}


def _checked(loss: str, key: str, default: Any, value: Any) -> Any:
    """A setting of the kind that its default has.

    Raises:
        TrainingError: If it is of another kind, or not possible.
    """
    if default is None and value is None:
        return None
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif default is None:
        if _is_weights(value):
            return value
        wanted = "a list of numbers that are 0 or more, such as [1, 2.5]"
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        wanted = "an integer"
    else:
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = _RANGES[key]
            if low < value < high or value == default:
                return float(value)
        wanted = "a number between {} and {}".format(*_RANGES[key])
    raise TrainingError(
        f"setting {key!r} of loss {loss!r} is {value!r}", hint=f"give {wanted}"
    )


def _is_weights(value: Any) -> bool:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return False
    return bool(
        array.ndim == 1 and array.size and np.isfinite(array).all() and min(array) >= 0
    )


_RANGES = {
    "label_smoothing": (0, 1),
    "delta": (0, np.inf),
    "temperature": (0, np.inf),
    "margin": (0, np.inf),
}
"""What a setting must be between; its default is possible too."""
