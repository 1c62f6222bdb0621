"""Follow signs along the axes that they name."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping

from onnx_adapt.graph.layout.links import Link
from onnx_adapt.graph.layout.look import Place
from onnx_adapt.graph.layout.signs import Sign

Signs = dict[Place, dict[int, Sign]]
"""For each tensor its axes that a sign names; of several signs the first."""

Nearby = Mapping[Place, list[Link]]
"""For each tensor the links that begin or end at it."""


def spread(
    seeds: Iterable[Sign],
    signs: Signs,
    nearby: Nearby,
    lost: MutableMapping[Place, str] | None = None,
    stop: Mapping[Place, object] | None = None,
) -> None:
    """Note signs at every tensor that has the same axis.

    Args:
        seeds: The signs where they are read off.
        signs: What is known; what is there already stays.
        nearby: The links.
        lost: Told where an axis ends on the way from input to output.
        stop: Tensors to leave alone.
    """
    waiting = deque((sign.place, sign.axis, sign) for sign in seeds)
    while waiting:
        place, axis, sign = waiting.popleft()
        known = signs.get(place)
        if (known and axis in known) or (stop and place in stop):
            continue
        if known is None:
            known = signs[place] = {}
        known[axis] = sign
        for link in nearby.get(place, ()):
            forward, backward = link.source == place, link.target == place
            for source, target in link.pairs:
                if forward and source == axis:
                    waiting.append((link.target, target, sign))
                if backward and target == axis:
                    waiting.append((link.source, source, sign))
            if forward and lost is not None and axis in link.ends:
                lost.setdefault(link.target, loss(link, link.ends[axis]))


def loss(link: Link, verb: str) -> str:
    """What became of the axis of features on a link."""
    name = f" {link.node.name!r}" if link.node.name else ""
    return f"{link.node.op_type}{name} {verb} the axis of its features"


def spread_loss(lost: MutableMapping[Place, str], nearby: Nearby) -> None:
    """Note that what has the axes of a tensor without features has none either."""
    waiting = deque(lost)
    while waiting:
        place = waiting.popleft()
        for link in nearby.get(place, ()):
            if link.source == place and link.keeps and link.target not in lost:
                lost[link.target] = lost[place]
                waiting.append(link.target)


def parts_of_split(signs: Signs, links: Iterable[Link]) -> Iterator[Sign]:
    """Where features on the last axis are split, each part is on the last axis."""
    for link in links:
        if link.split and link.split[0] in signs.get(link.source, {}):
            sign = signs[link.source][link.split[0]]
            yield Sign(link.target, link.split[1], sign.node, sign.strength, makes=True)


def parts_of_merge(signs: Signs, links: Iterable[Link]) -> Iterator[Sign]:
    """Where features on the last axis were merged, each part was on the last axis."""
    for link in links:
        if link.merged and link.merged[1] in signs.get(link.target, {}):
            sign = signs[link.target][link.merged[1]]
            yield Sign(link.source, link.merged[0], sign.node, sign.strength, makes=False)
