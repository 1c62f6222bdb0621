"""A quantised model without saturation, and the values that its quantizers receive.

A pair of QuantizeLinear and DequantizeLinear rounds a value to a grid of steps and clips it
to a range. Replaced by `scale * round(x / scale)`, it still rounds to the same grid but no
longer clips, so the two models differ by saturation and nothing else. With the pair left
out the rounding is gone too, which shows how far rounding moves the outputs.

Example: uint8 with the scale 0.1 and the zero point 0 holds 0 to 25.5. For 30.04 the pair
gives 25.5, the model without saturation 30.0, and the model without the pair 30.04.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.dtypes import Array
from onnx_adapt.graph.index import index_model
from onnx_adapt.graph.quantizers import Quantizer, quantizers_behind
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.ort import Providers
from onnx_adapt.proof.compare import distance
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.runner import Runner, Values
from onnx_adapt.proof.taps import Tapper
from onnx_adapt.slot.manifest import Slot

_OFFSETS = (0.0, 0.25, 0.5, 0.75)
"""Shifts of the grid in steps. One grid may happen to suit the values; four differ."""

_TAPS_AT_ONCE = 32
"""How many tensors are read in one run; those of a large model would not fit into memory."""

_SIX = 6.0
"""The upper end of Relu6, which quantisers fold into a range as they do with Relu."""


@dataclass(slots=True)
class Seen:
    """The values that one quantizer received.

    Attributes:
        total: The number of values.
        below: How many of them are under its range.
        above: How many of them are over its range.
        least: The least value of each channel, `()` or `(channels,)`.
        most: The largest value of each channel.
        rank: Number of axes of the tensor.
    """

    total: int = 0
    below: int = 0
    above: int = 0
    least: Array = field(default_factory=lambda: np.array(np.inf))
    most: Array = field(default_factory=lambda: np.array(-np.inf))
    rank: int = 0

    def add(self, quantizer: Quantizer, values: Array) -> None:
        """Add the values of one run."""
        wide, self.rank = values.astype(np.float64), values.ndim
        low, high = (quantizer.along(end, values.ndim) for end in quantizer.range)
        half = quantizer.along(quantizer.scale, values.ndim).astype(np.float64) / 2
        self.total += values.size
        self.below += int(np.count_nonzero(wide < low - half))
        self.above += int(np.count_nonzero(wide > high + half))
        if wide.size:
            axes = tuple(range(values.ndim))
            if quantizer.scale.size > 1:
                kept = quantizer.axis % values.ndim
                axes = tuple(axis for axis in axes if axis != kept)
            self.least = np.fmin(self.least, np.nanmin(wide, axis=axes))
            self.most = np.fmax(self.most, np.nanmax(wide, axis=axes))


@dataclass(frozen=True, slots=True)
class Ends:
    """Which ends of a range are an activation of the model, and so clip on purpose."""

    low: bool
    high: bool


def own_ends(quantizer: Quantizer, off: Seen) -> Ends:
    """Find the ends of a range that are a Relu or Relu6, and not a limit of calibration.

    Such a range ends exactly at 0, and values of the base itself are clipped there.
    """
    low, high = (np.asarray(end) for end in quantizer.range)
    relu = off.below > 0 and bool(np.all(low == 0))
    six = np.all(np.abs(high - _SIX) <= quantizer.scale.astype(np.float64) / 2)
    return Ends(relu, relu and off.above > 0 and bool(six))


Bounds = tuple[Array | None, Array | None]
"""The least and the largest allowed value, `()` or `(channels,)`; None is no limit."""


def observe(
    model: Model, quantizers: Sequence[Quantizer], feeds: Iterable[Feeds], providers: Providers
) -> tuple[list[Seen], list[Values]]:
    """Run a model and read the values that its quantizers receive.

    Returns:
        The values of each quantizer, and the model's outputs for each set of inputs.
    """
    tapped = model.copy()
    tapper = Tapper(tapped.proto)
    taps = [
        tapper.tap(q.graph, q.tensor, helper.np_dtype_to_tensor_dtype(q.scale.dtype))
        for q in quantizers
    ]
    runner = Runner(tapped, providers, optimised=False)
    own = [value.name for value in model.proto.graph.output]
    found = [Seen() for _ in quantizers]
    outputs: list[Values] = []
    for item in feeds:
        for start in range(0, len(taps), _TAPS_AT_ONCE):
            here = range(start, min(start + _TAPS_AT_ONCE, len(taps)))
            names = [n for i in here if (t := taps[i]) for n in (t.values, t.shapes)]
            got = runner.run(item, [*own, *names])
            for i in here:
                for values in tap.read(got) if (tap := taps[i]) else ():
                    found[i].add(quantizers[i], values)
        outputs.append({name: got[name] for name in own})
    return found, outputs


OFFSET = "clipping/offset"
"""The input of a model without saturation that shifts its grids, in parts of a step."""


def unsaturated(
    model: Model,
    quantizers: Sequence[Quantizer],
    bounds: Sequence[Bounds],
    ranks: Sequence[int],
    *,
    rounded: bool,
) -> Model:
    """A model whose quantizers clip at given bounds instead of the ends of their ranges.

    Args:
        model: The model.
        quantizers: Its quantizers; those that cannot be followed are left as they are.
        bounds: Where each of them clips.
        ranks: The number of axes of the tensor that each receives.
        rounded: Whether they still round.
    """
    result = model.copy()
    graphs = {scope.path: scope.graph for scope in walk.scopes(result.proto.graph)}
    for graph in graphs.values():
        del graph.value_info[:]  # integers become floats
    swapped: dict[str, dict[int, list[onnx.NodeProto]]] = {path: {} for path in graphs}
    for number, quantizer in enumerate(quantizers):
        if quantizer.refused or not ranks[number]:
            continue
        nodes, constants = _rounding_nodes(
            quantizer, bounds[number], ranks[number], f"clipping/{number}", rounded=rounded
        )
        result.proto.graph.initializer.extend(constants)
        swapped[quantizer.graph][quantizer.node] = nodes
        for path, place in quantizer.partners:
            node = graphs[path].node[place]
            same = helper.make_node("Identity", node.input[:1], node.output)
            swapped[path][place] = [same]
    for path in reversed(graphs):  # bodies before the graphs around them
        graph = graphs[path]
        kept = [
            onnx.NodeProto.FromString(new.SerializeToString())
            for i, node in enumerate(graph.node)
            for new in swapped[path].get(i, [node])
        ]
        del graph.node[:]
        graph.node.extend(kept)
    types = sorted({str(q.scale.dtype) for q in quantizers})
    result.proto.graph.initializer.extend(
        numpy_helper.from_array(np.zeros((), name), f"{OFFSET}/{name}") for name in types
    )
    result.proto.graph.input.extend(
        helper.make_tensor_value_info(
            f"{OFFSET}/{name}", helper.np_dtype_to_tensor_dtype(np.dtype(name)), []
        )
        for name in types
    )
    return result


def _rounding_nodes(
    quantizer: Quantizer, bounds: Bounds, rank: int, prefix: str, *, rounded: bool
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes of `scale * (round(x / scale + offset) - offset)`, clipped to the bounds."""
    dtype = quantizer.scale.dtype
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    last = quantizer.tensor

    def constant(label: str, value: Array) -> str:
        name = f"{prefix}/{label}"
        shaped = quantizer.along(np.asarray(value), rank).astype(dtype)
        constants.append(numpy_helper.from_array(shaped, name))
        return name

    def step(op: str, *others: str) -> None:
        nonlocal last
        name = f"{prefix}/{len(nodes)}"
        nodes.append(helper.make_node(op, [last, *others], [name], name))
        last = name

    if rounded:
        scale, offset = constant("scale", quantizer.scale), f"{OFFSET}/{dtype}"
        step("Div", scale)
        step("Add", offset)
        step("Round")
        step("Sub", offset)
        step("Mul", scale)
    low, high = bounds
    if low is not None:
        step("Max", constant("low", low))
    if high is not None:
        step("Min", constant("high", high))
    step("Identity")
    nodes[-1].output[0] = quantizer.output
    return nodes, constants


