"""Find the batch axis of inputs and outputs, and split and join batches along it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import RunError

Shape = Sequence[int | str | None]
"""A declared shape: a number, a symbol or None for each axis."""

BatchAxis = int | Mapping[str, int | None] | None
"""The axis for all tensors; or by name, None for a tensor without one; or None to find it."""


_BATCH = re.compile(r"batch|^(n|b|bs)$", re.IGNORECASE)
_LENGTH = re.compile(r"seq|len|time|frame|token|step|past|cache|^[tls]$", re.IGNORECASE)
_NAMELESS = re.compile(r"^[su]\d+$|^unk__\d+$|dynamic_axes_\d+$")
"""Names of a batch dimension, names of other dimensions, and names that exporters make up."""


@dataclass(frozen=True, slots=True)
class BatchAxes:
    """The batch axis of each input and output.

    Attributes:
        inputs: The batch axis of each input, None where it has none.
        outputs: The same of each output.
        fixed: Whether the model takes batches of one size only.
        unclear: Why the batch axis is not known, or ''.
    """

    inputs: Mapping[str, int | None]
    outputs: Mapping[str, int | None]
    fixed: bool = False
    unclear: str = ""


def find_batch(
    inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], given: BatchAxis
) -> BatchAxes:
    """Find the batch axes: by a symbol named like a batch, or the first one of all inputs.

    Args:
        inputs: The declared shape of each input that must be fed.
        outputs: The declared shape of each output; nothing is known of an empty one.
        given: The axis or axes that the user gave.

    Raises:
        RunError: If the user gave an axis or a tensor that does not exist.
    """
    known = _given(inputs, outputs, given)
    unclear = ""
    if isinstance(given, int):
        found = {name: given if len(shape) > given else None for name, shape in inputs.items()}
    else:
        rest = {name: shape for name, shape in inputs.items() if name not in known}
        found, unclear = _input_axes(rest)
    found = {name: known.get(name, found.get(name)) for name in inputs}
    batch = {inputs[name][axis] for name, axis in found.items() if axis is not None}
    shared = given if isinstance(given, int) else None
    ends = {
        name: known[name] if name in known else _output_axis(shape, batch, shared)
        for name, shape in outputs.items()
    }
    fixed = any(isinstance(dim, int) and dim > 1 for dim in batch)
    return BatchAxes(found, ends, fixed, unclear)


def _given(
    inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], given: BatchAxis
) -> dict[str, int | None]:
    """Check the axes that the user gave by name."""
    known = dict(given) if isinstance(given, Mapping) else {}
    shapes = {**inputs, **outputs}
    if unknown := [name for name in known if name not in shapes]:
        raise RunError(
            f"batch_axis names {unknown[0]!r}, which is no input or output of the model",
            hint=f"it has {', '.join(shapes)}",
        )
    axes = {**known, "every input": None if isinstance(given, Mapping) else given}
    for name, axis in axes.items():
        if axis is not None and (type(axis) is not int or axis < 0):
            raise RunError(
                f"batch_axis {axis!r} of {name} is no axis", hint="axes count from 0"
            )
        if axis is not None and name in known and 0 < len(shapes[name]) <= axis:
            raise RunError(
                f"{name!r} has {len(shapes[name])} axes, and batch_axis is {axis}",
                hint="axes count from 0",
            )
    return known


def _input_axes(inputs: Mapping[str, Shape]) -> tuple[dict[str, int | None], str]:
    """The batch axis of each input, and why that is not certain, or ''."""
    called = {name: _called_batch(shape) for name, shape in inputs.items()}
    leading = {name: shape[0] for name, shape in inputs.items() if shape}
    if any(axis is not None for axis in called.values()):
        for name, dim in leading.items():
            if called[name] is None and _is_nameless(dim):
                return called, f"input {name!r} does not name its axes"
        return called, ""
    free = {name: dim for name, dim in leading.items() if not isinstance(dim, int)}
    if not free:
        return _fixed_axes(inputs, leading)
    for name, dim in free.items():
        if isinstance(dim, str) and _LENGTH.search(dim):
            return called, f"input {name!r} leads with {dim!r}"
    symbols = {dim for dim in free.values() if not _is_nameless(dim)}
    if len(symbols) > 1:
        return called, f"inputs lead with {' and '.join(sorted(map(repr, symbols)))}"
    return {name: 0 if name in free else None for name in inputs}, ""


def _called_batch(shape: Shape) -> int | None:
    axes = (i for i, dim in enumerate(shape) if isinstance(dim, str) and _BATCH.search(dim))
    return next(axes, None)


def _is_nameless(dim: int | str | None) -> bool:
    return dim is None or (isinstance(dim, str) and bool(_NAMELESS.search(dim)))


def _fixed_axes(
    inputs: Mapping[str, Shape], leading: Mapping[str, int | str | None]
) -> tuple[dict[str, int | None], str]:
    """Axes of a model whose inputs all lead with numbers: the first one's is the batch."""
    for name, shape in inputs.items():
        if not all(isinstance(dim, int) for dim in shape):
            return dict.fromkeys(inputs), f"input {name!r} leads with {shape[0]}"
    size = next(iter(leading.values()), None)
    return {
        name: 0 if leading.get(name) == size and shape else None
        for name, shape in inputs.items()
    }, ""


