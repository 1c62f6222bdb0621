"""The sizes to try for the open axes of a model's inputs when inputs are made up.

Example: the input `ids [batch, length]` has a batch axis and a sequence axis. The first sizes
to try are `[1, 12]`; the second set of inputs gets `[2, 9]`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onnx_adapt.graph.index import TensorType, elem_name

BATCH, PAST, TOTAL, CHANNEL = "batch", "past", "total", "channel"
PICTURE, SEQUENCE, AUDIO = "picture", "sequence", "audio"

_SHORT = ((12, 9), (64, 96), (120, 75), (32, 64), (576, 288), (224, 256))
_LADDERS: dict[str, tuple[tuple[int, int], ...]] = {
    PICTURE: (
        *((32, 64), (64, 96), (224, 256), (96, 128), (28, 28), (30, 30), (128, 160)),
        *((256, 288), (336, 336), (384, 384), (448, 448), (512, 512)),
    ),
    SEQUENCE: (*_SHORT, (3000, 3000), (1, 2)),
    AUDIO: (*_SHORT, (3200, 4800), (16000, 8000), (32000, 48000), (1, 2)),
    CHANNEL: ((3, 3), (1, 1)),
    PAST: ((0, 0), (8, 5)),
}
"""The sizes to try for each kind of axis, the likeliest first, with one for each of two sets.

Only a waveform can be long, because a picture of 8000 by 8000 would not fit into memory.
"""

_SEVERAL = (PAST, PICTURE, CHANNEL, SEQUENCE, AUDIO)
"""The order of precedence if one symbol could be of several kinds."""

_LABELS = (
    (PAST, r"past|cache"),
    (TOTAL, r"total"),
    (BATCH, r"batch"),
    (PICTURE, r"height|width|(^|[_.])[hw]($|[_.\d])"),
    (CHANNEL, r"channel"),
    (AUDIO, r"audio|sample|wave|signal|pcm"),
    (SEQUENCE, r"len|seq|time|frame|token"),
)
_WORD = re.compile(r"\s*([+*])\s*")

Axis = str | tuple[str, int]
"""A symbol, which has the same size everywhere, or an input and the number of its axis."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The size of every kind of axis in one set of inputs.

    Attributes:
        batch: The size of batch axes.
        steps: The index into the list of sizes, for each other kind.
        second: Whether the second size of each entry is used.
    """

    batch: int
    steps: Mapping[str, int]
    second: bool

    def of(self, kind: str, last: bool = False) -> int:
        """The size of an axis of this kind; `last` is a picture's last axis.

        The second set's pictures differ from the first's in one axis only, so that they
        are not square and grow no more than they must.
        """
        if kind == BATCH:
            return self.batch
        if kind == TOTAL:
            return self.of(PAST) + self.of(SEQUENCE)
        place = _LADDERS[kind][self.steps.get(kind, 0)]
        return place[self.second and (kind != PICTURE or last)]


def first_sizes(kinds: set[str]) -> Iterator[Sizes]:
    """Every combination of sizes, beginning with the likeliest.

    A model that was exported for a fixed batch may run only with a batch of two.
    """
    ladders = sorted(kinds & _LADDERS.keys())
    ranges = (range(len(_LADDERS[kind])) for kind in ladders)
    for steps in sorted(itertools.product(*ranges), key=lambda item: (sum(item), item)):
        for batch, second in ((1, False), (2, False), (2, True)):
            yield Sizes(batch, dict(zip(ladders, steps, strict=True)), second)


def second_sizes(worked: Sizes) -> Iterator[Sizes]:
    """Sizes other than those that worked: the second ones, then only another batch."""
    for batch, second in ((2, True), (2, False), (1, True), (1, False)):
        yield Sizes(batch, worked.steps, second)


def axis_kinds(inputs: Mapping[str, TensorType]) -> dict[Axis, str]:
    """The kind of each open axis, from its symbol, the name of the input and its rank."""
    found: dict[Axis, set[str]] = {}
    for name, known in inputs.items():
        for axis, dim in enumerate(known.shape or ()):
            if not isinstance(dim, int):
                for key in _symbols(dim) or [(name, axis)]:
                    label = key if isinstance(key, str) else ""
                    found.setdefault(key, set()).add(_kind(label, name, known, axis))
    order = (BATCH, TOTAL, *_SEVERAL)
    return {key: min(kinds, key=order.index) for key, kinds in found.items()}


def shape_of(
    name: str, known: TensorType, kinds: Mapping[Axis, str], sizes: Sizes
) -> tuple[int, ...]:
    """The shape that an input gets."""
    shape = known.shape or ()
    pictures = [i for i, dim in enumerate(shape) if _only_kind(name, i, dim, kinds) == PICTURE]

    def size(axis: int, dim: int | str | None) -> int:
        if isinstance(dim, int):
            return dim
        last = axis in pictures[1:]
        if not dim:
            return sizes.of(kinds[name, axis], last)
        return _evaluated(dim, {s: sizes.of(kinds[s], last) for s in _symbols(dim)})

    return tuple(size(axis, dim) for axis, dim in enumerate(shape))


def _only_kind(
    name: str, axis: int, dim: int | str | None, kinds: Mapping[Axis, str]
) -> str | None:
    return None if isinstance(dim, int) else kinds.get(dim or (name, axis))


def _symbols(dim: str | None) -> list[Axis]:
    """The symbols of an axis: `past_length + length` has two."""
    return [part for part in _WORD.split(dim or "")[::2] if part and not part.isdigit()]


def _evaluated(dim: str, sizes: Mapping[Axis, int]) -> int:
    """The value of sums and products of symbols, such as `2*length + 1`."""
    total, product, sign = 0, 1, "*"
    for word in (*_WORD.split(dim), "+"):
        if word in ("+", "*"):
            sign = word
            if sign == "+":
                total, product = total + product, 1
        else:
            product *= int(word) if word.isdigit() else sizes.get(word, 1)
    return total


def _kind(label: str, name: str, known: TensorType, axis: int) -> str:
    """The kind of one open axis, from its label or else from the input's rank and type."""
    shape, label = known.shape or (), label.lower()
    named = next((kind for kind, words in _LABELS if re.search(words, label)), None)
    if axis == 0 and named not in (SEQUENCE, PAST, TOTAL, PICTURE):
        return BATCH if len(shape) > 1 or named != AUDIO else AUDIO
    if named and (named != SEQUENCE or not _is_waveform(known)):
        return named
    if re.search("past|cache", name.lower()):
        return PAST
    if len(shape) >= 4 and "mask" not in name.lower() and _has_numbers(known):
        last = shape[-1] in (1, 3, 4) and not isinstance(shape[1], int)
        height = len(shape) - (3 if last else 2)
        if height <= axis < height + 2:
            return PICTURE
        return CHANNEL if axis == (len(shape) - 1 if last else 1) else SEQUENCE
    return AUDIO if _is_waveform(known) else SEQUENCE


def _has_numbers(known: TensorType) -> bool:
    kind = elem_name(known.elem_type)
    return "float" in kind or kind in ("double", "uint8", "int8")


def _is_waveform(known: TensorType) -> bool:
    """Whether an input has one long axis, besides a batch and channels."""
    shape = known.shape or ()
    rest = shape[1:] if len(shape) > 1 else shape
    open_axes = [dim for dim in rest if not isinstance(dim, int)]
    narrow = all(dim in (1, 2) for dim in rest if isinstance(dim, int))
    return len(shape) <= 3 and len(open_axes) == 1 and narrow and _has_numbers(known)
