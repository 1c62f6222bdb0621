"""The formula of a slot in float64 numpy: what `verify` and the tests hold ONNX against.

It is written once, in operations that carry a bound of the rounding errors along
(`bounds.py`), so what ONNX Runtime may be off follows from the formula itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.slot.activations import ACTIVATIONS
from onnx_adapt.slot.bounds import ARITHMETIC, Bounded, exact, seen
from onnx_adapt.slot.formula import EPSILON
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import PARTS
from onnx_adapt.slot.weights import matrices


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last axis.

    Attributes:
        weight: `(width,)`.
        bias: `(width,)` or None.
        epsilon: Added to the variance.
        centred: False for RMSNorm, which leaves the mean in.
    """

    weight: Array
    bias: Array | None = None
    epsilon: float = EPSILON
    centred: bool = True

    def __call__(self, x: Bounded) -> Bounded:
        """Normalise `(..., width)`."""
        centred = x - x.mean(-1) if self.centred else x
        deviation = (self._variance(x, centred) + self.epsilon).square_root()
        x = centred / deviation * self.weight
        return x if self.bias is None else x + self.bias

    def _variance(self, x: Bounded, centred: Bounded) -> Bounded:
        """The mean square, with the larger bound of the two ways to compute it.

        The nodes for older opsets square what is centred. ONNX Runtime's LayerNormalization
        sums `x` and `x * x` in one pass, in its kernel's own arithmetic, and takes the
        square of the mean from the mean of the squares.
        """
        variance = (centred * centred).mean(-1)
        if not self.centred:
            return variance
        inside = x.within_a_kernel()
        mean = inside.mean(-1)
        one_pass = (inside * inside).mean(-1) - mean * mean
        bound = np.maximum(variance.bound, one_pass.bound)
        return Bounded(variance.value, bound, x.arithmetic)


def slot_value(
    slot: Slot,
    target: Array,
    source: Array,
    weights: Mapping[str, Array],
    norm: Norm | None = None,
    plus: Array | None = None,
) -> Array:
    """Compute a slot's output in float64; the arguments are those of `slot_bounded`."""
    return slot_bounded(slot, target, source, weights, norm, plus).value


def slot_bounded(
    slot: Slot,
    target: Array,
    source: Array,
    weights: Mapping[str, Array],
    norm: Norm | None = None,
    plus: Array | None = None,
) -> Bounded:
    """Compute a slot's output, and how far rounding may take ONNX Runtime's from it.

    Args:
        slot: The slot.
        target: `(batch, ..., width)`, or `(batch, width, ...)` on a channel axis.
        source: The same with `source_width`; ids for a slot with a table.
        weights: The slot's weights by part, and the inputs by row of a batched slot.
        norm: The base's normalisation that `slot.norm` means.
        plus: The tensor that `slot.plus` means, of the source's shape.

    Returns:
        Value and bound, each of `target`'s shape.
    """
    with np.errstate(all="ignore"):  # the caller judges what is not finite
        return _bounded(slot, target, source, weights, norm, plus)


def _bounded(
    slot: Slot,
    target: Array,
    source: Array,
    weights: Mapping[str, Array],
    norm: Norm | None,
    plus: Array | None,
) -> Bounded:
    kind = ARITHMETIC[slot.dtype]
    named = [part for part in (*slot.parts, *slot.row_parts) if part in weights]
    w = {part: exact(weights[part], kind) for part in named}
    y = seen(target, kind)
    if "f_down" in w:
        return _coupling(slot, y, w)
    if slot.on_weight:
        return _weight_update(slot, y, w)
    x = w["table"].each(lambda rows: rows[source]) if "table" in w else seen(source, kind)
    added = None if plus is None else seen(plus, kind)
    if slot.window:
        x = x.each(lambda image: _unfolded(slot, image))
    if slot.axis == 1:
        x, y = (item.each(lambda v: np.moveaxis(v, 1, -1)) for item in (x, y))
        w = {part: w[part].each(functools.partial(_flat, part)) for part in w}
    elif slot.batched and slot.rank != 3:
        # No rows are as in the nodes: `(1, 0, width)` meets `(0, 1, r)`.
        rows = max(1, next((len(w[part].value) for part in slot.row_parts if part in w), 1))
        x, y = (item.each(lambda v: v.reshape(rows, -1, v.shape[-1])) for item in (x, y))
        added = added and added.each(lambda v: v.reshape(rows, -1, v.shape[-1]))
    out = _sum(slot, y, x, added, _with_rows(w), norm)
    if slot.axis == 1:
        return out.each(lambda v: np.moveaxis(v, -1, 1))
    return out.each(lambda v: v.reshape(target.shape))


def _sum(
    slot: Slot,
    y: Bounded,
    x: Bounded,
    added: Bounded | None,
    w: Mapping[str, Bounded],
    norm: Norm | None,
) -> Bounded:
    """Compute the whole line of the formula, with the features on the last axis."""
    out = y * w["scale"] if "scale" in w else y
    if added is not None:
        x = x + added
        out = out + added * w["residual"] if "residual" in w else out
    if "up" in w:
        read = x if norm is None else norm(x)
        out = out + read * w["skip"] if "skip" in w else out
        # The kernel of the projection may start its sum with the target.
        out = _term(slot, read, w).join(out, len(w["up"].value))
    if slot.norm_after == "sum":
        out = y + w["switch"] * (_after(w)(out) - y)
    return out


