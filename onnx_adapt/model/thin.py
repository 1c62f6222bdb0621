"""Thin models: large weights stay in the base's files, and the model refers to them.

Only a file is thin. `make_thin` turns the weights of a model into references as it is saved,
and `make_whole` turns them back as it is opened, so no other module knows thin models.

An example: `base.onnx` has a weight `W` of 1 MB at byte 500, and the model saved from it is
`fr.onnx`. In `fr.onnx` the tensor `W` is external, with location `base.onnx`, offset 500 and
length 1 MB, and it carries the mark `_THIN`. The record of borrowed files describes
`base.onnx` with the range (500, 1 MB). Opening `fr.onnx` checks `base.onnx` against the
record, removes mark and record, and `W` is inline again, its bytes in `base.onnx`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from onnx_adapt.errors import SaveError
from onnx_adapt.model import walk
from onnx_adapt.model.borrowed import (
    KEY,
    BorrowedFile,
    check_borrowed_file,
    describe_file,
    read_record,
    write_record,
)
from onnx_adapt.model.external_data import is_external, payload, reference, references
from onnx_adapt.model.externalise import externalise_tensor, internalise
from onnx_adapt.model.payloads import Payload, Source, token_index

_THIN = "pkg.onnx_adapt.files.thin"
"""Marks a tensor whose data stayed in the file of the base."""


def make_thin(
    proto: onnx.ModelProto, payloads: Sequence[Payload], path: Path, keep: Path | None
) -> tuple[onnx.ModelProto, tuple[Path, ...]]:
    """Make the thin form of a model: its large tensors refer to the files they are in.

    Args:
        proto: The model; it is left as it was.
        payloads: Where its data is.
        path: The file it was opened from; all its data is in the same folder.
        keep: A file whose data is copied into the result instead, or None. A model that
            was opened thin keeps the slots from its own file this way.

    Returns:
        The thin model, with a record of the files, and the files.

    Raises:
        SaveError: If a file has changed since it was opened, or cannot be referred to.
        ExternalDataError: If data beside the model is missing.
    """
    small = onnx.ModelProto()
    small.CopyFrom(proto)
    names: dict[Path, str] = {}
    for tensor in walk.tensors(small, sparse=False):
        index = token_index(tensor.raw_data)
        if index is None or payloads[index].source.path == keep:
            continue
        place = payloads[index]
        file = place.source.path
        if file not in names:
            names[file] = _name(place.source, path.parent)
        externalise_tensor(tensor, place, names[file], place.offset, _THIN)
    files = _borrowed_files(path, small)
    if files:
        small.metadata_props.add(key=KEY, value=write_record(files))
    return small, tuple(path.parent / file.name for file in files)


def _name(source: Source, folder: Path) -> str:
    """The location by which a reference names a file, which must be unchanged."""
    name = source.path.relative_to(folder).as_posix()
    if not source.is_unchanged():
        raise SaveError(f"{source.path} has changed since it was opened", hint="run again")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise SaveError(
            f"a thin model cannot refer to {name}: the name is not UTF-8",
            hint="rename the file, or save the model whole",
        ) from error
    return name


def _borrowed_files(path: Path, proto: onnx.ModelProto) -> list[BorrowedFile]:
    found: dict[str, Source] = {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for tensor in walk.tensors(proto):
        if is_external(tensor):
            place = payload(path, tensor, found)
            name = reference(tensor).location
            ranges.setdefault(name, []).append((place.offset, place.length))
    return [
        describe_file(path.parent, name, places) for name, places in sorted(ranges.items())
    ]


def make_whole(
    path: Path, proto: onnx.ModelProto, payloads: Sequence[Payload]
) -> tuple[tuple[Payload, ...], tuple[Path, ...]]:
    """Undo `make_thin` in place, on a model that was just opened.

    Returns:
        The payloads, with those in borrowed files appended, and the borrowed files; none
        if the model is not thin.

    Raises:
        ExternalDataError: If a file has changed.
        ManifestError: If the record is damaged or too new.
    """
    record = next((entry for entry in proto.metadata_props if entry.key == KEY), None)
    if record is None:
        return tuple(payloads), ()
    used = {item.location for item in references(proto)}
    files = [item for item in read_record(record.value) if item.name in used]
    for file in files:
        check_borrowed_file(path.parent, file, path.name)
    proto.metadata_props.remove(record)
    payloads = internalise(path, proto, payloads, _THIN)
    return payloads, tuple(path.parent / file.name for file in files)
