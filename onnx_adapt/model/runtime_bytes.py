"""A model as bytes that refer to its weights on disk, as ONNX Runtime takes it from memory."""

from __future__ import annotations

import os
from typing import Any

import onnx

from onnx_adapt.errors import UnprovableError
from onnx_adapt.model import external_data, walk
from onnx_adapt.model.file import Model
from onnx_adapt.model.payloads import Source, token_index
from onnx_adapt.model.tensors import payload_of, read_payload

MAPPED = 1 << 28
"""Weights of more bytes than this are only mapped: no second, prepacked copy of them."""


_FOLDER = "session.model_external_initializers_file_folder_path"


def model_bytes(model: Model, options: Any) -> bytes:
    """A model as ONNX Runtime takes it from memory; `options` learn where its weights are.

    Raises:
        UnprovableError: If ONNX Runtime cannot be told where they are.
    """
    try:
        proto, folder = refer_to_files(model)
        if folder:
            options.add_session_config_entry(_FOLDER, folder.encode().decode())
    except UnicodeEncodeError as error:
        raise UnprovableError(
            f"ONNX Runtime cannot be told of {model.path}: the path is not UTF-8",
            hint="rename the folder or file, or skip the proof with --no-verify",
        ) from error
    return bytes(proto.SerializeToString())


def refer_to_files(model: Model) -> tuple[onnx.ModelProto, str]:
    """The model with its weights as external data if they are many, and their folder.

    Inline tensors of a large model refer to the byte range they have in the model file.
    Files are named as what links lead to: ONNX Runtime follows none out of the folder.

    Raises:
        ExternalDataError: If data beside the model is not there any more.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    if sum(place.length for place in model.payloads) <= MAPPED:
        # Older versions of ONNX Runtime crash on weights that are not aligned in a file.
        for tensor in walk.tensors(proto):
            index = token_index(tensor.raw_data)
            if index is not None:
                tensor.raw_data = read_payload(model.payloads[index])
    found: dict[str, Source] = {}
    places = [
        (tensor, place)
        for tensor in walk.tensors(proto)
        if (place := payload_of(model, tensor, found))
    ]
    paths = {place.source.path for _, place in places}
    real = {path: os.path.realpath(path) for path in paths}
    if not real:
        return proto, ""
    folder = os.path.commonpath([os.path.dirname(path) for path in real.values()])
    names = {path: os.path.relpath(real[path], folder) for path in paths}
    for tensor, place in places:
        external_data.refer(tensor, names[place.source.path], place.offset, place.length)
    return proto, folder
