"""A model as bytes for ONNX Runtime, with its weights left on disk."""

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
"""Weights of more bytes than this in all are not read but referred to in their files."""

_NO_PREPACKING = "session.disable_prepacking"

_SLOW_UNPACKED = {"MatMulNBits"}
"""Operators that turn their whole weight into floats in every run, unless it was packed.

An int4 decoder of 0.36 B parameters takes 1.0 s for two tokens then, and 0.025 s packed.
"""

_FOLDER = "session.model_external_initializers_file_folder_path"


def keep_unpacked(model: Model, options: Any) -> None:
    """Set in `options` that ONNX Runtime does not pack the weights of a large model.

    A packed float weight is a copy beside the one in the file, and a large model would be in
    memory twice. A packed weight of few bits takes no more memory than it saves.
    """
    beside = (item.length or 0 for item in external_data.references(model.proto))
    if sum(place.length for place in model.payloads) + sum(beside) <= MAPPED:
        return
    graphs = (scope.graph for scope in walk.scopes(model.proto.graph))
    if not any(node.op_type in _SLOW_UNPACKED for graph in graphs for node in graph.node):
        options.add_session_config_entry(_NO_PREPACKING, "1")


def model_bytes(model: Model, options: Any) -> bytes:
    """Encode a model for ONNX Runtime, and set in `options` the folder of its weights.

    Raises:
        UnprovableError: If the folder's name cannot be passed to ONNX Runtime.
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
    """Copy a model with its weights as external data if they are many.

    Inline tensors of a large model refer to their byte range in the model file. Links are
    resolved, because ONNX Runtime follows none that leads out of the folder.

    Returns:
        The copy, and the folder that its references are relative to, or '' if it has none.

    Raises:
        ExternalDataError: If data beside the model is missing.
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