@dataclass(frozen=True, slots=True)
class Ranges:
    """The quantizers behind the slots of a model, measured with the slots off.

    Attributes:
        off: The model with its slots off.
        quantizers: The quantizers behind its slots.
        seen: The values that they receive.
        ends: The ends of their ranges that are activations of the model.
        outputs: The model's outputs, for each set of inputs.
        feeds: The inputs.
        providers: Where the model runs.
    """

    off: Model
    quantizers: tuple[Quantizer, ...]
    seen: list[Seen]
    ends: list[Ends]
    outputs: list[Values]
    feeds: list[Feeds]
    providers: Providers

    @property
    def ranks(self) -> list[int]:
        """The number of axes of each quantizer's tensor; 0 if it did not run."""
        return [seen.rank for seen in self.seen]

    def unsaturated(self, model: Model, *, rounded: bool) -> Model:
        """A model of the same graph, with other weights, without saturation."""
        bounds: list[Bounds] = []
        for quantizer, ends in zip(self.quantizers, self.ends, strict=True):
            low, high = quantizer.range
            bounds.append((low if ends.low else None, high if ends.high else None))
        return unsaturated(model, self.quantizers, bounds, self.ranks, rounded=rounded)

    def as_wide_as_off(self, model: Model) -> Model:
        """The same, but clipped to the ranges, widened to the values with the slots off."""
        bounds: list[Bounds] = []
        for quantizer, ends, seen in zip(self.quantizers, self.ends, self.seen, strict=True):
            low, high = quantizer.range
            least = low if ends.low else np.fmin(low, seen.least)
            most = high if ends.high else np.fmax(high, seen.most)
            bounds.append((least, most))
        return unsaturated(model, self.quantizers, bounds, self.ranks, rounded=True)

    def rounding(self, model: Model) -> float:
        """The most that rounding moves the outputs of a model of the same graph."""
        exact = Runner(self.unsaturated(model, rounded=False), self.providers, optimised=False)
        names = [value.name for value in model.proto.graph.output]
        wanted = [exact.run(item, names) for item in self.feeds]
        del exact
        rough = Runner(self.unsaturated(model, rounded=True), self.providers, optimised=False)
        types = {str(q.scale.dtype): q.scale.dtype for q in self.quantizers}
        worst = 0.0
        for part in _OFFSETS:
            shift = {f"{OFFSET}/{n}": np.array(part, dtype) for n, dtype in types.items()}
            got = [rough.run({**item, **shift}, names) for item in self.feeds]
            worst = max(worst, distance(wanted, got))
        return worst


def ranges_of(
    off: Model, slots: Sequence[Slot], feeds: list[Feeds], providers: Providers
) -> Ranges | None:
    """Measure a model with its slots off; None if no calibrated range is behind them."""
    quantizers = quantizers_behind(index_model(off), slots)
    if not quantizers:
        return None
    seen, outputs = observe(off, quantizers, feeds, providers)
    ends = [own_ends(q, s) for q, s in zip(quantizers, seen, strict=True)]
    return Ranges(off, quantizers, seen, ends, outputs, feeds, providers)