def _with_rows(w: dict[str, Bounded]) -> dict[str, Bounded]:
    """Combine the weights with their values by row; the mask is applied elsewhere."""
    together = dict(w)
    for part in w:
        row = PARTS[part].row if part in PARTS else None
        if row and row.name in w and not row.masks:
            own = w[row.name]
            together[part] = w[part] * own if row.op == "Mul" else w[part] + own
    return together


def _flat(name: str, value: Array) -> Array:
    """Bring a weight in Conv's layout, or values by row, into the layout of the formula."""
    if name not in PARTS:
        return np.moveaxis(value, 1, -1)
    if len(PARTS[name].shape) == 1:
        return value.reshape(-1)
    return value.reshape(len(value), -1).T


def _after(w: Mapping[str, Bounded]) -> Norm:
    return Norm(w["after_weight"].value, _value(w, "after_bias"))


def _value(w: Mapping[str, Bounded], part: str) -> Array | None:
    return w[part].value if part in w else None


def _term(slot: Slot, read: Bounded, w: Mapping[str, Bounded]) -> Bounded:
    x = read
    if "norm_weight" in w:
        x = Norm(w["norm_weight"].value, _value(w, "norm_bias"))(x)
    if "table" in w:
        inner = x + w["down_bias"] if "down_bias" in w else x
    else:
        inner = x.project(w["down"], w.get("down_bias"))
    hidden = ACTIVATIONS[slot.activation][1](inner)
    hidden = hidden * w["mask"] if "mask" in w else hidden
    term = hidden.project(w["up"], w.get("up_bias"))
    if "active" in w:
        flat = term.value.ndim == 2
        term = term * (w["active"].each(lambda v: v.reshape(-1, 1)) if flat else w["active"])
    term = term * w["gain"] if "gain" in w else term
    if "gate" in w:
        openness = ACTIVATIONS["sigmoid"][1](read.project(w["gate"], w.get("gate_bias")))
        term = term * openness.mean(1)
    return _after(w)(term) if slot.norm_after == "term" else term


def _weight_update(slot: Slot, y: Bounded, w: Mapping[str, Bounded]) -> Bounded:
    """Compute `scale * weight + gain * (down @ up)` for each matrix of the weight."""
    groups, rows, columns = matrices(slot.weight_shape)
    shape = y.value.shape
    y = y.each(lambda v: v.reshape(groups, rows, columns))

    def one(number: int) -> Bounded:
        own = slice(number * columns, (number + 1) * columns)
        mine = {part: w[part].each(lambda v: v[..., own]) for part in w if part != "down"}
        out = y.each(lambda v: v[number])
        out = out * mine["scale"] if "scale" in w else out
        if "up" not in w:
            return out
        down = w["down"].each(lambda v: v[number * rows : (number + 1) * rows])
        term = down.project(mine["up"])
        term = term * mine["gain"] if "gain" in w else term
        return term.join(out, len(w["up"].value))

    changed = [one(number) for number in range(groups)]
    value = np.stack([matrix.value for matrix in changed]).reshape(shape)
    bound = np.stack([matrix.bound for matrix in changed]).reshape(shape)
    return Bounded(value, bound, y.arithmetic)


def _coupling(slot: Slot, y: Bounded, w: Mapping[str, Bounded]) -> Bounded:
    half = slot.width // 2
    first, second = y.each(lambda v: v[..., :half]), y.each(lambda v: v[..., half:])

    def network(x: Bounded, which: str) -> Bounded:
        inner = x.project(w[f"{which}_down"], w[f"{which}_down_bias"])
        hidden = ACTIVATIONS[slot.activation][1](inner)
        return hidden.project(w[f"{which}_up"], w[f"{which}_up_bias"])

    def moved(x: Bounded, by: Bounded, which: str) -> Bounded:
        return network(by, which).join(x, len(w[f"{which}_up"].value))

    first = moved(first, second, "f")
    second = moved(second, first, "g")
    pairs = (first.value, second.value), (first.bound, second.bound)
    value, bound = (np.concatenate(pair, -1) for pair in pairs)
    return Bounded(value, bound, y.arithmetic)


def _unfolded(slot: Slot, x: Array) -> Array:
    """The patches of a convolution's input as channels (im2col): it is 1x1 on these."""
    n = slot.rank - 2
    kernel, strides = slot.window[:n], slot.window[n : 2 * n]
    pads, dilations = slot.window[2 * n : 4 * n], slot.window[4 * n :]
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:n], pads[n:], strict=True)])
    sizes = [
        (x.shape[2 + i] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1
        for i in range(n)
    ]
    patches = []
    for place in itertools.product(*(range(k) for k in kernel)):
        cut = [
            slice(p * d, p * d + (size - 1) * s + 1, s)
            for p, d, s, size in zip(place, dilations, strides, sizes, strict=True)
        ]
        patches.append(x[(slice(None), slice(None), *cut)])
    return np.stack(patches, 2).reshape(x.shape[0], -1, *sizes)
