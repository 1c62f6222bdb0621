"""The two factors of a low-rank update, sorted by module and checked, for every library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def sort_by_module(
    tensors: Mapping[str, Array], endings: Mapping[str, str]
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Sort tensors into those of adapted modules, by module and part, and all others by key.

    Args:
        tensors: The tensors by key.
        endings: What a key ends with, and the part that it is: `{".lora_a": "a"}`.

    Example:
        >>> import numpy as np
        >>> one = np.ones(2)
        >>> modules, others = sort_by_module({"q.lora_a": one, "norm": one}, {".lora_a": "a"})
        >>> list(modules), list(modules["q"]), list(others)
        (['q'], ['a'], ['norm'])
    """
    modules: dict[str, dict[str, Array]] = {}
    others: dict[str, Array] = {}
    for key, value in tensors.items():
        ending = next((end for end in endings if key.endswith(end) and key != end), None)
        if ending is None:
            others[key] = value
        else:
            modules.setdefault(key.removesuffix(ending), {})[endings[ending]] = value
    return modules, others


def refuse_others(others: Mapping[str, Array], known: str) -> None:
    """Refuse tensors that are no part of an adapted module.

    Raises:
        CheckpointError: If there are any; with the first of them, and what is known.
    """
    for key in others:
        raise CheckpointError(
            f"the checkpoint has {key!r}, which is of no known kind", hint=f"{known} is known"
        )


def low_rank(
    module: str,
    a: Array,
    b: Array,
    scale: float,
    *,
    magnitude: Array | None = None,
) -> LowRank:
    """Make the edit of one module from its two factors, in PyTorch's layout.

    Args:
        module: The module's path.
        a: `(r, in)`.
        b: `(out, r)`.
        scale: What multiplies their product.
        magnitude: DoRA's `(out,)`, which does not multiply the bias, or None.

    Raises:
        CheckpointError: If they are no two matrices of one rank.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise CheckpointError(
            f"the factors of module {module!r} do not fit each other: A is {list(a.shape)}, "
            f"which is to be (r, in), and B {list(b.shape)}, which is to be (out, r)"
        )
    if magnitude is not None and magnitude.size != len(b):
        raise CheckpointError(
            f"module {module!r}: DoRA's magnitude has shape {list(magnitude.shape)}; it needs "
            f"{len(b)} numbers"
        )
    return LowRank(
        module,
        a.astype(np.float64),
        b.astype(np.float64),
        scale,
        magnitude=None if magnitude is None else magnitude.reshape(-1).astype(np.float64),
        norm_scale=scale,
    )


# LoRA of several projections that are one layer, such as q and v of a fused q, k, v, has one A
# and one B for all of them, group by group. With rank 2 and projections of 3 and 1 outputs:
#
#     A (4, in)    rows 0, 1 are the first projection's A, rows 2, 3 the second's
#     B (4, 2)     rows 0 to 2 are the first projection's B, row 3 the second's


def low_rank_groups(
    layer: str, a: Array, b: Array, scale: float, sizes: Mapping[str, int]
) -> list[LowRank]:
    """Make the edits of the projections that have their factors in one A and one B.

    Args:
        layer: The layer's path, for errors.
        a: `(groups * r, in)`.
        b: `(sum of sizes, r)`.
        scale: What multiplies each product.
        sizes: The outputs of each projection, in order, by its path.

    Raises:
        CheckpointError: If the factors are not of these sizes.
    """
    if a.ndim != 2 or b.ndim != 2 or not b.size or len(a) != len(sizes) * b.shape[1]:
        raise CheckpointError(
            f"{layer!r}: A is {list(a.shape)} and B is {list(b.shape)}, which are not "
            f"{len(sizes)} groups of one rank"
        )
    if len(b) != sum(sizes.values()):
        raise CheckpointError(
            f"{layer!r}: B has {len(b)} rows; {', '.join(sizes)} have {sum(sizes.values())}",
            hint="are the settings those of another adapter?",
        )
    rank, start = b.shape[1], 0
    edits = []
    for index, (path, rows) in enumerate(sizes.items()):
        own = a[index * rank : (index + 1) * rank]
        edits.append(low_rank(path, own, b[start : start + rows], scale))
        start += rows
    return edits


def spread_groups(b: Array, enabled: Sequence[bool]) -> Array:
    """Lay out the factor B of several projections of equal size for the one layer they are.

    Args:
        b: `(outputs of those that are enabled, r)`, block after block.
        enabled: Whether each projection of the layer has a block.

    Returns:
        `(outputs of all, r * sum(enabled))`: each block in its own rows and columns.

    Example:
        >>> import numpy as np
        >>> spread_groups(np.array([[1], [2]]), [True, False, True])
        array([[1., 0.],
               [0., 0.],
               [0., 2.]])
    """
    count, rank = sum(enabled), b.shape[1]
    size = len(b) // count
    dense = np.zeros((size * len(enabled), rank * count))
    for block, place in enumerate(i for i, on in enumerate(enabled) if on):
        rows, columns = slice(place * size, (place + 1) * size), block * rank
        dense[rows, columns : columns + rank] = b[block * size : (block + 1) * size]
    return dense
