"""Take the bulk data out of a model file's bytes without reading it, and put it back.

`strip` copies a serialised model without the bytes of its large tensors; `splice` is the
reverse. Both work on the wire format, so that every other byte of the file stays as it is.

An example: a weight of 1 MB, alone in a graph. In the file a message is its key, its length
and its body, and each length counts all that is inside:

    3a 8b8040           ModelProto.graph, 1 048 587 bytes
      2a 878040         GraphProto.initializer, 1 048 583 bytes
        42 01 57        TensorProto.name = "W"
        4a 808040 ...   TensorProto.raw_data, 1 048 576 bytes from offset 15

`strip` walks down to `raw_data` and keeps `Payload(file, 15, 1048576)`. It writes the token,
24 bytes, in its place, and on the way up makes the lengths fit: 29 for the tensor, 31 for
the graph. The result is a whole protobuf message of 33 bytes, which `onnx` parses and edits
like any other. `splice` finds the token in the edited bytes, and writes the heads of the
messages around it with the large lengths again: `[bytes, Payload, bytes]`, which are copied
into the new file one after the other.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx_adapt.errors import ModelFileError
from onnx_adapt.model import payloads as bulk
from onnx_adapt.model import wire
from onnx_adapt.model.payloads import (
    PLAIN_BYTES,
    RAW_DATA,
    Payload,
    Segment,
    Source,
    token,
    token_index,
    tokens_in,
)
from onnx_adapt.model.signatures import HEAD, is_text, recognised

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _FUNCTION, _SPARSE, _TRAINING, _TENSOR = range(8)
_CHILDREN: dict[int, dict[int, int]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _TENSOR: {},
}
"""For each message that can hold tensors: field number -> kind of message in it."""
_SINGLE = {_ATTRIBUTE: {5, 22}, _SPARSE: {1, 2}}
"""Those of them that protobuf merges into one tensor where they are given several times."""

_DEEPEST = 100  # protobuf's own parsers stop here too


@dataclass(slots=True)
class _Strip:
    data: wire.Buffer
    source: Source
    payloads: list[Payload] = field(default_factory=list)
    canonical: bool = True

    def message(self, kind: int, start: int, end: int, depth: int) -> bytes:
        """Copy one message without bulk data; the lengths around it are made to fit."""
        if depth > _DEEPEST:
            raise ModelFileError(f"messages are nested more than {_DEEPEST} deep")
        if kind == _TENSOR:
            return self.tensor(start, end)
        out, kept = [], start
        # Never a list of fields: two bytes of a hostile file would be an object each.
        times: Counter[int] = Counter()
        if kind in _SINGLE:
            times.update(item.number for item in wire.fields(self.data, start, end))
        for item in wire.fields(self.data, start, end):
            self.canonical = self.canonical and item.canonical
            child = _CHILDREN[kind].get(item.number)
            small = item.end - item.payload < bulk.LARGE
            if child is None or item.kind != wire.BYTES or small:
                continue
            # A token has no place in several pieces of one tensor: leave them to protobuf.
            if times[item.number] > 1 and item.number in _SINGLE.get(kind, ()):
                continue
            body = self.message(child, item.payload, item.end, depth + 1)
            out += [
                bytes(self.data[kept : item.start]),
                wire.field_head(item.number, len(body)),
            ]
            out.append(body)
            kept = item.end
        out.append(bytes(self.data[kept:end]))
        return b"".join(out)

    def tensor(self, start: int, end: int) -> bytes:
        item, stored, last, in_order, place = None, 0, 0, True, end
        for part in wire.fields(self.data, start, end):
            in_order = in_order and last <= part.number
            last = part.number
            self.canonical = self.canonical and in_order and part.canonical
            if part.number in PLAIN_BYTES:
                item, stored, place = part, stored + 1, end
            elif place == end and part.number > RAW_DATA:
                place = part.start
        # Data in two fields, or in one field twice, is protobuf's to merge or override.
        if item is None or stored != 1 or item.kind != wire.BYTES:
            return bytes(self.data[start:end])
        length = item.end - item.payload
        if length < bulk.LARGE:
            return bytes(self.data[start:end])
        if length % PLAIN_BYTES[item.number]:
            raise ModelFileError(f"the numbers at byte {item.payload} end inside a number")
        mark = token(len(self.payloads))
        self.payloads.append(Payload(self.source, item.payload, length, item.number))
        stand_in = wire.field_head(RAW_DATA, len(mark)) + mark
        if not in_order:
            place = item.end
        before = bytes(self.data[start : item.start]) + bytes(self.data[item.end : place])
        return before + stand_in + bytes(self.data[place:end])


def strip(data: wire.Buffer, source: Source) -> tuple[bytes, list[Payload], bool]:
    """Copy a serialised ModelProto without the bytes of its large tensors.

    Args:
        data: The whole file, typically memory-mapped: only headers are touched.
        source: The file that `data` is.

    Returns:
        The small copy with tokens, the payloads the tokens stand for, and whether the
        scanned messages were encoded canonically.

    Raises:
        ModelFileError: If the bytes are not a protobuf message.
    """
    work = _Strip(data, source)
    small = work.message(_MODEL, 0, len(data), 0)
    return small, work.payloads, work.canonical


def scan(file: Path) -> tuple[bytes, list[Payload], bool]:
    """`strip` a file.

    Raises:
        OSError: If it cannot be read.
        ModelFileError: If it is not a protobuf message, with a hint if it is known what
            it is instead.
    """
    if file.is_dir():
        raise ModelFileError(f"{file} is a folder", hint=_folder_hint(file))
    source = Source.of(file)
    if source.size == 0:
        raise ModelFileError(f"{file.name} is empty", hint="export or copy it again")
    with file.open("rb") as handle:
        _refuse_others(file, handle.read(HEAD))
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                return strip(view, source)
            finally:
                view.release()


def _folder_hint(folder: Path) -> str:
    """Which file of a folder may have been meant."""
    names = sorted(item.name for item in folder.glob("*.onnx"))
    if names:
        return f"name the .onnx file in it: {', '.join(names[:5])}"
    if (folder / "adapter_config.json").is_file():
        return "it is a trained adapter: `onnx-adapt insert MODEL.onnx --adapter FOLDER`"
    if (folder / "saved_model.pb").is_file():
        return f"`python -m tf2onnx.convert --saved-model {folder.name} --output model.onnx`"
    return (
        "no .onnx file is in it; `optimum-cli export onnx` makes one of a Hugging Face model"
    )


def _refuse_others(file: Path, head: bytes) -> None:
    if found := recognised(head, file.name):
        raise ModelFileError(f"{file.name} is {found[0]}, no ONNX model", hint=found[1])
    if is_text(head):
        raise ModelFileError(
            f"{file.name} is a text file, no ONNX model", hint="give the binary .onnx file"
        )


def splice(small: bytes, payloads: Sequence[Payload]) -> tuple[list[Segment], int]:
    """Put payloads back in place of their tokens.

    Args:
        small: A serialised ModelProto with tokens.
        payloads: What the tokens stand for.

    Returns:
        The model as a sequence of bytes and file ranges, and its total length in bytes.
    """
    marks = list(tokens_in(small))
    return _splice_message(small, payloads, marks, _MODEL, 0, len(small))


def _splice_message(
    small: bytes,
    payloads: Sequence[Payload],
    marks: list[int],
    kind: int,
    start: int,
    end: int,
) -> tuple[list[Segment], int]:
    if not marks:
        return [small[start:end]], end - start
    if kind == _TENSOR:
        return _splice_tensor(small, payloads, start, end)
    out: list[Segment] = []
    total, kept, next_mark = 0, start, 0
    for item in wire.fields(small, start, end):
        inside = next_mark
        while inside < len(marks) and marks[inside] < item.end:
            inside += 1
        if inside == next_mark:
            continue
        child = _CHILDREN[kind][item.number]
        within = marks[next_mark:inside]
        body, length = _splice_message(small, payloads, within, child, item.payload, item.end)
        head = small[kept : item.start] + wire.field_head(item.number, length)
        out += [head, *body]
        total += len(head) + length
        kept, next_mark = item.end, inside
    out.append(small[kept:end])
    return out, total + end - kept


def _splice_tensor(
    small: bytes, payloads: Sequence[Payload], start: int, end: int
) -> tuple[list[Segment], int]:
    parts: list[tuple[int, list[Segment], int]] = []
    for item in wire.fields(small, start, end):
        index = None
        if item.number == RAW_DATA:
            index = token_index(small[item.payload : item.end])
        if index is None:
            parts.append((item.number, [small[item.start : item.end]], item.end - item.start))
            continue
        place = payloads[index]
        head = wire.field_head(place.number, place.length)
        parts.append((place.number, [head, place], len(head) + place.length))
    parts.sort(key=lambda part: part[0])
    return [s for _, chunk, _ in parts for s in chunk], sum(size for _, _, size in parts)
