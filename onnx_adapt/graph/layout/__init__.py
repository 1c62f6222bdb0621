"""Where the features of each tensor are: on its last axis, on axis 1, or unknown.

Operators give signs: a Conv reads and makes channels on axis 1, a LayerNormalization
features on the last axis (`facts.FACTS`). Each sign is followed along the axis that it
names, to every tensor that has the same axis: from what a node reads to what it makes, and
back (`links`). Where the ways of two signs meet on different axes of one tensor, the
stronger holds; of two that are equally strong none does.

For example

    h = MatMul(x, w)      the features of `x` and of `h` are on the last axis (LINEAR)
    t = Transpose(h)      perm [0, 2, 1]: so those of `t` are on axis 1
    c = Conv(t, k)        the features of `t` are on axis 1 (DEFINED), which agrees
    p = Add(c, pos)       same axes as `c`, so on axis 1
    s = Reshape(p)        [0, 4, 8, -1] of 32 features: no axis of `s` has all of them

The heads of an attention are the one case where a part of the features has an axis: the
last axis is split into heads and what each head sees. That part counts where it comes from
such a split, and is later merged again or summed over by a product of two tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx
import onnx.inliner

from onnx_adapt.graph.index import GraphView, ModelIndex, index_model
from onnx_adapt.graph.layout import shapes
from onnx_adapt.graph.layout.bodies import through_bodies
from onnx_adapt.graph.layout.facts import links_of, own_axis, signs_of
from onnx_adapt.graph.layout.links import SPLIT, Link, aligned
from onnx_adapt.graph.layout.lookup import Lookup, Place, Step, step_of
from onnx_adapt.graph.layout.signs import Sign, Strength, sign
from onnx_adapt.graph.layout.spreading import (
    Signs,
    loss,
    parts_of_merge,
    parts_of_split,
    spread,
    spread_loss,
)
from onnx_adapt.model import walk
from onnx_adapt.slot.manifest import slot_of

_MOST_NODES = 1 << 16
_UNPLACED = "nothing tells which of its axes has the features"


@dataclass(frozen=True, slots=True)
class Features:
    """Where the features of a tensor are.

    Attributes:
        axis: -1 for the last axis, else counted from 0; None where `refused` says why.
        refused: Why no axis can be named, or None.
    """

    axis: int | None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class _Spread:
    """The signs of all nodes, followed as far as they go.

    Attributes:
        signs: What operators say, followed along axes.
        made: The same for the part of features that a split leaves on the last axis.
        used: The same for the part of features that is merged or summed over later.
        lost: Tensors that an axis of features did not survive into, and why.
        summed: Tensors that are products over all features, such as the scores of an
            attention. What is added to them does not give them features.
    """

    signs: Signs = field(default_factory=dict)
    made: Signs = field(default_factory=dict)
    used: Signs = field(default_factory=dict)
    lost: dict[Place, str] = field(default_factory=dict)
    summed: dict[Place, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the features of all tensors of a model are.

    Most layers say themselves where they put their features. Signs are followed through the
    whole model only when a tensor is asked for that needs it.

    Attributes:
        index: The model.
        slots: For each graph, what the slots on a tensor make of it: inner -> outer. The
            slots' own nodes tell nothing.
    """

    index: ModelIndex
    slots: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @cached_property
    def lookup(self) -> Lookup:
        """What is known of shapes and constants."""
        index = _written_out(self.index)
        return Lookup(index, shapes.missing(index))

    @cached_property
    def _found(self) -> _Spread:
        return _spread_signs(self.lookup, self.slots)

    def of_layer(self, view: GraphView, node: onnx.NodeProto, tensor: str) -> Features:
        """Where a layer puts its features; `tensor` is its output, bias included."""
        axis = own_axis(self.lookup, step_of(view, node))
        if axis is None or node.op_type == _GROUPS:
            return self.of(view, tensor)
        return Features(_named(axis, self.lookup.rank(view, tensor)))

    def of(self, view: GraphView, tensor: str) -> Features:
        """Where the features of a tensor are that can be read in a graph."""
        place, rank = self.lookup.place(view, tensor), self.lookup.rank(view, tensor)
        lost = self._found.summed.get(place) or self._found.lost.get(place)
        axes = self._strongest(place)
        if len(axes) > 1:
            said = " and ".join(f"axis {axis} ({axes[axis].who})" for axis in sorted(axes))
            return Features(None, f"operators disagree on its feature axis: {said}")
        if axes:
            return Features(_named(next(iter(axes)), rank))
        if rank is not None and rank <= 2 and lost is None:
            return Features(-1)
        return Features(None, lost or _UNPLACED)

    def _strongest(self, place: Place) -> Mapping[int, Sign]:
        """The axes that the strongest signs name."""
        known = self._found
        found = known.signs.get(place, {})
        if place in known.summed:
            found = {axis: sign for axis, sign in found.items() if sign.place == place}
        if place in known.lost and all(s.node.op_type == _GROUPS for s in found.values()):
            found = {}
        if found:
            best = max(sign.strength for sign in found.values())
            return {axis: sign for axis, sign in found.items() if sign.strength == best}
        used = known.used.get(place, {})
        return {k: sign for k, sign in known.made.get(place, {}).items() if k in used}


