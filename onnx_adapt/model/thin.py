"""Thin models: large weights stay in the base's files, and the model refers to them.

Thinness is a property of a file alone. `borrow` makes references of what an opened model
has on disk, `give_back` undoes it as a file is opened; what is in between knows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from onnx_adapt.errors import SaveError
from onnx_adapt.model import walk
from onnx_adapt.model.borrowed import (
    KEY,
    Lender,
    check_lender,
    look_at,
    read_record,
    write_record,
)
from onnx_adapt.model.elsewhere import move_in, take_out
from onnx_adapt.model.external_data import is_external, payload, reference, references
from onnx_adapt.model.payloads import Payload, Source, token_index

_THIN = "pkg.onnx_adapt.files.thin"
"""Marks a tensor whose data stayed in the file of the base."""


def borrow(
    proto: onnx.ModelProto, payloads: Sequence[Payload], path: Path, keep: Path | None
) -> tuple[onnx.ModelProto, tuple[Path, ...]]:
    """Refer to the files that the data of large tensors is in.

    Args:
        proto: The model; it is left as it was.
        payloads: Where its data is.
        path: The file it was opened from; all its data is in the same folder.
        keep: A file whose data goes into the result: that of a thin model, which holds
            the slots of the base but not its weights.

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
        take_out(tensor, place, names[file], place.offset, _THIN)
    lenders = _lenders(path, small)
    if lenders:
        small.metadata_props.add(key=KEY, value=write_record(lenders))
    return small, tuple(path.parent / lender.name for lender in lenders)


def _name(source: Source, folder: Path) -> str:
    """What a reference calls a file that is as it was when it was opened."""
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


def _lenders(path: Path, proto: onnx.ModelProto) -> list[Lender]:
    found: dict[str, Source] = {}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for tensor in walk.tensors(proto):
        if is_external(tensor):
            place = payload(path, tensor, found)
            name = reference(tensor).location
            ranges.setdefault(name, []).append((place.offset, place.length))
    return [look_at(path.parent, name, places) for name, places in sorted(ranges.items())]


def give_back(
    path: Path, proto: onnx.ModelProto, payloads: Sequence[Payload]
) -> tuple[tuple[Payload, ...], tuple[Path, ...]]:
    """Undo `borrow` in place, for a model that was opened.

    Returns:
        The payloads, with those in other files appended, and these files; none if the
        model is not thin.

    Raises:
        ExternalDataError: If a file has changed.
        ManifestError: If the record is damaged or too new.
    """
    record = next((entry for entry in proto.metadata_props if entry.key == KEY), None)
    if record is None:
        return tuple(payloads), ()
    used = {item.location for item in references(proto)}
    lenders = [item for item in read_record(record.value) if item.name in used]
    for lender in lenders:
        check_lender(path.parent, lender, path.name)
    proto.metadata_props.remove(record)
    files = tuple(path.parent / lender.name for lender in lenders)
    return move_in(path, proto, payloads, _THIN), files
