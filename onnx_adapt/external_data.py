"""Tensor data in files beside a model (ONNX external data): check, copy, move out.

Format: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx

from onnx_adapt import walk
from onnx_adapt.errors import ExternalDataError, SaveError
from onnx_adapt.payloads import RAW_DATA, Payload, Source, token, token_index

MOVED_OUT = "pkg.onnx_adapt.inline"
"""Marks a tensor that `move_out` took out of the model file; `move_in` undoes it."""

_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Reference:
    """What a tensor's `external_data` entries say.

    Attributes:
        tensor: The tensor's name.
        location: Path of the data file relative to the model's folder.
        offset: Offset of the data in the file.
        length: Number of bytes, or None for the rest of the file.
    """

    tensor: str
    location: str
    offset: int
    length: int | None


def reference(tensor: onnx.TensorProto) -> Reference:
    """Read the entries of an external tensor.

    Raises:
        ExternalDataError: If there is no location, or offset or length is not a number.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError as error:
        raise ExternalDataError(
            f"external data of tensor {tensor.name!r} has a broken offset or length"
        ) from error
    if not entries.get("location") or offset < 0 or (length or 0) < 0:
        raise ExternalDataError(f"external data of tensor {tensor.name!r} is incomplete")
    return Reference(tensor.name, entries["location"], offset, length)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's data is in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def references(proto: onnx.ModelProto) -> Iterator[Reference]:
    """The reference of every external tensor of a model."""
    for tensor in walk.tensors(proto):
        if is_external(tensor):
            yield reference(tensor)


def locate(model: Path, item: Reference) -> Path:
    """The data file of a reference, checked to be inside the model's folder.

    The folder is the one the model is in, or the one it resolves to where it is a
    link (download caches link a model and its data into one folder of blobs).

    Raises:
        ExternalDataError: If the location leaves the folder.
    """
    parts = PurePosixPath(item.location.replace("\\", "/")).parts
    absolute = item.location.startswith(("/", "\\")) or PureWindowsPath(item.location).drive
    path = model.parent / item.location
    homes = (model.parent.resolve(), model.resolve().parent)
    if absolute or ".." in parts or not any(path.resolve().is_relative_to(h) for h in homes):
        raise ExternalDataError(
            f"tensor {item.tensor!r} refers to {item.location!r}, outside the model's folder",
            hint="a model may only refer to files beside it; move the data there",
        )
    return path


def check(model: Path, items: Sequence[Reference]) -> None:
    """Check that the data of every reference is there and long enough.

    Raises:
        ExternalDataError: If a file is missing, too short or outside the folder.
    """
    sizes: dict[str, int] = {}
    for item in items:
        if item.location not in sizes:
            path = locate(model, item)
            if not path.is_file():
                raise ExternalDataError(
                    f"{model.name} needs the data file {item.location!r}, which is not in "
                    f"{model.parent}",
                    hint="copy the data file beside the model; the two belong together",
                )
            sizes[item.location] = path.stat().st_size
        size = sizes[item.location]
        if item.offset + (item.length or 0) > size:
            raise ExternalDataError(
                f"tensor {item.tensor!r} needs bytes {item.offset} to "
                f"{item.offset + (item.length or 0)} of {item.location!r}, which has {size}",
                hint="the data file is cut off or belongs to another model",
            )


def payload(model: Path, tensor: onnx.TensorProto) -> Payload:
    """Where the bytes of an external tensor are."""
    item = reference(tensor)
    source = Source.of(locate(model, item))
    length = source.size - item.offset if item.length is None else item.length
    return Payload(source, item.offset, length)


def refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor refer to bytes of another file instead of holding data."""
    for name in ("raw_data", "float_data", "double_data"):
        tensor.ClearField(name)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def move_out(
    proto: onnx.ModelProto, payloads: Sequence[Payload], location: str
) -> tuple[onnx.ModelProto, list[tuple[int, Payload]]]:
    """Refer to `location` for all bulk data, for a model that passes protobuf's 2 GB.

    Returns:
        A copy of the model, and for each tensor the offset its payload goes to.

    Raises:
        SaveError: If a tensor stores numbers in a form that has no external equivalent.
    """
    small = onnx.ModelProto()
    small.CopyFrom(proto)
    plan: list[tuple[int, Payload]] = []
    offset = 0
    for tensor in walk.tensors(small):
        index = token_index(tensor.raw_data)
        if index is None:
            continue
        place = payloads[index]
        if place.number != RAW_DATA:
            raise SaveError(
                f"the result passes protobuf's 2 GB and tensor {tensor.name!r} has typed data",
                hint="save the base with external data first (onnx.save_model)",
            )
        explicit = "default" if tensor.HasField("data_location") else ""
        refer(tensor, location, offset, place.length)
        tensor.metadata_props.add(key=MOVED_OUT, value=explicit)
        plan.append((offset, place))
        offset += -(-place.length // _ALIGNMENT) * _ALIGNMENT
    return small, plan


def move_in(
    model: Path | None, proto: onnx.ModelProto, payloads: Sequence[Payload]
) -> tuple[Payload, ...]:
    """Undo `move_out` in place: the marked tensors hold their data again.

    Returns:
        The payloads, with those of the tensors that came back in appended.
    """
    result = list(payloads)
    for tensor in walk.tensors(proto):
        marks = [i for i, entry in enumerate(tensor.metadata_props) if entry.key == MOVED_OUT]
        if not marks or model is None:
            continue
        result.append(payload(model, tensor))
        explicit = tensor.metadata_props[marks[0]].value
        del tensor.metadata_props[marks[0]]
        del tensor.external_data[:]
        tensor.ClearField("data_location")
        if explicit:
            tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = token(len(result) - 1)
    return tuple(result)
