"""The operations of attention, with its projections or without, and of mixtures of experts."""

from __future__ import annotations

import math
from collections.abc import Callable

from onnx_adapt.graph.operations import NodeRun, given

Count = Callable[[NodeRun], int]
"""How many operations a node has; a LookupError if an input that tells it is left out."""


def _scores(rows: int, keys: int, wide: int) -> int:
    """Queries by keys and probabilities by values; `wide` is both widths of all heads."""
    return 2 * rows * keys * wide


def _length(run: NodeRun, place: int) -> int:
    """How many keys are there from before, in a `(batch, heads, length, size)`."""
    return run.input(place)[2] if run.has(place) else 0


def attention(run: NodeRun) -> int:
    """ONNX's: `(batch, heads, length, size)`, or `(batch, length, width)`."""
    query, keys, made = run.input(0), run.input(1), given(run.outputs[0])
    by_head = len(query) == 4
    width = query[1] * query[3] + made[1] * made[3] if by_head else query[2] + made[2]
    length = keys[2 if by_head else 1] + _length(run, 4)
    return _scores(query[0] * query[2 if by_head else 1], length, width)


def projecting_attention(past: int) -> Count:
    """`(batch, length, in)` by `(in, q + k + v)`.

    The past is `(2, batch, heads, length, size)`.
    """

    def count(run: NodeRun) -> int:
        if run.attributes.get("past_present_share_buffer"):
            raise LookupError  # then the past is as long as it may become
        batch, length, _ = run.input(0)
        columns, made = run.input(1)[1], given(run.outputs[0])[2]
        width = run.attributes.get("qkv_hidden_sizes", [columns // 3])[0] + made
        before = run.input(past)[3] if run.has(past) else 0
        projected = batch * length * (2 * math.prod(run.input(1)) + columns * run.has(2))
        return projected + _scores(batch * length, length + before, width)

    return count


def multi_head(run: NodeRun) -> int:
    """com.microsoft's: query, keys and values apart, or packed on an axis of their own."""
    query, (batch, length, out) = run.input(0), given(run.outputs[0])
    if run.has(8):
        raise LookupError  # keys lie in a buffer that is as long as it may become
    wide = query[2] * query[4] if len(query) == 5 else query[2]
    keys = run.input(1) if run.has(1) else query
    new = keys[2] if len(keys) == 4 else keys[1]
    added = length * wide + (new * (wide + out) if len(keys) != 4 else 0)
    bias = batch * added if run.has(3) else 0
    return _scores(batch * length, new + _length(run, 6), wide + out) + bias


def grouped_query(run: NodeRun) -> int:
    """Heads share keys; the second output is `(batch, heads, keys, size)`."""
    batch, length, out = given(run.outputs[0])
    present = run.outputs[1] if len(run.outputs) > 1 else None
    keys = present[2] if present else length + _length(run, 3)
    return _scores(batch * length, keys, 2 * out)


def experts(*weights: int, packed: bool = False) -> Count:
    """Each row meets `k` of the experts, and the weights `(experts, .., ..)` of these."""

    def count(run: NodeRun) -> int:
        rows = math.prod(run.input(0)[:-1]) * int(run.attributes.get("k", 1))
        each = sum(math.prod(run.input(place)[1:]) for place in weights if run.has(place))
        bits = int(run.attributes.get("expert_weight_bits", 4)) if packed else 8
        return 2 * rows * each * 8 // bits

    return count
