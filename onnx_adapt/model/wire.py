"""The protobuf wire format: just enough to find byte ranges and to put them back.

A message is a sequence of fields; a field is a varint key (``number << 3 | type``)
and a payload. Only length-delimited payloads can hold other messages or bulk data.
Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from onnx_adapt.errors import ModelFileError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Buffer = bytes | memoryview


class Field(NamedTuple):
    """One field of a message: where it stands in the buffer.

    Attributes:
        number: The field's number in its message.
        kind: The wire type.
        start: Offset of the key.
        payload: Offset of the payload (for `BYTES`, after the length).
        end: Offset after the payload.
        canonical: Whether key and length use the shortest varint.
    """

    number: int
    kind: int
    start: int
    payload: int
    end: int
    canonical: bool


def read_varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """Read a base-128 varint of at most ten bytes.

    Returns:
        The value and the offset after it.

    Raises:
        ModelFileError: If the varint runs past `end` or is longer than ten bytes.
    """
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ModelFileError(f"a number at byte {at} is longer than protobuf allows")
    raise ModelFileError(f"the data ends inside a number at byte {at}")


def varint(value: int) -> bytes:
    r"""Encode a non-negative integer in the shortest varint.

    Example:
        >>> varint(300)
        b'\xac\x02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field_head(number: int, length: int) -> bytes:
    """Encode the key and length that precede `length` bytes of a `BYTES` field."""
    return varint(number << 3 | BYTES) + varint(length)


def fields(data: Buffer, start: int, end: int) -> Iterator[Field]:
    """Walk the fields of the message in `data[start:end]` without descending.

    Raises:
        ModelFileError: If the bytes are not a sequence of fields that ends at `end`.
    """
    at = start
    while at < end:
        begin = at
        key = data[at]
        if key < 0x80:  # one byte, as nearly all keys are; what is fast here counts
            at, canonical = at + 1, True
        else:
            key, at = read_varint(data, at, end)
            canonical = at - begin == _size(key)
        number, kind = key >> 3, key & 7
        if number == 0 or number >= 1 << 29:
            raise ModelFileError(f"field number {number} at byte {begin} is not allowed")
        if kind == VARINT:
            payload = at
            value, at = read_varint(data, at, end)
            canonical = canonical and at - payload == _size(value)
        elif kind == BYTES:
            length, payload = read_varint(data, at, end)
            canonical = canonical and payload - at == _size(length)
            at = payload + length
        elif kind in (FIXED64, FIXED32):
            payload = at
            at += 8 if kind == FIXED64 else 4
        else:
            raise ModelFileError(f"wire type {kind} at byte {begin} is not used by ONNX")
        if at > end:
            raise ModelFileError(
                f"field {number} at byte {begin} ends at byte {at}, after its message ({end})"
            )
        yield Field(number, kind, begin, payload, at, canonical)


def _size(value: int) -> int:
    return max(1, (value.bit_length() + 6) // 7)
