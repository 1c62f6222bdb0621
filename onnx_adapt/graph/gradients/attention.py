"""Attentions of ONNX Runtime as plain nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_adapt.graph.gradients.lowered_layers import dequantised
from onnx_adapt.graph.gradients.rotary import rotate
from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.gradients.tape import INT64, Tape

# All are `softmax(scale * q @ k.T + masks) @ v` for each head, with q, k and v of
# `(batch, heads, positions, size)`. They differ in where q, k and v come from and in what is
# masked. A position that is masked gets a large negative number added, so that its share of
# the softmax is 0. Queries are counted from the first one that is not in the past: with 5
# positions in the past, query 0 is at position 5 and sees keys 0 to 5.


@dataclass(slots=True)
class _Heads:
    """What an attention is computed from.

    Attributes:
        q: Queries, `(batch, heads, queries, size)`.
        k: Keys, `(batch, heads, keys, size)`.
        v: Values, `(batch, heads, keys, size)`.
        added: What is added to the scores, each broadcast to `(batch, heads, queries, keys)`.
        scale: The factor of the scores; 0 for `1 / sqrt(size)`.
        softcap: The bound of the scores; 0 for none.
    """

    q: str
    k: str
    v: str
    added: list[str] = field(default_factory=list)
    scale: float = 0.0
    softcap: float = 0.0


def _attend(tape: Tape, heads: _Heads, size: int) -> str:
    """The attention itself: `(batch, queries, heads * size of values)`."""
    scale = heads.scale or 1 / math.sqrt(size)
    turned = tape.add("Transpose", heads.k, perm=[0, 1, 3, 2])
    scores = tape.times(tape.add("MatMul", heads.q, turned), scale)
    if heads.softcap:
        bounded = tape.add("Tanh", tape.times(scores, 1 / heads.softcap))
        scores = tape.times(bounded, heads.softcap)
    for item in heads.added:
        scores = tape.add("Add", scores, item)
    shares = tape.add("Softmax", scores, axis=-1)
    made = tape.add("Transpose", tape.add("MatMul", shares, heads.v), perm=[0, 2, 1, 3])
    return tape.add("Reshape", made, tape.integers(0, 0, -1))


def split_heads(tape: Tape, tensor: str, count: int) -> str:
    """`(batch, positions, heads * size)` as `(batch, heads, positions, size)`."""
    parts = tape.add("Reshape", tensor, tape.integers(0, 0, count, -1))
    return tape.add("Transpose", parts, perm=[0, 2, 1, 3])


def _part(tape: Tape, tensor: str, ends: Sequence[int], number: int, axis: int) -> str:
    """One of the parts of an axis, which end where they end."""
    start, end = ends[number : number + 2]
    limits = (tape.integers(start), tape.integers(end), tape.integers(axis))
    return tape.add("Slice", tensor, *limits)


def _length(tape: Tape, tensor: str, axis: int) -> str:
    """The size of an axis in a run, as a scalar."""
    size = tape.add("Shape", tensor, start=axis, end=axis + 1, elem_type=INT64)
    return tape.squeezed(size, 0)


def _counted(tape: Tape, length: str) -> str:
    """`0, 1, ... length - 1`."""
    zero, one = (tape.constant(np.array(value, np.int64)) for value in (0, 1))
    return tape.add("Range", zero, length, one, elem_type=INT64)


def _masking(tape: Tape, visible: str, like: str, filler: float | None = None) -> str:
    """What is added to scores: 0 where a key is visible, a large negative number elsewhere."""
    lowest = float(np.finfo(tape.dtype(like)).min) / 2
    hidden = lowest if filler is None else max(filler, lowest)
    return tape.where(visible, tape.number(0, like), tape.number(hidden, like))


def _causal(tape: Tape, heads: _Heads) -> str:
    """Which keys each query sees, of those at its own position and before: `(q, k)`."""
    queries, keys = _length(tape, heads.q, 2), _length(tape, heads.k, 2)
    first = tape.add("Sub", keys, queries)
    own = tape.add("Add", _counted(tape, queries), first)
    place = _counted(tape, keys)
    return tape.compare("GreaterOrEqual", tape.unsqueezed(own, 1), tape.unsqueezed(place, 0))


def _key_mask(tape: Tape, step: Step, mask: str, heads: _Heads) -> str:
    """Which keys are visible, of a mask in any of ONNX Runtime's forms.

    It is a number for each key (`(batch, keys)`, or for each query too), or the number of
    keys of each row, `(batch,)`, which the first keys that count may follow, `(2 * batch,)`.
    """
    rank = tape.rank(mask)
    if rank == 2:
        seen = tape.compare("Greater", mask, tape.number(0, mask))
        return tape.unsqueezed(seen, 1, 2)
    if rank == 3:
        seen = tape.compare("Greater", mask, tape.number(0, mask))
        return tape.unsqueezed(seen, 1)
    if rank != 1:
        raise step.refuse(f"its mask has {rank} axes")
    wide = tape.cast(mask, INT64)
    batch = tape.add("Shape", heads.q, start=0, end=1, elem_type=INT64)
    zero = tape.integers(0)
    ends = tape.add("Slice", wide, zero, batch)
    padded = tape.add("Concat", wide, tape.add("Expand", zero, batch), axis=0)
    starts = tape.add("Slice", padded, batch, tape.add("Add", batch, batch))
    place = _counted(tape, _length(tape, heads.k, 2))
    ends, starts = (tape.unsqueezed(item, 1) for item in (ends, starts))
    before_end = tape.compare("Less", place, ends)
    seen = tape.add("And", before_end, tape.compare("GreaterOrEqual", place, starts))
    return tape.unsqueezed(seen, 1, 2)


def _with_past(tape: Tape, heads: _Heads, past_k: str, past_v: str) -> None:
    """Put keys and values of earlier runs before those of this one."""
    heads.k = tape.add("Concat", past_k, heads.k, axis=2)
    heads.v = tape.add("Concat", past_v, heads.v, axis=2)


def attention(tape: Tape, step: Step, x: str = "", weights: str = "") -> str:
    """Attention: one product makes q, k and v side by side.

    Args:
        tape: Where nodes are added.
        step: The node.
        x: What it reads, if not the first input.
        weights: Its weights, if not the second input.
    """
    mask, past, bias = step.input(3), step.input(4), step.input(5)
    if step.attribute("do_rotary", 0) or step.attribute("past_present_share_buffer", 0):
        raise step.refuse("it turns positions, or shares a buffer with its past")
    sides = tape.add("MatMul", x or step.input(0), weights or step.input(1))
    if step.input(2):
        sides = tape.add("Add", sides, step.input(2))
    return attend_packed(tape, step, sides, mask, past, bias)


def attend_packed(tape: Tape, step: Step, sides: str, mask: str, past: str, bias: str) -> str:
    """Attention from q, k and v side by side, `(batch, positions, 3 * width)`."""
    count = step.attribute("num_heads", 0)
    sizes = step.attribute("qkv_hidden_sizes", None) or _thirds(tape, step)
    ends = np.cumsum([0, *sizes]).tolist()
    q, k, v = (split_heads(tape, _part(tape, sides, ends, i, 2), count) for i in range(3))
    heads = _Heads(q, k, v, scale=step.attribute("scale", 0.0))
    if past:
        _with_past(tape, heads, *(_half(tape, past, i) for i in range(2)))
    filler = step.attribute("mask_filter_value", -10000.0)
    if mask:
        visible = _key_mask(tape, step, mask, heads)
        heads.added.append(_masking(tape, visible, q, filler))
    if step.attribute("unidirectional", 0):
        heads.added.append(_masking(tape, _causal(tape, heads), q))
    heads.added += [bias] if bias else []
    return _attend(tape, heads, sizes[0] // count)


def _half(tape: Tape, past: str, item: int) -> str:
    """Keys or values of `(2, batch, heads, positions, size)`."""
    return tape.add("Gather", past, tape.constant(np.array(item, np.int64)), axis=0)


def _thirds(tape: Tape, step: Step) -> list[int]:
    width = tape.shape(step.input(1))[-1]
    if not isinstance(width, int):
        raise step.refuse("the width of its weights is not known")
    return [width // 3] * 3


def quantised_attention(tape: Tape, step: Step) -> str:
    """QAttention: an Attention of 8-bit integers, computed in floats."""
    x = dequantised(tape, step, (0, 3, 6))
    weights = dequantised(tape, step, (1, 4, 7), axis=1)
    sides = tape.add("Add", tape.add("MatMul", x, weights), step.input(2))
    return attend_packed(tape, step, sides, step.input(5), step.input(8), "")


def multi_head_attention(tape: Tape, step: Step) -> str:
    """MultiHeadAttention: q, k and v of their own."""
    query, key, value, bias, mask, added, past_k, past_v = (step.input(i) for i in range(8))
    if not key or not value or tape.rank(key) != 3 or step.input(8):
        raise step.refuse("its keys or values are packed, or kept in a buffer")
    count = step.attribute("num_heads", 0)
    sides = [query, key, value]
    if bias:
        sides = _biased(tape, step, sides, bias)
    q, k, v = (split_heads(tape, side, count) for side in sides)
    heads = _Heads(q, k, v, scale=step.attribute("scale", 0.0))
    if past_k:
        _with_past(tape, heads, past_k, past_v)
    if mask:
        filler = step.attribute("mask_filter_value", -10000.0)
        heads.added.append(_masking(tape, _key_mask(tape, step, mask, heads), q, filler))
    if step.attribute("unidirectional", 0):
        heads.added.append(_masking(tape, _causal(tape, heads), q))
    heads.added += [added] if added else []
    return _attend(tape, heads, _size(tape, step, query, count))


def _biased(tape: Tape, step: Step, sides: list[str], bias: str) -> list[str]:
    widths = [tape.shape(side)[-1] for side in sides]
    if not all(isinstance(width, int) for width in widths):
        raise step.refuse("its inputs are of unknown width")
    ends = np.cumsum([0, *widths]).tolist()
    return [
        tape.add("Add", side, _part(tape, bias, ends, i, 0)) for i, side in enumerate(sides)
    ]


def _size(tape: Tape, step: Step, query: str, count: int) -> int:
    """The size of a head."""
    width = tape.shape(query)[-1]
    if not isinstance(width, int):
        raise step.refuse("its queries are of unknown width")
    return width // count


def grouped_attention(tape: Tape, step: Step) -> str:
    """GroupQueryAttention: causal, with fewer heads of keys and values than of queries.

    Each row has `total = seqlens_k + 1` positions, of which the last `queries` are new, so
    `past = total - queries` of those that are kept count. Rows of another length may follow,
    padded at the end; what queries in the padding see does not matter.
    """
    query, key, value, past_k, past_v, lengths, _, cos, sin = (step.input(i) for i in range(9))
    shares = step.attribute("smooth_softmax", 0) == 1 or step.input(11)
    if shares or step.attribute("k_quant_type", "NONE") != "NONE":
        raise step.refuse("it has a sink for the softmax, or a quantised past")
    count, few = step.attribute("num_heads", 0), step.attribute("kv_num_heads", 0)
    if key:
        size = _size(tape, step, query, count)
    else:
        size = _size(tape, step, query, count + 2 * few)
        ends = np.cumsum([0, count * size, few * size, few * size]).tolist()
        query, key, value = (_part(tape, query, ends, i, 2) for i in range(3))
    q, k, v = (split_heads(tape, t, n) for t, n in ((query, count), (key, few), (value, few)))
    heads = _Heads(q, k, v, scale=step.attribute("scale", 0.0))
    heads.softcap = step.attribute("softcap", 0.0)
    places = _Places.of(tape, heads, lengths, past_k)
    if step.attribute("do_rotary", 0):
        position = step.input(9) or places.own
        mixed = bool(step.attribute("rotary_interleaved", 0))
        heads.q, heads.k = (rotate(tape, t, position, cos, sin, mixed) for t in (q, k))
    if past_k:
        _with_past(tape, heads, past_k, past_v)
    heads.k, heads.v = (_repeated(tape, t, count // few, size) for t in (heads.k, heads.v))
    window = step.attribute("local_window_size", -1)
    heads.added.append(_masking(tape, places.visible(tape, window), q))
    heads.added += [step.input(10)] if step.input(10) else []
    return _attend(tape, heads, size)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the queries and keys of a grouped attention are, in positions of their row.

    Attributes:
        own: Of each query and each new key, `(batch, queries)`.
        kept: Of each kept key, `(1, keys)`; '' without a past.
        past: How many kept keys of each row count, `(batch, 1)`.
    """

    own: str
    kept: str
    past: str

    @classmethod
    def of(cls, tape: Tape, heads: _Heads, lengths: str, past_k: str) -> _Places:
        """The places of a node's queries and keys."""
        queries = _length(tape, heads.q, 2)
        order = tape.unsqueezed(_counted(tape, queries), 0)
        column = tape.add("Reshape", tape.cast(lengths, INT64), tape.integers(-1, 1))
        zero = tape.constant(np.array(0, np.int64))
        past = zero
        if past_k:  # the padding of a row without a past is no negative past
            total = tape.plus(column, 1)
            past = tape.add("Max", tape.add("Sub", total, queries), zero)
            kept = tape.unsqueezed(_counted(tape, _length(tape, past_k, 2)), 0)
            return cls(tape.add("Add", order, past), kept, past)
        own = tape.add("Add", order, tape.add("Mul", column, zero))
        return cls(own, "", past)

    def visible(self, tape: Tape, window: int) -> str:
        """Which keys each query sees: `(batch, 1, queries, keys)`."""
        queries = tape.unsqueezed(self.own, 2)
        sides = [(tape.unsqueezed(self.own, 1), "")]
        if self.kept:
            counts = tape.compare("Less", self.kept, self.past)
            sides.insert(0, (tape.unsqueezed(self.kept, 1), tape.unsqueezed(counts, 1)))
        parts = []
        for keys, counts in sides:
            seen = tape.compare("GreaterOrEqual", queries, keys)
            if window > 0:
                near = tape.compare(
                    "Less", tape.add("Sub", queries, keys), tape.number(window, keys)
                )
                seen = tape.add("And", seen, near)
            parts.append(tape.add("And", seen, counts) if counts else seen)
        joined = parts[0] if len(parts) == 1 else tape.add("Concat", *parts, axis=2)
        return tape.unsqueezed(joined, 1)


def _repeated(tape: Tape, tensor: str, times: int, size: int) -> str:
    """Each head of keys or values for several heads of queries."""
    if times == 1:
        return tensor
    wide = tape.unsqueezed(tensor, 2)
    shape = tape.integers(1, 1, times, 1, 1)
    merged = tape.add("Shape", tensor, elem_type=INT64)
    batch, length = (
        tape.add("Slice", merged, tape.integers(i), tape.integers(i + 1)) for i in (0, 2)
    )
    whole = tape.joined(batch, tape.integers(-1), length, tape.integers(size))
    return tape.add("Reshape", tape.add("Expand", wide, shape), whole)


ATTENTION = {
    "Attention": attention,
    "QAttention": quantised_attention,
    "MultiHeadAttention": multi_head_attention,
    "GroupQueryAttention": grouped_attention,
}
"""How attentions are lowered, by operator."""
