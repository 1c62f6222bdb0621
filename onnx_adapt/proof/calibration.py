"""Widening the calibrated ranges of a quantised model for the values of an adapter.

The values are measured without saturation, with the adapter on and off. Only ranges that
they exceed are changed, and the new range always contains the old one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from onnx_adapt.adapter.fitting import require_fit, required_manifest
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.ranges import Change, widen_ranges
from onnx_adapt.edit.remove import remove
from onnx_adapt.errors import SlotError
from onnx_adapt.graph.index import GraphView, ModelIndex, index_model, text
from onnx_adapt.graph.quantizers import Quantizer
from onnx_adapt.model.file import Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.proof.inputs import Inputs, given_feeds
from onnx_adapt.proof.probe import neutral_model
from onnx_adapt.proof.runner import ProviderArgument, proof_providers
from onnx_adapt.proof.saturation import switched_on
from onnx_adapt.proof.unsaturated import Ends, Seen, observe, ranges_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Range:
    """Scale and zero point of a quantizer, `()` or `(channels,)`."""

    scale: Array
    zero: Array


def calibrate(
    model: ModelLike,
    adapter: AdapterLike,
    inputs: Inputs | Sequence[Inputs],
    *,
    provider: ProviderArgument = None,
) -> Model:
    """Widen the ranges of a quantised model with slots so that they hold an adapter's values.

    Only the ranges of QuantizeLinear nodes behind slots that the values leave are changed;
    `remove` brings the old ones back. A range that cannot be changed is logged as a warning.
    The model is returned as it is if the ranges hold the values already.

    Args:
        model: The model with slots; it is left as it was.
        adapter: The adapter that the ranges are for, with weights for the slots.
        inputs: What to measure with: an `.npz` file or arrays by name, or several.
        provider: The execution provider to measure on, as for `verify`.

    Raises:
        AdapterError: If the adapter does not fit.
        RunError: If the model does not run with these inputs.
        SlotError: If no value that an adapter changes is quantised with a calibrated range.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> base = oa.open_model("tests/qdq/dense_uint8/base.onnx")
        >>> trained = oa.load_checkpoint("tests/qdq/dense_uint8/adapter", base)
        >>> inputs = {"x": np.load("tests/qdq/dense_uint8/truth.npz")["x"]}
        >>> wide = oa.calibrate(oa.insert_checkpoint(base, trained), trained.adapter, inputs)
        >>> oa.verify(base, wide, adapter=trained.adapter, inputs=inputs).passed
        True
    """
    model = as_model(model)
    adapter = as_adapter(adapter)
    require_fit(model, adapter)
    providers = proof_providers(provider)
    feeds = given_feeds(remove(model), inputs)
    off = neutral_model(model)
    ranges = ranges_of(off, required_manifest(model).slots, feeds, providers)
    if ranges is None:
        raise SlotError(
            f"{model.label} quantises nothing that an adapter changes with a calibrated range",
            hint="there is nothing to widen; leave the calibration out",
        )
    on = switched_on(model, adapter)
    runs = [(off, False), (on, False), (on, True)]  # rounding moves values out as well
    sides = [
        observe(
            ranges.unsaturated(side, rounded=rounded), ranges.quantizers, feeds, providers
        )[0]
        for side, rounded in runs
    ]
    index = index_model(model)
    changes: list[Change] = []
    for quantizer, ends, *seen in zip(ranges.quantizers, ranges.ends, *sides, strict=True):
        wider = _wider(quantizer, ends, seen)
        if wider is not None and quantizer.refused:
            _log.warning(
                "the range of %r is too narrow and cannot be widened: %s",
                quantizer.name,
                quantizer.refused,
            )
        elif wider is not None:
            changes += _changes(index, quantizer, wider)
    return widen_ranges(model, changes) if changes else model


def _wider(quantizer: Quantizer, ends: Ends, seen: Iterable[Seen]) -> Range | None:
    """The range that also holds the measured values; None if the old one does already."""
    old_low, old_high = quantizer.range
    half = quantizer.scale.astype(np.float64) / 2
    least, most = old_low, old_high
    for item in seen:
        least, most = np.fmin(least, item.least), np.fmax(most, item.most)
    below = np.logical_and(least < old_low - half, not ends.low)
    above = np.logical_and(most > old_high + half, not ends.high)
    if not np.any(below) and not np.any(above):
        return None
    low, high = np.where(below, least, old_low), np.where(above, most, old_high)
    room = (high - low) * _headroom(quantizer) / 2
    low, high = low - np.where(below, room, 0), high + np.where(above, room, 0)
    return _range_for(quantizer, np.minimum(low, 0), np.maximum(high, 0))


def _headroom(quantizer: Quantizer) -> float:
    """The share of its width by which a range is widened beyond the measured values.

    Other inputs have larger values than those that were measured. On a BERT calibrated with
    two sentences, 0.15 took two fifths off the error of int8 on other sentences, for less
    than a tenth of its resolution; 16 bits have resolution to spare, and 1 took 95 % off.
    """
    lowest, highest = quantizer.limits
    return 1.0 if highest - lowest > 255 else 0.15


def _range_for(quantizer: Quantizer, low: Array, high: Array) -> Range | None:
    """The finest range that reaches from `low` to `high`, in the form of the old one.

    A symmetric range (signed, zero point 0, as TensorRT wants it) stays symmetric; one
    without a zero point has none to move. Example: uint8 from -1 to 4.1 has the scale 0.02
    and the zero point 50.
    """
    lowest, highest = quantizer.limits
    if not np.any(quantizer.zero) and (lowest < 0 or not quantizer.has_zero):
        if lowest == 0 and np.any(low < 0):
            return None
        below = low / lowest if lowest else np.zeros_like(low)
        return Range(_scale(quantizer, np.maximum(below, high / highest)), quantizer.zero)
    scale = _scale(quantizer, (high - low) / (highest - lowest))
    zero = np.clip(np.rint(lowest - low / scale.astype(np.float64)), lowest, highest)
    return Range(scale, zero.astype(quantizer.zero.dtype))


def _scale(quantizer: Quantizer, wanted: Array) -> Array:
    """A scale in the model's type, rounded up, so that the range holds its ends."""
    dtype = quantizer.scale.dtype
    scale = np.maximum(wanted, quantizer.scale.astype(np.float64)).astype(dtype)
    short = scale.astype(np.float64) < wanted
    return np.asarray(np.where(short, np.nextafter(scale, dtype.type(np.inf)), scale), dtype)


