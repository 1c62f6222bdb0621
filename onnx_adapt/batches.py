"""The batch of a model: where it lies in inputs and outputs, taken apart and put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import RunError

Shape = Sequence[int | str | None]
"""A declared shape: a number, a symbol or None for each axis."""

BatchAxis = int | Mapping[str, int | None] | None
"""The batch axis: of everything, of what is named (None: has none), or to be found."""


@dataclass(frozen=True, slots=True)
class BatchAxes:
    """Where the batch lies.

    Attributes:
        inputs: The batch axis of each input, None where it has none.
        outputs: The same of each output.
        fixed: Whether the model takes batches of one size only.
    """

    inputs: Mapping[str, int | None]
    outputs: Mapping[str, int | None]
    fixed: bool


def find_batch(
    inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], given: BatchAxis
) -> BatchAxes:
    """Find the batch axis: the symbol called so, or what leads the inputs.

    Args:
        inputs: The declared shape of each input that must be fed.
        outputs: The declared shape of each output.
        given: What the user says about it.

    Raises:
        RunError: If the user names an axis that is not there.
    """
    shapes = {**inputs, **outputs}
    named = dict(given) if isinstance(given, Mapping) else {}
    if unknown := sorted(named.keys() - shapes.keys()):
        raise RunError(
            f"batch_axis names {unknown[0]!r}, which is no input or output of the model",
            hint=f"it has {', '.join(shapes)}",
        )
    batch = _batch_dim(inputs)
    axes = {name: _axis(shape, batch) for name, shape in shapes.items()}
    if isinstance(given, int):
        axes = {name: given if len(shape) > given else None for name, shape in shapes.items()}
    axes |= named
    for name, axis in axes.items():
        if axis is not None and not 0 <= axis < len(shapes[name]):
            raise RunError(
                f"batch_axis {axis} is no axis of {name!r}, which has {len(shapes[name])}",
                hint="axes count from 0",
            )
    sizes = [shape[axis] for name, shape in inputs.items() if (axis := axes[name]) is not None]
    return BatchAxes(
        {name: axes[name] for name in inputs},
        {name: axes[name] for name in outputs},
        any(isinstance(size, int) and size > 1 for size in sizes),
    )


def _batch_dim(inputs: Mapping[str, Shape]) -> int | str | None:
    """The batch as inputs declare it: a symbol; None where it has none; a fixed size."""
    leading = [shape[0] for shape in inputs.values() if shape]
    symbols = [dim for shape in inputs.values() for dim in shape if isinstance(dim, str)]
    called = [symbol for symbol in symbols if "batch" in symbol.lower()]
    named = called + [dim for dim in leading if isinstance(dim, str)]
    return named[0] if named else None if None in leading else next(iter(leading), None)


def _axis(shape: Shape, batch: int | str | None) -> int | None:
    for axis, dim in enumerate(shape):
        named = isinstance(dim, str) and (dim == batch or "batch" in dim.lower())
        if named or (axis == 0 and (dim is None or dim == batch)):
            return axis
    return None


def count_rows(axes: BatchAxes, feeds: Mapping[str, Any], rows: int) -> None:
    """Check that a batch has as many rows as adapters were given.

    Raises:
        RunError: If it has not.
    """
    found = False
    for name, value in feeds.items():
        axis = axes.inputs.get(name)
        if axis is None:
            continue
        found = True
        shape = np.shape(value)
        if len(shape) <= axis or shape[axis] != rows:
            raise RunError(
                f"the number of adapters given is {rows}; input {name!r} has the shape "
                f"{list(shape)} with its rows on axis {axis}",
                hint="give one adapter (or None) for each row; or say batch_axis=",
            )
    if not found:
        raise RunError(
            "no input of the model has a batch axis that could be found",
            hint="say which it is with batch_axis=",
        )


def take_rows(
    axes: BatchAxes, feeds: Mapping[str, Any], rows: Sequence[int]
) -> dict[str, Any]:
    """The feeds of some rows of a batch; what has no batch axis goes to all of them."""
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
            hint="ask for the others with outputs=, or say batch_axis=",
        )
    rest = np.moveaxis(first, axis, 0).shape[1:]
    whole = np.empty((total, *rest), first.dtype)
    for rows, piece in pieces:
        aligned = np.moveaxis(piece, axis, 0)
        if len(aligned) != (total if fixed else len(rows)):
            raise RunError(
                f"output {name!r} has the shape {list(piece.shape)} for {len(rows)} rows: its "
                f"axis {axis} is not the batch",
                hint="say which axis is with batch_axis=",
            )
        if aligned.shape[1:] != rest:
            raise RunError(
                f"output {name!r} has another shape for each adapter: {list(first.shape)}, "
                f"{list(piece.shape)}",
                hint="run these rows one at a time",
            )
        whole[rows] = aligned[rows] if fixed else aligned
    return np.ascontiguousarray(np.moveaxis(whole, 0, axis))
