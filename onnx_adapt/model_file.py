"""A path to a model and back: large tensors stay on disk, unedited bytes stay as they are."""

from __future__ import annotations

import filecmp
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from onnx_adapt import external_data
from onnx_adapt.errors import ExternalDataError, ModelFileError, SaveError
from onnx_adapt.payloads import Payload, Segment, Source, splice, strip, token_index
from onnx_adapt.whole_files import FilePlan, Progress, write_files

PROTOBUF_LIMIT = 2**31 - 1
"""The largest file protobuf can read, in bytes."""


@dataclass(frozen=True, slots=True)
class Model:
    """An ONNX model whose large tensors are still in their file.

    Attributes:
        proto: The graph. A large tensor holds a token instead of its data.
        payloads: Where the data of each token is.
        path: The file the model was opened from, or None for a model made in memory.
        canonical: Whether the file's encoding is the one protobuf itself would write;
            only then can the file come back byte for byte.
    """

    proto: onnx.ModelProto
    payloads: tuple[Payload, ...] = ()
    path: Path | None = None
    canonical: bool = True

    def copy(self) -> Model:
        """A model with a graph of its own; data on disk is shared."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        return replace(self, proto=proto)

    @property
    def label(self) -> str:
        """The file's name for messages, or 'the model'."""
        return self.path.name if self.path else "the model"


