"""A path to a model and back: large tensors stay on disk, unedited bytes stay as they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError

from onnx_adapt.errors import ArgumentError, ModelFileError, SaveError, reason
from onnx_adapt.model import destination, external_data
from onnx_adapt.model.describing import model_line, model_table
from onnx_adapt.model.destination import Destination
from onnx_adapt.model.external_data import external_to_memory
from onnx_adapt.model.externalise import externalise, is_externalised
from onnx_adapt.model.paths import as_path
from onnx_adapt.model.payloads import Payload, Segment
from onnx_adapt.model.splice import scan, splice
from onnx_adapt.model.thin import make_thin, make_whole
from onnx_adapt.model.whole_files import FilePlan, Progress, write_files
from onnx_adapt.words import beside

PROTOBUF_LIMIT = 2**31 - 1
"""The largest file protobuf can read, in bytes."""

_OPSETS_SINCE = 3
"""The IR version from which a model must name its operator sets."""


@dataclass(frozen=True, slots=True)
class Model:
    """An ONNX model whose large tensors are still in their file.

    Attributes:
        proto: The graph. A large tensor holds a token instead of its data.
        payloads: Where the data of each token is.
        path: The file the model was opened from, or None for a model made in memory.
        canonical: Whether the file's encoding is the one protobuf itself would write;
            only then can the file come back byte for byte.
        weights_in: The borrowed files of a thin model; none if it is not thin.
    """

    proto: onnx.ModelProto
    payloads: tuple[Payload, ...] = ()
    path: Path | None = None
    canonical: bool = True
    weights_in: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        """One line, without the graph."""
        return model_line(self.proto, self.label)

    def _repr_html_(self) -> str:
        return model_table(self.proto, self.label)

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
        path: The model, as it was named.
        size: Its length in bytes.
        data: Data files written beside it.
        externalised: Whether data was moved out of the model file, past protobuf's 2 GB.
        weights_in: The borrowed files of a thin result.
    """

    path: Path
    size: int
    data: tuple[Path, ...]
    externalised: bool
    weights_in: tuple[Path, ...]


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open an ONNX file without reading its large tensors.

    Args:
        path: The `.onnx` file. External data is expected beside it.

    Raises:
        ModelFileError: If the file is not a whole ONNX model.
        ExternalDataError: If data beside it is missing, short or outside its folder, or if
            the base of a thin model is another one now.

    Example:
        >>> import onnx_adapt as oa
        >>> model = oa.open_model("models/dnsmos-p808.onnx")
        >>> model.proto.graph.input[0].name
        'input_1'
    """
    file = as_path(path, "a model").absolute()
    try:
        small, payloads, canonical = scan(file)
        proto = onnx.ModelProto.FromString(small)
    except OSError as error:
        raise ModelFileError(
            f"cannot read {file}: {error.strerror or error}", hint=beside(file)
        ) from error
    except (ModelFileError, DecodeError) as error:
        if isinstance(error, ModelFileError) and error.hint != error.advice:
            raise
        raise ModelFileError(
            f"{file.name} is not a whole ONNX model: {reason(error)}",
            hint="the file is cut off, damaged or of another format; export or copy it again",
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelFileError(
            f"{file.name} holds no ONNX graph", hint="is it another kind of protobuf file?"
        )
    if proto.ir_version >= _OPSETS_SINCE and not proto.opset_import:
        raise ModelFileError(
            f"{file.name} is not a whole ONNX model: it ends before its opset",
            hint="the file is cut off; export or copy it again",
        )
    external_data.check(file, list(external_data.references(proto)))
    canonical = canonical and proto.SerializeToString() == small
    places, weights_in = make_whole(file, proto, payloads)
    return Model(proto, places, file, canonical, weights_in)


def save_model(
    model: Model | onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    keep_external: bool = False,
    thin: bool = False,
    beside: Sequence[FilePlan] = (),
    progress: Progress | None = None,
) -> Saved:
    """Write a model: to a temporary file first, then moved into place.

    Data beside the model is referred to where it is if the folder stays the same, and
    copied otherwise. A result that would pass protobuf's 2 GB puts its bulk data into a
    file beside it.

    A thin result holds the graph and the slots, and refers to the file that the model was
    opened from for every tensor of 4 KB and more. Opened, it is like any other model:
    saved again it is whole.

    Args:
        model: The model; the file it was opened from must be unchanged.
        path: The destination. An older file there is replaced.
        overwrite: Allow the destination to be the file the model was opened from.
        keep_external: Do not copy external data; it must be in the new folder already.
        thin: Leave large weights in the file the model was opened from, beside the result.
        beside: Files that belong to the model: all are written, or none.
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
    model = Model(model) if isinstance(model, onnx.ModelProto) else model
    if not isinstance(model, Model):
        kind = type(model).__name__
        raise ArgumentError(
            f"{kind} is no model to write", hint="give the model, then the path"
        )
    place = destination.resolve_destination(as_path(path, "a model to write"))
    proto, weights_in = _thin(model, place) if thin else (model.proto, ())
    items = list(external_data.references(proto))
    if model.path is None and items:
        raise external_to_memory(items[0].tensor)
    data: list[FilePlan] = []
    if model.path is not None:
        others = {payload.source.path for payload in model.payloads} - {model.path}
        destination.refuse_replacing_model(model.path, place, items, others, overwrite)
        data = _copies(model, model.path, place, items, keep_external, beside)
        place = destination.reach_data(model.path, place, items)
    segments, size = _encode(proto, model.payloads)
    externalised = size > PROTOBUF_LIMIT
    former = _former_data(place) if externalised else []
    if externalised:
        file = _new_data_file(place, items, former)
        small, plan = externalise(proto, model.payloads, file.name)
        segments, size = _encode(small, model.payloads)
        data.append((file, _padded(plan)))
    if size > PROTOBUF_LIMIT:
        raise _too_large()
    files: list[FilePlan] = [*beside, *data, (place.file, segments)]
    if os.path.realpath(place.path) != str(place.file):
        files.append((place.path, Path(os.path.relpath(place.file, place.path.parent))))
    write_files(files, progress)
    for file in former:
        with contextlib.suppress(OSError):
            file.unlink()
    return Saved(place.path, size, tuple(file for file, _ in data), externalised, weights_in)


