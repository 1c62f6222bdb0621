"""The formula of a slot in float64 numpy: what `verify` and the tests hold ONNX against."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_adapt.activations import ACTIVATIONS
from onnx_adapt.dtypes import Array
from onnx_adapt.manifest import ROW_PARTS, Slot
from onnx_adapt.slot import EPSILON


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

    def __call__(self, x: Array) -> Array:
        """Normalise `(..., width)` in float64."""
        x = x - x.mean(-1, keepdims=True) if self.centred else x
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weight
        return x if self.bias is None else x + self.bias


def slot_value(
    slot: Slot,
    target: Array,
    source: Array,
    weights: Mapping[str, Array],
    norm: Norm | None = None,
    plus: Array | None = None,
) -> Array:
    """The oracle: what a slot's output is, in float64.

    Args:
        slot: The slot.
        target: `(batch, ..., width)`, or `(batch, width, ...)` on a channel axis.
        source: The same with `source_width`.
        weights: The slot's weights by part, and what a batched slot has for each row.
        norm: The base's normalisation that `slot.norm` means.
        plus: The tensor that `slot.plus` means, of the source's shape.

    Returns:
        An array of `target`'s shape.
    """
    named = [part for part in (*slot.parts, *slot.row_parts) if part in weights]
    w = {part: np.asarray(weights[part], np.float64) for part in named}
    y = target.astype(np.float64)
    if "f_down" in w:
        return _coupling(slot, y, w)
    x = source if "table" in w else source.astype(np.float64)
    if slot.window:
        w["down"], x = _unfolded(slot, w["down"], x)
    if slot.axis == 1:
        x, y = np.moveaxis(x, 1, -1), np.moveaxis(y, 1, -1)
        w = {part: _flat(part, value) for part, value in w.items()}
    elif slot.batched and slot.rank != 3:
        # No rows are as in the nodes: `(1, 0, width)` meets `(0, 1, r)`.
        rows = max(1, next((len(w[part]) for part in slot.row_parts if part in w), 1))
        x = x.reshape(rows, -1, *x.shape[y.ndim - 1 :])
        y = y.reshape(rows, -1, slot.width)
        plus = None if plus is None else plus.reshape(x.shape)
    w = _with_rows(w)
    out = y * w.get("scale", 1)
    if plus is not None:
        x = x + plus
        out = out + plus * w.get("residual", 0)
    if "up" in w:
        read = x if norm is None else norm(x)
        out = out + read * w["skip"] if "skip" in w else out
        out = out + _term(slot, read, w)
    if slot.norm_after == "sum":
        out = y + w["switch"] * (Norm(w["after_weight"], w.get("after_bias"))(out) - y)
    return np.moveaxis(out, -1, 1) if slot.axis == 1 else out.reshape(target.shape)


def _with_rows(w: dict[str, Array]) -> dict[str, Array]:
    """The weights with what each row has of its own, but for the mask."""
    together = dict(w)
    for part, name in ROW_PARTS.items():
        if name in w and part != "up":
            together[part] = w[part] * w[name] if part == "scale" else w[part] + w[name]
    return together


def _flat(part: str, value: Array) -> Array:
    """A Conv-layout weight in the layout of the formula."""
    if part in ROW_PARTS.values():
        return np.moveaxis(value, 1, -1)
    flat = value.reshape(value.shape[: 2 if part in ("down", "up") else 1])
    return flat.T if part in ("down", "up") else flat


def _term(slot: Slot, read: Array, w: dict[str, Array]) -> Array:
    x = read
    if "norm_weight" in w:
        x = Norm(w["norm_weight"], w.get("norm_bias"))(x)
    inner = w["table"][x] if "table" in w else x @ w["down"]
    hidden = ACTIVATIONS[slot.activation][1](inner + w.get("down_bias", 0))
    hidden = hidden * w.get("mask", 1)
    term = (hidden @ w["up"] + w.get("up_bias", 0)) * w.get("gain", 1)
    if "gate" in w:
        opening = ACTIVATIONS["sigmoid"][1](read @ w["gate"] + w.get("gate_bias", 0))
        term = term * opening.mean(1, keepdims=True)
    if slot.norm_after == "term":
        term = Norm(w["after_weight"], w.get("after_bias"))(term)
    return term


def _coupling(slot: Slot, y: Array, w: dict[str, Array]) -> Array:
    first, second = np.split(y, 2, -1)

    def network(x: Array, which: str) -> Array:
        hidden = ACTIVATIONS[slot.activation][1](
            x @ w[f"{which}_down"] + w[f"{which}_down_bias"]
        )
        return np.asarray(hidden @ w[f"{which}_up"] + w[f"{which}_up_bias"])

    first = first + network(second, "f")
    return np.concatenate([first, second + network(first, "g")], -1)


def _unfolded(slot: Slot, down: Array, x: Array) -> tuple[Array, Array]:
    """A convolution as a 1x1 convolution of its input's patches (im2col)."""
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
    columns = np.stack(patches, 2).reshape(x.shape[0], -1, *sizes)
    return down.reshape(down.shape[0], -1, *(1,) * n), columns
