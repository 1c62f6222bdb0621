"""Choose how rows with different adapters run: all in one run, or each adapter's in its own.

Either way the base computes every row once. Separate runs read its weights once more for each
run but the first, and one run computes every adapter for every row. The costs that differ are
compared in multiplications:

    one run        positions of all rows * weights of all adapters
    separate runs  positions of the rows of each run * weights of its adapters
                   + (runs - 1) * weights of the base * READ

An example: 8 rows of 16 positions, each row with an adapter of its own of 0.6 M weights, on a
base of 14 M. One run costs 128 * 8 * 0.6 M = 614 M, and 8 runs cost 8 * 16 * 0.6 M + 7 * 14 M
* 10 = 1057 M: it is one run. With 32 positions it is 1229 M against 1134 M: it is eight.

Weights are counted by their bytes, because those of 4 bits are read eight times as fast.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import ModelFileError
from onnx_adapt.session.batches import BatchAxes, Shape
from onnx_adapt.session.cache import Shares
from onnx_adapt.session.fed_arrays import IDS

if TYPE_CHECKING:
    from onnx_adapt.model.given import ModelLike

READ = 10
"""How many multiplications take as long as reading one weight from memory.

Measured with ONNX Runtime 1.32 on an AMD EPYC, one thread: a run on `n` positions takes as
long as `n + 10` of them would if weights were free to read (`docs/mixed-batches.md`).
"""

_TABLES = ("Gather", "GatherBlockQuantized")
"""Operators that read a few rows of their first input, and not all of it."""


def is_one_run_faster(base: int, positions: int, groups: Mapping[Shares, list[int]]) -> bool:
    """Whether one run of all rows takes less time than a run for each group of rows.

    Args:
        base: The size of the base's weights, in bytes.
        positions: How many positions a row has.
        groups: The rows of each adapter, blend, or of the base.
    """
    used = {item for shares in groups for item, _ in shares}
    rows = sum(map(len, groups.values()))
    together = rows * sum(item.size for item in used)
    apart = sum(len(r) * sum(item.size for item, _ in shares) for shares, r in groups.items())
    return positions * (together - apart) < (len(groups) - 1) * base * READ


def positions_in_a_row(
    axes: BatchAxes, declared: Mapping[str, Shape], feeds: Mapping[str, Array]
) -> int:
    """How many positions a row has, as far as the inputs tell.

    They are the other axes than the batch of `input_ids` or else of the first input. The
    last axis of floats is not counted if its size is fixed: `(batch, 16, 768)` has 16.
    """
    for name in sorted(declared, key=lambda name: name != IDS):
        axis = axes.inputs.get(name)
        if axis is None or name not in feeds:
            continue
        sizes = list(feeds[name].shape)
        fixed = bool(declared[name]) and isinstance(declared[name][-1], int)
        if fixed and feeds[name].dtype.kind == "f" and axis < len(sizes) - 1:
            sizes.pop()
        return math.prod(np.delete(sizes, axis).tolist())
    return 1


def base_size(model: ModelLike) -> int:
    """The size of the weights that a run reads whole, in bytes.

    Those that can be fed are not counted: they are the slots' own. Of an .ort file, which
    ONNX Runtime alone reads, it is the size of the file.
    """
    from onnx_adapt.model import walk
    from onnx_adapt.model.external_data import bytes_needed
    from onnx_adapt.model.given import as_model

    try:
        graph = as_model(model).proto.graph
    except ModelFileError:
        assert isinstance(model, str | os.PathLike)  # ONNX Runtime has loaded it by its path
        return os.stat(model).st_size
    fed = {item.name for item in graph.input}
    tables = {node.input[0] for node in graph.node if node.op_type in _TABLES}
    for node in graph.node:
        tables.difference_update(node.input[1:] if node.op_type in _TABLES else node.input)
    return sum(
        bytes_needed(tensor)
        for tensor in walk.graph_tensors(graph, sparse=False)
        if tensor.name not in fed and tensor.name not in tables
    )
