"""Save how far a training is, and go on from there bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.whole_files import write_files
from onnx_adapt.training.data import Dataset
from onnx_adapt.training.progress import Epoch, Progress
from onnx_adapt.words import beside

# The file is an `.npz`. `record` is a JSON text; the arrays are numbered, because the names of
# weights can be anything: `weights.0` is the array whose name is first in the record's list
# `weights`. Floats in the record are written so that the same bits come back.

FORMAT = 1
_FIELDS = ("weights", "state", "average", "best")
"""The fields of a `Progress` that hold arrays."""

Run = Mapping[str, Any]
"""What a training is of: texts and numbers that must be the same when it is resumed."""


_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    BadZipFile,
)
"""What reading a damaged file raises."""


@dataclass(frozen=True, slots=True)
class ProgressFile:
    """The file that keeps how far a training is.

    Attributes:
        path: The file.
        run: What the training is of.
    """

    path: Path
    run: Run

    def require_new(self) -> None:
        """Refuse a file that is there already.

        Raises:
            TrainingError: If it is.
        """
        if self.path.exists():
            raise TrainingError(
                f"{self.path} is there already",
                hint="--resume goes on with the training in it; else choose another path",
            )

    def save(self, progress: Progress) -> None:
        """Save how far a training is; the file is whole or as it was.

        Raises:
            SaveError: If it cannot be written.
        """
        arrays: dict[str, Array] = {}
        names: dict[str, list[str]] = {}
        for field in _FIELDS:
            found: Mapping[str, Array] = getattr(progress, field)
            names[field] = list(found)
            arrays |= {f"{field}.{i}": value for i, value in enumerate(found.values())}
        record = {
            "format": FORMAT,
            "run": self.run,
            "names": names,
            "step": progress.step,
            "history": [asdict(epoch) for epoch in progress.history],
            "loss_sum": progress.loss_sum,
            "seen": progress.seen,
        }
        arrays["record"] = np.array(json.dumps(record))
        content = BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_files([(self.path, [content.getvalue()])])

    def load(self) -> Progress:
        """Read how far a training is.

        Raises:
            TrainingError: If it cannot be read, or is of another training: other data,
                another model, other settings.
        """
        if not self.path.is_file():
            raise TrainingError(
                f"there is no training to resume in {self.path}",
                hint=f"{beside(self.path)}; without --resume a new one begins",
            )
        try:
            content = BytesIO(self.path.read_bytes())
            with np.load(content, allow_pickle=False) as file:
                record = json.loads(str(file["record"]))
                if record["format"] == FORMAT:
                    self._require_same(record["run"])
                    return _progress(record, file)
        except TrainingError:
            raise
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            EOFError,
            BadZipFile,
            AttributeError,
        ) as error:
            raise TrainingError(
                f"{self.path} is no training that can be resumed, or is damaged: {error}",
                hint="begin a new one with another --checkpoint",
            ) from error
        raise TrainingError(
            f"{self.path} is of another format, {record['format']!r}",
            hint="resume with the version of onnx-adapt that wrote it",
        )

    def _require_same(self, theirs: Run) -> None:
        """Refuse to resume a training that is of something else."""
        for key, value in json.loads(json.dumps(self.run)).items():
            was = theirs.get(key)
            if was != value:
                short = max(len(str(was)), len(str(value))) < _LONG
                told = f"{key}: {was!r} then, {value!r} now" if short else f"other {key}"
                raise TrainingError(
                    f"{self.path} is of another training: {told}",
                    hint="resume with the data, model and settings that it began with",
                )


_LONG = 40
"""Longer values are of no help in a message."""


def _progress(record: Mapping[str, Any], file: Mapping[str, Array]) -> Progress:
    names = record["names"]
    arrays = {
        field: {name: file[f"{field}.{i}"] for i, name in enumerate(names[field])}
        for field in _FIELDS
    }
    return Progress(
        **arrays,
        step=record["step"],
        history=tuple(Epoch(**epoch) for epoch in record["history"]),
        loss_sum=record["loss_sum"],
        seen=record["seen"],
    )


def fingerprint_data(data: Dataset) -> str:
    """A sha256 over all samples: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for group in data.groups:
        arrays = {**group.inputs, "labels": group.labels, "rows": group.rows}
        digest.update(fingerprint_arrays(arrays).encode())
    return digest.hexdigest()


def fingerprint_arrays(arrays: Mapping[str, Array]) -> str:
    """A sha256 over arrays: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, value in arrays.items():
        digest.update(f"{name}|{value.dtype.str}|{value.shape}|".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