@dataclass(frozen=True, slots=True)
class Saved:
    """What a save wrote.

    Attributes:
        path: The model.
        size: Its length in bytes.
        data: Data files written beside it.
        moved_out: Whether data had to leave the model file because of protobuf's 2 GB.
    """

    path: Path
    size: int
    data: tuple[Path, ...] = ()
    moved_out: bool = False


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open an ONNX file without reading its large tensors.

    Args:
        path: The `.onnx` file. External data is expected beside it.

    Raises:
        ModelFileError: If the file is not a whole ONNX model.
        ExternalDataError: If data beside it is missing, short or outside its folder.

    Example:
        >>> import onnx_adapt as oa
        >>> model = oa.open_model("models/dnsmos-p808.onnx")
        >>> model.proto.graph.input[0].name
        'input_1'
    """
    file = Path(path).absolute()
    try:
        small, payloads, canonical = _scan(file)
        proto = onnx.ModelProto.FromString(small)
    except OSError as error:
        raise ModelFileError(
            f"cannot read {file}: {error.strerror or error}", hint="check the path"
        ) from error
    except (ModelFileError, DecodeError) as error:
        if isinstance(error, ModelFileError) and error.hint:
            raise
        raise ModelFileError(
            f"{file.name} is not a whole ONNX model: {error}",
            hint="the file is cut off, damaged or of another format; export or copy it again",
        ) from error
    if not proto.HasField("graph") or (not proto.graph.node and not proto.graph.output):
        raise ModelFileError(
            f"{file.name} holds no ONNX graph", hint="is it another kind of protobuf file?"
        )
    external_data.check(file, list(external_data.references(proto)))
    canonical = canonical and proto.SerializeToString() == small
    return Model(proto, tuple(payloads), file, canonical)


def _scan(file: Path) -> tuple[bytes, list[Payload], bool]:
    if file.is_dir():
        raise ModelFileError(f"{file} is a folder", hint="name the .onnx file in it")
    source = Source.of(file)
    if source.size == 0:
        raise ModelFileError(f"{file.name} is empty", hint="export or copy it again")
    with file.open("rb") as handle:
        head = handle.read(512)
        _refuse_text(file, head)
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                return strip(view, source)
            finally:
                view.release()


def _refuse_text(file: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise ModelFileError(
            f"{file.name} is a Git LFS pointer, not the model", hint="run `git lfs pull`"
        )
    printable = sum(byte in b"\t\n\r" or byte >= 32 for byte in head)
    if printable == len(head):
        raise ModelFileError(
            f"{file.name} is a text file, not an ONNX model",
            hint="give the binary .onnx file (onnx.parser turns ONNX text into one)",
        )


def read_tensor(model: Model, tensor: onnx.TensorProto) -> np.ndarray:
    """The value of one tensor of a model, read from wherever its data is.

    Raises:
        ModelFileError: If the data is not there any more or does not fit the shape.
    """
    index = token_index(tensor.raw_data)
    if index is not None:
        place = model.payloads[index]
    elif external_data.is_external(tensor):
        if model.path is None:
            raise ExternalDataError(f"tensor {tensor.name!r} is external to a model in memory")
        place = external_data.payload(model.path, tensor)
    else:
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise ModelFileError(f"tensor {tensor.name!r} is damaged: {error}") from error
    loaded = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type)
    loaded.raw_data = read_payload(place)
    try:
        return numpy_helper.to_array(loaded)
    except (ValueError, TypeError) as error:
        raise ModelFileError(f"tensor {tensor.name!r} is damaged: {error}") from error


def read_payload(place: Payload, limit: int | None = None) -> bytes:
    """The bytes of a payload, or the first `limit` of them."""
    try:
        with place.source.path.open("rb") as handle:
            handle.seek(place.offset)
            return handle.read(place.length if limit is None else min(limit, place.length))
    except OSError as error:
        raise ModelFileError(f"cannot read {place.source.path}: {error.strerror}") from error


def save_model(
    model: Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    keep_external: bool = False,
    progress: Progress | None = None,
) -> Saved:
    """Write a model: to a temporary file first, then moved into place.

    Data beside the model is referred to where it is if the folder stays the same, and
    copied otherwise. A result that would pass protobuf's 2 GB puts its bulk data into a
    file beside it.

    Args:
        model: The model; the file it was opened from must be unchanged.
        path: The destination. An older file there is replaced.
        overwrite: Allow the destination to be the file the model was opened from.
        keep_external: Do not copy external data; it must be in the new folder already.
        progress: Told about bytes written.

    Raises:
        SaveError: If the destination cannot or may not be written.
        ExternalDataError: If `keep_external` leaves a reference without its file.

    Example:
        >>> import onnx_adapt as oa, tempfile
        >>> model = oa.open_model("models/dnsmos-p808.onnx")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     oa.save_model(model, folder + "/copy.onnx").size
        224860
    """
    target = Path(path).absolute()
    references = list(external_data.references(model.proto))
    _check_target(model, target, references, overwrite)
    for source in {place.source for place in model.payloads}:
        if not source.is_unchanged():
            raise SaveError(f"{source.path} has changed since it was opened", hint="run again")
    target = target.resolve()
    copies = _data_to_copy(model, target, references, keep_external)
    segments, size = splice(model.proto.SerializeToString(), model.payloads)
    moved_out = size > PROTOBUF_LIMIT
    data: list[FilePlan] = [
        (target.parent / location, [Payload(Source.of(file), 0, file.stat().st_size)])
        for location, file in copies.items()
    ]
    if moved_out:
        location = target.name + ".data"
        small, plan = external_data.move_out(model.proto, model.payloads, location)
        segments, size = splice(small.SerializeToString(), model.payloads)
        if size > PROTOBUF_LIMIT:
            raise SaveError(f"{target.name} passes protobuf's 2 GB even without its weights")
        data.append((target.parent / location, _padded(plan)))
    write_files([*data, (target, segments)], progress)
    return Saved(target, size, tuple(file for file, _ in data), moved_out)


def _check_target(
    model: Model, target: Path, references: Sequence[external_data.Reference], overwrite: bool
) -> None:
    if not target.parent.is_dir():
        raise SaveError(f"there is no folder {target.parent}", hint="make it first")
    if target.exists() and not target.is_file():
        raise SaveError(f"{target} is not a regular file", hint="choose another output path")
    if model.path is None or not target.exists():
        return
    if os.path.samefile(model.path, target) and not overwrite:
        raise SaveError(
            f"the output would replace the input {target.name}",
            hint="choose another path with -o, or allow it with --force",
        )
    for item in references:
        if os.path.samefile(external_data.locate(model.path, item), target):
            raise SaveError(
                f"the output would replace {item.location!r}, the data of {model.path.name}",
                hint="choose another path with -o",
            )


def _data_to_copy(
    model: Model, target: Path, items: Sequence[external_data.Reference], keep: bool
) -> dict[str, Path]:
    """Data files that must come along, by location; none if they are there already."""
    if model.path is None and items:
        raise ExternalDataError(f"tensor {items[0].tensor!r} is external to a model in memory")
    if model.path is None or target.parent == model.path.resolve().parent:
        return {}
    if keep:
        external_data.check(target, items)
        return {}
    files = {item.location: external_data.locate(model.path, item) for item in items}
    for location, file in list(files.items()):
        there = target.parent / location
        if not there.exists():
            continue
        if not filecmp.cmp(file, there, shallow=False):
            raise SaveError(
                f"{there} exists and is not the data of {model.path.name}",
                hint="write to another folder, or rename the data file that is there",
            )
        del files[location]
    return files


def _padded(plan: Sequence[tuple[int, Payload]]) -> list[Segment]:
    segments: list[Segment] = []
    at = 0
    for offset, place in plan:
        segments += [bytes(offset - at), place]
        at = offset + place.length
    return segments
