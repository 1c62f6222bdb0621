"""The identity of a base model: cheap at any size, different for another fine-tune."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import onnx

from onnx_adapt.errors import ModelFileError
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.model.payloads import Payload, Source
from onnx_adapt.model.samples import sample_bytes, sample_file
from onnx_adapt.model.tensors import payload_of


def fingerprint(model: Model) -> str:
    """Hash the graph, the header of every tensor, and up to 4 KB of each tensor's data.

    Large tensors are sampled at eight evenly spaced places. Where the data is stored
    (inline or in a file beside the model) makes no difference.

    Raises:
        ModelFileError: If data of the model cannot be read.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model.proto)
    digest = hashlib.sha256()
    samples: list[bytes] = []
    found: dict[str, Source] = {}
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for tensor in walk.tensors(bare):
            place = payload_of(model, tensor, found)
            samples.append(
                sample_bytes(tensor.raw_data)
                if place is None
                else _sample(place, files, stack)
            )
            tensor.ClearField("raw_data")
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    digest.update(bare.SerializeToString())
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little") + sample)
    return f"sha256:{digest.hexdigest()}"


def _sample(place: Payload, files: dict[Path, BinaryIO], stack: ExitStack) -> bytes:
    try:
        if place.source.path not in files:
            files[place.source.path] = stack.enter_context(place.source.path.open("rb"))
        return sample_file(files[place.source.path], place.offset, place.length)
    except OSError as error:
        raise ModelFileError(
            f"cannot read {place.source.path}: {error.strerror}", hint="check the file"
        ) from error
