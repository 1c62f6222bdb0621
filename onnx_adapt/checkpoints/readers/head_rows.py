"""Rows of query and key projections that a library keeps in another order within each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.readers.saved import number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

# Rotary embeddings turn pairs of rows of each head. Meta, torchtune and llama.cpp keep the two
# rows of a pair side by side; Hugging Face keeps all first rows, then all second rows. For a
# head of 6 rows:
#
#     pairs side by side   a0 b0 a1 b1 a2 b2
#     halves               a0 a1 a2 b0 b1 b2


def halves_of_pairs(rows: Array, heads: int) -> Array:
    """Put rows whose pairs are side by side into Hugging Face's order, head by head.

    Args:
        rows: `(heads * size, ...)`.
        heads: The number of heads.

    Raises:
        CheckpointError: If the rows are not that many heads of an even size.

    Example:
        >>> import numpy as np
        >>> halves_of_pairs(np.array([0, 10, 1, 11, 2, 12]), 1)
        array([ 0,  1,  2, 10, 11, 12])
    """
    size, rest = divmod(len(rows), heads)
    if rest or size % 2:
        raise CheckpointError(
            f"{len(rows)} rows are not {heads} heads of an even size",
            hint="is the config.json that of another base?",
        )
    paired = rows.reshape(heads, size // 2, 2, *rows.shape[1:])
    return np.swapaxes(paired, 1, 2).reshape(rows.shape)


def count_heads(base: Mapping[str, Any], module: str) -> int:
    """The number of heads of a query or key projection, by the base's config.json.

    Raises:
        CheckpointError: If the configuration does not say.
    """
    heads = base.get("num_attention_heads")
    if module.endswith("k_proj"):
        heads = base.get("num_key_value_heads") or heads
    count = number(heads, "the number of heads in config.json")
    if count < 1 or count != int(count):
        raise CheckpointError(f"config.json says {heads!r} heads")
    return int(count)
