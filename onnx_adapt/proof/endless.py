"""What quantizers are given, and a model in which they saturate nothing.

A pair of QuantizeLinear and DequantizeLinear gives `scale * round(x / scale)` within the
ends of its range. Written as just that, it rounds to the same grid and has no ends: what
the two models differ by is the saturation and nothing else. Left out altogether, the
pair's rounding is gone as well, which tells how far rounding moves the outputs.
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
"""Of the grid, in steps: one rounding may happen to be lucky, four differ."""

_TAPS_AT_ONCE = 32
"""Tensors that are read in one run: all of a large model would fill the memory."""

_SIX = 6.0
"""Quantisers drop Relu6 as well as Relu, where the range of the integers ends with it."""


@dataclass(slots=True)
class Seen:
    """The values that one quantizer was given.

    Attributes:
        total: How many.
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
        """Take the values of one run in."""
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
    """Which ends of a range are the model's own activation: no value may pass them."""

    low: bool
    high: bool


def own_ends(quantizer: Quantizer, off: Seen) -> Ends:
    """Tell a Relu or Relu6 that a quantiser folded into a range from an end of calibration.

    Such a range ends exactly at 0, and the base itself runs into that end.
    """
    low, high = (np.asarray(end) for end in quantizer.range)
    relu = off.below > 0 and bool(np.all(low == 0))
    six = np.all(np.abs(high - _SIX) <= quantizer.scale.astype(np.float64) / 2)
    return Ends(relu, relu and off.above > 0 and bool(six))


Bounds = tuple[Array | None, Array | None]
"""The least and the largest value that may pass, `()` or `(channels,)`; None for any."""


def observe(
    model: Model, quantizers: Sequence[Quantizer], feeds: Iterable[Feeds], providers: Providers
) -> tuple[list[Seen], list[Values]]:
    """Run a model, and read what its quantizers are given.

    Returns:
        What each was given, and the model's outputs for each set of inputs.
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
"""An input of an endless model: where between two steps the grid of integers lies."""


def endless(
    model: Model,
    quantizers: Sequence[Quantizer],
    bounds: Sequence[Bounds],
    ranks: Sequence[int],
    *,
    rounded: bool,
) -> Model:
    """A model whose quantizers saturate nothing but what is out of other bounds.

    Args:
        model: The model.
        quantizers: Its quantizers; those that cannot be followed are left as they are.
        bounds: What holds in place of the ends of their ranges.
        ranks: The numbers of axes of what they are given.
        rounded: Whether values are rounded as before, or left as they are.
    """
    result = model.copy()
    graphs = {scope.path: scope.graph for scope in walk.scopes(result.proto.graph)}
    for graph in graphs.values():
        del graph.value_info[:]  # integers become floats
    swapped: dict[str, dict[int, list[onnx.NodeProto]]] = {path: {} for path in graphs}
    for number, quantizer in enumerate(quantizers):
        if quantizer.refused or not ranks[number]:
            continue
        nodes, constants = _endless_nodes(
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


def _endless_nodes(
    quantizer: Quantizer, bounds: Bounds, rank: int, prefix: str, *, rounded: bool
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """`scale * (round(x / scale + offset) - offset)`, within the bounds."""
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
    """A model with its slots, and the quantizers behind them, as they are without an adapter.

    Attributes:
        off: The model with its slots off.
        quantizers: The quantizers behind its slots.
        seen: What they are given then.
        ends: The ends of their ranges that are the model's own.
        outputs: The model's outputs then, for each set of inputs.
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
        """The number of axes of what each quantizer is given; 0 if it did not run."""
        return [seen.rank for seen in self.seen]

    def endless(self, model: Model, *, rounded: bool) -> Model:
        """A model of the same graph, with other weights, whose quantizers have no ends."""
        bounds: list[Bounds] = []
        for quantizer, ends in zip(self.quantizers, self.ends, strict=True):
            low, high = quantizer.range
            bounds.append((low if ends.low else None, high if ends.high else None))
        return endless(model, self.quantizers, bounds, self.ranks, rounded=rounded)

    def as_wide_as_off(self, model: Model) -> Model:
        """The same, but that values end where the ranges end, or those with slots off."""
        bounds: list[Bounds] = []
        for quantizer, ends, seen in zip(self.quantizers, self.ends, self.seen, strict=True):
            low, high = quantizer.range
            least = low if ends.low else np.fmin(low, seen.least)
            most = high if ends.high else np.fmax(high, seen.most)
            bounds.append((least, most))
        return endless(model, self.quantizers, bounds, self.ranks, rounded=True)

    def rounding(self, model: Model) -> float:
        """How far rounding moves the outputs of a model of the same graph, at most."""
        exact = Runner(self.endless(model, rounded=False), self.providers, optimised=False)
        names = [value.name for value in model.proto.graph.output]
        wanted = [exact.run(item, names) for item in self.feeds]
        del exact
        rough = Runner(self.endless(model, rounded=True), self.providers, optimised=False)
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
    """Run a model with its slots off; None if no slot runs into a calibrated range."""
    quantizers = quantizers_behind(index_model(off), slots)
    if not quantizers:
        return None
    seen, outputs = observe(off, quantizers, feeds, providers)
    ends = [own_ends(q, s) for q, s in zip(quantizers, seen, strict=True)]
    return Ranges(off, quantizers, seen, ends, outputs, feeds, providers)
