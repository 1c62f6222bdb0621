"""Damage to bytes, from a seed: the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

WORDS = (
    *(
        b"\x00",
        b"\xff",
        b"\x7f",
        b"\x80",
        b"\xff\xff\xff\xff",
        b"\xff\xff\xff\x7f",
        b"\0\0\0\x80",
    ),
    *(b"\xff" * 9 + b"\x01", b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\x80" * 11),
    *(b"-1", b"0", b"1e999", b"NaN", b"9" * 30, b"4503599627370496", b"true", b"null", b'""'),
    *(b"[]", b"{}", b"[[[[", b'{"a":', b"\\ud800", b"../", b"/etc/hostname", b"\n\x1b[31m"),
)
"""What goes wrong at the ends of numbers, in JSON, and in names."""


def _flip(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.randrange(256)


def _overwrite(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    word, at = rng.choice(WORDS), rng.randint(0, len(data))
    data[at : at + len(word)] = word


def _insert(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.choice(WORDS)


def _cut(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randint(0, len(data))
    del data[at : at + rng.choice((1, 2, 4, 16, len(data)))]


def _repeat(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = data[at : at + rng.randint(1, 64)] * rng.choice((1, 1, 2, 30))


def _splice(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    at, start = rng.randint(0, len(data)), rng.randint(0, len(other))
    data[at:] = other[start:]


_WAYS: tuple[Callable[[random.Random, bytearray, Sequence[bytes]], None], ...] = (
    *(_flip, _set, _overwrite, _insert, _cut, _repeat, _splice),
)


def damaged(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The bytes with one to five kinds of damage."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        rng.choice(_WAYS)(rng, changed, others)
    return bytes(changed)
