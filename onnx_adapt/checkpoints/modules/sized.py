"""Give updates that depend on the sizes of their module those that it has in the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from onnx_adapt.checkpoints.edits import BySize, Edit
from onnx_adapt.checkpoints.modules.by_name import ByName
from onnx_adapt.checkpoints.modules.by_value import ByValue
from onnx_adapt.checkpoints.modules.inner_weights import InnerWeight
from onnx_adapt.graph.layers import find_weight


def sized(
    edits: Iterable[Edit],
    parts: Mapping[str, tuple[str, ...]],
    names: Mapping[str, str],
    finder: ByName | ByValue,
) -> Iterator[Edit]:
    """Make the updates that depend on the sizes of their module; others are as they were.

    Args:
        edits: The edits.
        parts: For each module, itself or those that the graph has instead of it.
        names: The graph's path for each of these.
        finder: Finds them in the graph.

    Raises:
        CheckpointError: If a module is not in the graph, or the update does not fit it.
    """
    for edit in edits:
        if isinstance(edit, BySize):
            sizes = [_sizes(names[part], finder) for part in parts[edit.module]]
            yield edit.make(sizes[0][0], sum(outputs for _, outputs in sizes))
        else:
            yield edit


def _sizes(path: str, finder: ByName | ByValue) -> tuple[int, int]:
    """The `in` and `out` of a module of the graph."""
    for call in finder.calls(path):
        return call.sizes
    for weight in finder.inner_weights(path):
        return _inner_sizes(weight)
    raise finder.missing(path)


def _inner_sizes(inner: InnerWeight) -> tuple[int, int]:
    """The `in` and `out` of a module whose weight is inside an operator."""
    weight = find_weight(inner.view, inner.tensor)
    rows, columns = weight.dims[-2:] if weight else (0, 0)
    inputs, outputs = (rows, columns) if inner.in_out else (columns, rows)
    return inputs, inner.span[1] - inner.span[0] if inner.span else outputs