def _output_axis(shape: Shape, batch: set[int | str | None], given: int | None) -> int | None:
    """Guess the batch axis of an output; `join_rows` checks it on the arrays of a run."""
    if given is not None:
        return given if not shape or len(shape) > given else None
    for axis, dim in enumerate(shape):
        if isinstance(dim, str) and (dim in batch or _BATCH.search(dim)):
            return axis
    if not shape:
        return 0
    if isinstance(shape[0], int):
        return 0 if shape[0] in batch else None
    return None if isinstance(shape[0], str) and _LENGTH.search(shape[0]) else 0


def count_rows(axes: BatchAxes, feeds: Mapping[str, Any], rows: int) -> None:
    """Check that a batch has as many rows as adapters were given.

    Raises:
        RunError: If it has another number of rows, or the batch axis is not known.
    """
    if axes.unclear or not any(axis is not None for axis in axes.inputs.values()):
        why = axes.unclear or "no input of the model has an axis for it"
        raise RunError(f"which axis is the batch is not clear: {why}", hint=_SAY)
    for name, axis in axes.inputs.items():
        if axis is None or name not in feeds:
            continue
        shape = np.shape(feeds[name])
        if len(shape) <= axis or shape[axis] != rows:
            raise RunError(
                f"the number of adapters given is {rows}; input {name!r} has the shape "
                f"{list(shape)} with its rows on axis {axis}",
                hint=f"give one adapter, or none, for each row; {_SAY}",
            )


_SAY = "say which axis it is: --batch-axis"


def take_rows(
    axes: BatchAxes, feeds: Mapping[str, Any], rows: Sequence[int]
) -> dict[str, Any]:
    """Take the feeds of some rows of a batch; inputs without a batch axis stay whole."""
    taken = dict(feeds)
    for name, axis in axes.inputs.items():
        if axis is not None and name in taken:
            taken[name] = np.take(taken[name], rows, axis)
    return taken


def join_rows(
    axes: BatchAxes,
    outputs: Sequence[str],
    groups: Sequence[tuple[Sequence[int], Sequence[Any]]],
) -> dict[str, Array]:
    """Put the outputs of groups of rows back in the order of the batch.

    Args:
        axes: Where the batch lies.
        outputs: The names of the outputs.
        groups: The rows of each group, and their outputs in the order of the names.

    Raises:
        RunError: If an output has no batch axis, or the groups' outputs do not fit.
    """
    joined: dict[str, Array] = {}
    for i, name in enumerate(outputs):
        pieces = [(rows, values[i]) for rows, values in groups]
        joined[name] = _join(name, axes.outputs[name], pieces, fixed=axes.fixed)
    return joined


def _join(
    name: str,
    axis: int | None,
    pieces: Sequence[tuple[Sequence[int], Any]],
    *,
    fixed: bool,
) -> Array:
    total = sum(len(rows) for rows, _ in pieces)
    first = pieces[0][1]
    if axis is None or not isinstance(first, np.ndarray) or first.ndim <= axis:
        raise RunError(
            f"output {name!r} has no batch axis: it would be another one for each adapter",
            hint=f"ask for the others with outputs=, or {_SAY}",
        )
    rest = np.moveaxis(first, axis, 0).shape[1:]
    whole = np.empty((total, *rest), first.dtype)
    for rows, piece in pieces:
        aligned = np.moveaxis(piece, axis, 0)
        if len(aligned) != (total if fixed else len(rows)):
            raise RunError(
                f"output {name!r} has the shape {list(piece.shape)} for {len(rows)} rows: its "
                f"axis {axis} is not the batch",
                hint=_SAY,
            )
        if aligned.shape[1:] != rest:
            raise RunError(
                f"output {name!r} has another shape for each adapter: {list(first.shape)}, "
                f"{list(piece.shape)}",
                hint="run these rows one at a time",
            )
        whole[rows] = aligned[rows] if fixed else aligned
    return np.ascontiguousarray(np.moveaxis(whole, 0, axis))
