"""Tensor data in files beside a model (ONNX external data): check, find, refer.

Format: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx

from onnx_adapt.errors import ExternalDataError
from onnx_adapt.model import walk
from onnx_adapt.model.payloads import (
    PLAIN_BYTES,
    Payload,
    Source,
)
from onnx_adapt.model.signatures import HEAD, recognised

_MOST_BYTES = 2**63
_WITHOUT_SIZE = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8}
FIELDS = {
    number: onnx.TensorProto.DESCRIPTOR.fields_by_number[number].name for number in PLAIN_BYTES
}
"""The names of the TensorProto fields that can hold bulk data, by number."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The `external_data` entries of a tensor.

    Attributes:
        tensor: The tensor's name.
        location: Path of the data file relative to the model's folder.
        offset: Offset of the data in the file.
        length: Number of bytes, or None for the rest of the file.
        needed: Number of bytes that the tensor's shape needs, or 0 if that is not known.
    """

    tensor: str
    location: str
    offset: int
    length: int | None
    needed: int


def reference(tensor: onnx.TensorProto) -> Reference:
    """Read the entries of an external tensor.

    Raises:
        ExternalDataError: If there is no location, or offset or length is not a number.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError:
        offset = -1
        length = None
    # protobuf gives a text that is not UTF-8 as bytes
    if not isinstance(location, str) or not location or "\0" in location:
        wrong = "location"
    elif not (0 <= offset < _MOST_BYTES and 0 <= (length or 0) < _MOST_BYTES):
        wrong = "offset or length"
    else:
        return Reference(tensor.name, location, offset, length, bytes_needed(tensor))
    raise ExternalDataError(
        f"external data of tensor {tensor.name!r} has a broken {wrong}",
        hint="the model is damaged; export it again",
    )


def bytes_needed(tensor: onnx.TensorProto) -> int:
    """How many bytes the data of a tensor takes, by its shape and type."""
    count = 1
    for dim in tensor.dims:
        count *= max(dim, 0)
        if count > _MOST_BYTES:
            break  # no file has so many; the product of them all could fill the memory
    return (count * _bits(tensor.data_type) + 7) // 8


@cache
def _bits(data_type: int) -> int:
    """The size of one element, which most types have in their names: `FLOAT8E4M3FN`."""
    types = onnx.TensorProto.DataType
    name = types.Name(data_type) if data_type in types.values() else ""
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else _WITHOUT_SIZE.get(name, 0)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's data is in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def references(proto: onnx.ModelProto) -> Iterator[Reference]:
    """The reference of every external tensor of a model."""
    for tensor in walk.tensors(proto):
        if is_external(tensor):
            yield reference(tensor)


def locate(model: Path, item: Reference, home: Path | None = None) -> Path:
    """Find the path of a reference's data file, and check that it is in the model's folder.

    Args:
        model: The model, which may be a link.
        item: The reference.
        home: The folder that the model will be linked to, if the link does not exist yet.
            Download caches link a model and its data into one folder of blobs.

    Raises:
        ExternalDataError: If the location leaves the folder.
    """
    parts = PurePosixPath(item.location.replace("\\", "/")).parts
    absolute = item.location.startswith(("/", "\\")) or PureWindowsPath(item.location).drive
    path = model.parent / item.location
    real = Path(os.path.realpath(path))
    homes = (model.parent, home or Path(os.path.realpath(model)).parent)
    inside = any(real.is_relative_to(os.path.realpath(folder)) for folder in homes)
    if absolute or ".." in parts or not inside:
        raise ExternalDataError(
            f"tensor {item.tensor!r} refers to {item.location!r}, outside the model's folder",
            hint="a model may only refer to files beside it; move the data there",
        )
    return path


def find(model: Path, item: Reference) -> Source:
    """Find the data file of a reference, with its present size and time.

    Raises:
        ExternalDataError: If it is missing or outside the folder.
    """
    path = locate(model, item)
    try:
        return Source.of(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        why = f"is not in {model.parent}" if missing else f"cannot be used: {error.strerror}"
        raise ExternalDataError(
            f"{model.name} needs the data file {item.location!r}, which {why}",
            hint="copy the data file beside the model; the two belong together",
        ) from error


def by_location(items: Iterable[Reference]) -> dict[str, Reference]:
    """Pick one reference to each data file, by location."""
    return {item.location: item for item in items}


def check(model: Path, items: Sequence[Reference]) -> None:
    """Check that the data of every reference is there and long enough.

    Raises:
        ExternalDataError: If a file is missing, too short or outside the folder.
    """
    sizes = {name: find(model, item).size for name, item in by_location(items).items()}
    for item in items:
        size, length = sizes[item.location], item.length
        end = item.offset + (item.needed if length is None else length)
        if end > size:
            with find(model, item).path.open("rb") as file:
                if found := recognised(file.read(HEAD), item.location):
                    raise ExternalDataError(f"{item.location} is {found[0]}", hint=found[1])
            raise ExternalDataError(
                f"tensor {item.tensor!r} needs bytes {item.offset} to {end} of "
                f"{item.location!r}, which has {size}",
                hint="the data file is cut off or belongs to another model",
            )
        if length is not None and length < item.needed:
            raise ExternalDataError(
                f"tensor {item.tensor!r} has {length} bytes of {item.location!r}, and its "
                f"shape needs {item.needed}",
                hint="the model is damaged; export it again",
            )


def payload(
    model: Path, tensor: onnx.TensorProto, found: dict[str, Source] | None = None
) -> Payload:
    """Find where the bytes of an external tensor are.

    Args:
        model: The model.
        tensor: The tensor.
        found: Data files by location, to find each only once.

    Raises:
        ExternalDataError: If the data is missing.
    """
    item = reference(tensor)
    source = (found or {}).get(item.location) or find(model, item)
    if found is not None:
        found[item.location] = source
    rest = item.needed or source.size - item.offset
    return Payload(source, item.offset, rest if item.length is None else item.length)


def refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor refer to bytes of another file instead of holding data."""
    for name in FIELDS.values():
        tensor.ClearField(name)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def external_to_memory(tensor: str) -> ExternalDataError:
    """Make the error for external data of a model that was not opened from a file."""
    return ExternalDataError(
        f"tensor {tensor!r} is external to a model in memory",
        hint="open the model from its file, beside which the data is",
    )
