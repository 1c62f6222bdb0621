"""The record of a thin model's borrowed files: the base's files that hold its weights.

The record is one JSON document in the model's `metadata_props`, so that a session can check
the files before it runs the model, and needs no graph for that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx_adapt.errors import ExternalDataError, ManifestError
from onnx_adapt.model.payloads import Source
from onnx_adapt.model.samples import sample_file

KEY = "onnx_adapt.files.thin"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class BorrowedFile:
    """A file beside a thin model that holds some of its weights, as it was at the save.

    Attributes:
        name: Its path relative to the model's folder.
        size: Its length in bytes.
        ranges: Offset and length of each tensor's data.
        sha256: The hash of a sample of each range, one after the other.
    """

    name: str
    size: int
    ranges: tuple[tuple[int, int], ...]
    sha256: str


def describe_file(folder: Path, name: str, ranges: Iterable[tuple[int, int]]) -> BorrowedFile:
    """Describe a file as it is on disk now.

    Raises:
        ExternalDataError: If it cannot be read.
    """
    places = tuple(sorted(set(ranges)))
    digest = hashlib.sha256()
    try:
        Source.of(folder / name)  # refuses a pipe, which would block when opened
        with (folder / name).open("rb") as file:
            for offset, length in places:
                digest.update(sample_file(file, offset, length))
            size = file.seek(0, 2)
    except OSError as error:
        raise ExternalDataError(
            f"cannot read {folder / name}: {error.strerror}",
            hint="a thin model needs the files it was made from beside it",
        ) from error
    return BorrowedFile(name, size, places, digest.hexdigest())


def check_borrowed_file(folder: Path, file: BorrowedFile, model: str) -> None:
    """Check that a borrowed file is the same as when the model was saved.

    Raises:
        ExternalDataError: If it has changed.
    """
    now = describe_file(folder, file.name, file.ranges)
    if now == file:
        return
    what = (
        "its weights are different"
        if now.size == file.size
        else f"it had {file.size} bytes and has {now.size}"
    )
    raise ExternalDataError(
        f"{file.name} has changed since {model} was made from it: {what}",
        hint=f"restore the earlier {file.name}, or insert into this one again",
    )


def check_borrowed_files(folder: Path, record: str, model: str) -> None:
    """Check the borrowed files of a model that ONNX Runtime has loaded.

    A file that is missing is passed over: the model was loaded, so nothing needs it.

    Raises:
        ExternalDataError: If a file has changed.
        ManifestError: If the record is damaged or of a newer format.
    """
    for file in read_record(record):
        if (folder / file.name).exists():
            check_borrowed_file(folder, file, model)


def write_record(files: Sequence[BorrowedFile]) -> str:
    """Write the record as the text that a model keeps."""
    data = {"format": FORMAT, "files": [asdict(file) for file in files]}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def read_record(text: str) -> tuple[BorrowedFile, ...]:
    """Read the record from the text that a model keeps.

    Raises:
        ManifestError: If it is damaged or of a newer format.
    """
    try:
        data = json.loads(text)
        version = data["format"]
        if version != FORMAT:
            raise ManifestError(
                f"the model was made thin in format {version}; this version of onnx-adapt "
                f"reads {FORMAT}",
                hint="upgrade: pip install -U onnx-adapt",
            )
        return tuple(_read_file(item) for item in data["files"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"the record of the files that the model needs is damaged ({error!r})",
            hint="another tool rewrote it; insert into the base model again",
        ) from error


def _read_file(item: dict[str, Any]) -> BorrowedFile:
    name, size, sha256 = item["name"], item["size"], item["sha256"]
    ranges = tuple((offset, length) for offset, length in item["ranges"])
    numbers = (size, *(number for pair in ranges for number in pair))
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("a size that no file has")
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise TypeError("a name that no file has")
    if "\0" in name or name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise ValueError("a name that leaves the model's folder")
    return BorrowedFile(name, size, ranges, sha256)