_GROUPS = "InstanceNormalization"
"""Exporters write a GroupNorm with it: the channels it reads then are groups of channels."""


def _named(axis: int, rank: int | None) -> int:
    """An axis as sites name it: the last one is -1."""
    if rank is None:
        return axis
    return -1 if axis % rank == rank - 1 else axis % rank


def given_axis(axis: int, rank: int | None) -> Features:
    """The axis that a user names; it may count from either end."""
    if rank is None:
        fits = axis in (1, -1)
        return Features(axis) if fits else Features(None, f"it may have no axis {axis}")
    if not -rank <= axis < rank:
        return Features(None, f"it has {rank} axes, and no axis {axis}")
    return Features(_named(axis, rank))


def _spread_signs(lookup: Lookup, slots: Mapping[str, Mapping[str, str]]) -> _Spread:
    """Read the signs of all nodes and follow each along its axis."""
    spreads = _Spread()
    steps = list(_steps(lookup.index, marked=bool(slots)))
    links = list(_links(lookup, steps, slots))
    nearby: dict[Place, list[Link]] = {}
    for link in links:
        nearby.setdefault(link.source, []).append(link)
        nearby.setdefault(link.target, []).append(link)
    found = [s for step, _ in steps for s in signs_of(lookup, step)]
    for strength in sorted(Strength, reverse=True):
        equal = (sign for sign in found if sign.strength == strength)
        spread(equal, spreads.signs, nearby, spreads.lost)
    _lose_groups(spreads, found, nearby)
    reshapes = [link for link in links if link.split or link.merged]
    _spread_parts(lookup, spreads, steps, reshapes, nearby)
    spread_loss(spreads.lost, nearby)
    spread_loss(spreads.summed, nearby)
    return spreads


def _lose_groups(
    spreads: _Spread, found: Iterable[Sign], nearby: Mapping[Place, list[Link]]
) -> None:
    """Note where a normalisation reads groups: what a Reshape splits off is no whole axis."""
    for place, axis, node, _, makes in found:
        for link in nearby.get(place, ()) if node.op_type == _GROUPS and not makes else ():
            if link.target == place and axis in link.parts:
                spreads.lost.setdefault(place, loss(link, SPLIT))


def _written_out(index: ModelIndex) -> ModelIndex:
    """The index with functions inlined, which keeps the names of what calls make."""
    proto = index.model.proto
    if not proto.functions or walk.inlines_to_more_than(proto, _MOST_NODES):
        return index
    try:
        inlined = onnx.inliner.inline_local_functions(proto)
    except (onnx.checker.ValidationError, RuntimeError, ValueError):
        return index  # what functions compute has no features that anybody knows
    return index_model(replace(index.model, proto=inlined))


def _spread_parts(
    lookup: Lookup,
    spreads: _Spread,
    steps: list[tuple[Step, int]],
    reshapes: list[Link],
    nearby: dict[Place, list[Link]],
) -> None:
    """Follow the parts of features, and find the products that sum over features."""
    spread(parts_of_split(spreads.signs, reshapes), spreads.made, nearby, stop=spreads.signs)
    used = list(parts_of_merge(spreads.signs, reshapes))
    for step, _ in steps:
        if step.node.op_type in ("MatMul", "FusedMatMul") and step.outputs:
            signs = list(_summed(lookup, step))
            used += signs
            if len(signs) == 2 and all(_are_features(spreads, sign) for sign in signs):
                place = lookup.place(step.view, step.outputs[0])
                spreads.summed[place] = f"{signs[0].who} sums over its features"
    spread(used, spreads.used, nearby, stop=spreads.signs)


def _are_features(spreads: _Spread, sign: Sign) -> bool:
    known = spreads.signs.get(sign.place) or spreads.made.get(sign.place, {})
    return sign.axis in known


def _steps(index: ModelIndex, *, marked: bool) -> Iterator[tuple[Step, int]]:
    """The nodes of the base, each with its place in its graph."""
    for view in index.views.values():
        for i, node in enumerate(view.nodes):
            if not (marked and slot_of(node)):
                yield step_of(view, node), i


def _links(
    lookup: Lookup, steps: list[tuple[Step, int]], slots: Mapping[str, Mapping[str, str]]
) -> Iterator[Link]:
    bodies: dict[tuple[str, int], list[GraphView]] = {}
    for view in lookup.index.views.values():
        if view.parent is not None:
            owner = view.parent.scope.path, view.scope.owner
            bodies.setdefault(owner, []).append(view)
    for step, i in steps:
        inside = bodies.get((step.view.scope.path, i)) if bodies else None
        yield from through_bodies(lookup, step, inside) if inside else links_of(lookup, step)
    for path, chained in slots.items():
        view = lookup.index.views[path]
        for inner, outer in chained.items():
            pairs = tuple(aligned(lookup.rank(view, inner), lookup.rank(view, outer)))
            node = view.nodes[view.producers[outer]]
            yield Link((path, inner), (path, outer), pairs, node, keeps=True)


def _summed(lookup: Lookup, step: Step) -> Iterator[Sign]:
    """The axes that a product of two tensors sums over."""
    for position, axis in ((0, -1), (1, -2)):
        yield from sign(lookup, step, position, axis, Strength.LINEAR, makes=False)