def _changes(index: ModelIndex, quantizer: Quantizer, wider: Range) -> list[Change]:
    """New constants for a quantizer, for nodes that share its range, and for biases."""
    view = index.views[quantizer.graph]
    nodes = [quantizer.node, *(place for _, place in quantizer.partners)]
    found = _replaced(view, quantizer, nodes, 1, wider.scale)
    if not np.array_equal(wider.zero, quantizer.zero):
        found += _replaced(view, quantizer, nodes, 2, wider.zero)
    for _, place in quantizer.partners:
        found += _rescaled_biases(index, view, quantizer, view.nodes[place], wider)
    return found


def _replaced(
    view: GraphView, quantizer: Quantizer, nodes: list[int], position: int, value: Array
) -> list[Change]:
    """One change for each of the constants that nodes read at a position."""
    groups: dict[str, list[tuple[str, int, int]]] = {}
    for place in nodes:
        name = text(view.nodes[place].input[position])
        groups.setdefault(name, []).append((quantizer.graph, place, position))
    changes = []
    for name, uses in groups.items():
        old = view.constant(name)
        assert old is not None
        shaped = value.reshape(tuple(old.dims))
        changes.append(Change(quantizer.output, _tensor(old.data_type, shaped), tuple(uses)))
    return changes


def _tensor(elem_type: int, value: Array) -> onnx.TensorProto:
    return helper.make_tensor("", elem_type, value.shape, value.ravel())


def _rescaled_biases(
    index: ModelIndex,
    view: GraphView,
    quantizer: Quantizer,
    back: onnx.NodeProto,
    wider: Range,
) -> list[Change]:
    """The int32 biases of layers that read a tensor: their scale is input times weight.

    Runtimes that run such a layer in integers do not read the bias's scale: they take it
    to be that product, so it has to stay that product.
    """
    found: list[Change] = []
    for reader in view.readers(text(back.output[0])):
        if len(reader.input) < 3 or reader.input[0] != back.output[0]:
            continue
        bias = _dequantized(index, view, reader.input[2])
        weight = _dequantized(index, view, reader.input[1])
        if bias is None or weight is None or bias.value.dtype != np.int32:
            continue
        product = weight.scale.astype(np.float64) * quantizer.scale.astype(np.float64)
        if quantizer.scale.size > 1 or not np.allclose(bias.scale, product, rtol=1e-3):
            continue
        scale = weight.scale.astype(np.float64) * wider.scale.astype(np.float64)
        scale = np.broadcast_to(scale, bias.scale.shape).astype(bias.scale.dtype)
        ratio = bias.scale.astype(np.float64) / scale.astype(np.float64)
        value = np.rint(bias.value * ratio).astype(np.int32)
        found += _replaced(view, quantizer, [bias.node], 0, value)
        found += _replaced(view, quantizer, [bias.node], 1, scale)
    return found


@dataclass(frozen=True, slots=True)
class _Dequantized:
    node: int
    value: Array
    scale: Array


def _dequantized(index: ModelIndex, view: GraphView, name: str) -> _Dequantized | None:
    """The integers and the scale of a constant behind a DequantizeLinear of this graph."""
    place = view.producers.get(name)
    if place is None or view.nodes[place].op_type != "DequantizeLinear":
        return None
    node = view.nodes[place]
    tensors = [view.constant(part) for part in node.input[:2]]
    if any(tensor is None for tensor in tensors):
        return None
    value, scale = (np.asarray(read_tensor(index.model, t)) for t in tensors if t is not None)
    return _Dequantized(place, value, scale)
