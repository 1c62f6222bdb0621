"""The record of the files that a thin model's weights are in, and nothing but the record.

It is one JSON document in the model's `metadata_props`: what runs the model can check the
files without knowing graphs.
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
class Lender:
    """A file beside a thin model that weights of it are in, as it was then.

    Attributes:
        name: Its path relative to the model's folder.
        size: Its length in bytes.
        ranges: Offset and length of each tensor's data.
        sha256: Of a sample of each of the ranges.
    """

    name: str
    size: int
    ranges: tuple[tuple[int, int], ...]
    sha256: str


def look_at(folder: Path, name: str, ranges: Iterable[tuple[int, int]]) -> Lender:
    """Describe a file as it is now.

    Raises:
        ExternalDataError: If it cannot be read.
    """
    places = tuple(sorted(set(ranges)))
    digest = hashlib.sha256()
    try:
        Source.of(folder / name)  # to open a pipe is to wait
        with (folder / name).open("rb") as file:
            for offset, length in places:
                digest.update(sample_file(file, offset, length))
            size = file.seek(0, 2)
    except OSError as error:
        raise ExternalDataError(
            f"cannot read {folder / name}: {error.strerror}",
            hint="a thin model needs the files it was made from beside it",
        ) from error
    return Lender(name, size, places, digest.hexdigest())


def check_lender(folder: Path, lender: Lender, model: str) -> None:
    """Check that a file is still what it was.

    Raises:
        ExternalDataError: If it is not.
    """
    now = look_at(folder, lender.name, lender.ranges)
    if now == lender:
        return
    what = (
        "its weights are others"
        if now.size == lender.size
        else f"it had {lender.size} bytes and has {now.size}"
    )
    raise ExternalDataError(
        f"{lender.name} has changed since {model} was made from it: {what}",
        hint=f"put the {lender.name} of then back, or insert into this one again",
    )


def check_lenders(folder: Path, record: str, model: str) -> None:
    """Check the files of a model that runs: one that is gone is not needed any more.

    Raises:
        ExternalDataError: If one is not what it was.
        ManifestError: If the record is damaged or of a newer format.
    """
    for lender in read_record(record):
        if (folder / lender.name).exists():
            check_lender(folder, lender, model)


def write_record(lenders: Sequence[Lender]) -> str:
    """The record as it is written into a model."""
    data = {"format": FORMAT, "files": [asdict(lender) for lender in lenders]}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def read_record(text: str) -> tuple[Lender, ...]:
    """Read a record.

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
        return tuple(_read_lender(item) for item in data["files"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"the record of the files that the model needs is damaged ({error!r})",
            hint="another tool rewrote it; insert into the base model again",
        ) from error


def _read_lender(item: dict[str, Any]) -> Lender:
    name, size, sha256 = item["name"], item["size"], item["sha256"]
    ranges = tuple((offset, length) for offset, length in item["ranges"])
    numbers = (size, *(number for pair in ranges for number in pair))
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("a size that no file has")
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise TypeError("a name that no file has")
    if "\0" in name or name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise ValueError("a name that leaves the model's folder")
    return Lender(name, size, ranges, sha256)