def _copies(
    model: Model,
    base: Path,
    place: Destination,
    items: Sequence[external_data.Reference],
    keep: bool,
    beside: Sequence[FilePlan],
) -> list[FilePlan]:
    """The external data to copy along, which no file `beside` the model may replace."""
    found = destination.data_to_copy(base, place, items, keep)
    outputs = [file for file, _ in beside]
    protect_files(model, *outputs)
    destination.refuse_replacing_files(outputs, found, model.label)
    return [(file, [Payload(source, 0, source.size)]) for file, source in found.items()]


def protect_files(model: Model, *outputs: str | os.PathLike[str]) -> None:
    """Refuse outputs that would replace a file that a model is in.

    Raises:
        SaveError: If an output is one of them, under whatever name.
    """
    destination.refuse_replacing_files(outputs, files_of(model), model.label)


def files_of(model: Model) -> set[Path]:
    """The files that a model is in: its own, and those with its weights.

    Raises:
        ExternalDataError: If a data file's place is outside the model's folder.
    """
    found = {payload.source.path for payload in model.payloads}
    items = external_data.by_location(external_data.references(model.proto))
    if model.path is not None:
        found |= {external_data.locate(model.path, item) for item in items.values()}
        found.add(model.path)
    return found


def _thin(model: Model, place: Destination) -> tuple[onnx.ModelProto, tuple[Path, ...]]:
    """The thin form of a model, and its borrowed files."""
    if model.path is None:
        raise SaveError(
            "a model in memory cannot be saved thin",
            hint="save it, then open it from its file",
        )
    destination.refuse_other_folder(model.path, place)
    own = model.path if model.weights_in else None
    return make_thin(model.proto, model.payloads, model.path, own)


def _encode(
    proto: onnx.ModelProto, payloads: Sequence[Payload]
) -> tuple[Sequence[Segment], int]:
    try:
        return splice(proto.SerializeToString(), payloads)
    except EncodeError as error:
        raise _too_large() from error


def _too_large() -> SaveError:
    return SaveError(
        "the model passes protobuf's 2 GB even without the weights that it was opened with",
        hint="insert fewer slots, or swappable ones",
    )


def _data_names(place: Destination) -> list[Path]:
    return [place.path.with_name(f"{place.path.name}{end}") for end in (".data", ".1.data")]


def _former_data(place: Destination) -> list[Path]:
    """The data files of an older result that this one replaces."""
    return [f for f in _data_names(place) if os.path.lexists(f) and _owns(place, f)]


def _new_data_file(
    place: Destination, items: Sequence[external_data.Reference], former: Sequence[Path]
) -> Path:
    """A free name for externalised data, not that of a result that is still needed."""
    file = next(f for f in (*_data_names(place), place.path) if f not in former)
    same = {
        os.path.realpath(place.path.parent / location)
        for location in external_data.by_location(items)
    }
    if os.path.realpath(file) in same or os.path.lexists(file):
        raise SaveError(
            f"the result passes protobuf's 2 GB, and {file} for its data exists already",
            hint="choose another path with -o, or move that file away",
        )
    return file


def _owns(place: Destination, data: Path) -> bool:
    """Whether a data file is externalised data of the model that is replaced."""
    try:
        old = onnx.ModelProto.FromString(scan(place.path)[0])
        return is_externalised(old, data.name)
    except (OSError, ModelFileError, DecodeError):
        return False


def _padded(plan: Sequence[tuple[int, Payload]]) -> list[Segment]:
    segments: list[Segment] = []
    at = 0
    for offset, place in plan:
        segments += [bytes(offset - at), place]
        at = offset + place.length
    return segments
