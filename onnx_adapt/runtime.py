"""A session of ONNX Runtime on a model whose weights stay in their files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnx_adapt import walk
from onnx_adapt.errors import RunError, UnprovableError
from onnx_adapt.files import external_data
from onnx_adapt.files.payloads import Source, token_index
from onnx_adapt.model_file import Model, payload_of, read_payload
from onnx_adapt.ort import failures, onnxruntime, shortened

_NO_PREPACKING = "session.disable_prepacking"
_MAPPED = 1 << 28
"""Weights of more bytes than this are only mapped: no second, prepacked copy of them."""

_FOLDER = "session.model_external_initializers_file_folder_path"

Values = dict[str, Any]
"""Arrays by name; a sequence output is a list, a map output a dict."""


class Runner:
    """A model in ONNX Runtime on the CPU.

    Args:
        model: The model; nothing of it is copied but the graph.
        optimised: Whether ONNX Runtime may optimise the graph (its default level).
        shapes_first: Whether a Shape runs as soon as its tensor is there. In the order that
            ONNX Runtime has by default, a tensor waits in memory for its Shape.

    Raises:
        RunError: If ONNX Runtime refuses the model.
        UnprovableError: If ONNX Runtime is not installed, or cannot be told where the
            weights are.
    """

    def __init__(self, model: Model, *, optimised: bool, shapes_first: bool = False) -> None:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if shapes_first:
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        )
        self._label = model.label
        beside = (item.length or 0 for item in external_data.references(model.proto))
        if sum(place.length for place in model.payloads) + sum(beside) > _MAPPED:
            options.add_session_config_entry(_NO_PREPACKING, "1")
        data = model_bytes(model, options)
        known = failures()
        self._failures = known
        try:
            self._session = ort.InferenceSession(
                data, options, providers=["CPUExecutionProvider"]
            )
        except known as error:
            raise RunError(
                f"ONNX Runtime {ort.__version__} cannot load {model.label}: "
                f"{shortened(error)}",
                hint="`onnx-adapt check` says whether its slots are whole; without slots it may "
                "ask for an operator or a provider that is not here",
            ) from error
        self.outputs = [item.name for item in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> Values:
        """Run the model once.

        Raises:
            RunError: If ONNX Runtime refuses the inputs or fails.
        """
        names = list(self.outputs if outputs is None else outputs)
        try:
            values = self._session.run(names, dict(feeds))
        except self._failures as error:
            wanted = ", ".join(f"{i.name} {i.shape}" for i in self._session.get_inputs())
            raise RunError(
                f"{self._label} does not run: {shortened(error)}",
                hint=f"do the inputs fit? The model asks for {shortened(wanted)}",
            ) from error
        return dict(zip(names, values, strict=True))


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
    if sum(place.length for place in model.payloads) <= _MAPPED:
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


def as_arrays(value: Any) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """The arrays inside an output: itself, the items of a sequence, the values of a map."""
    if isinstance(value, list):
        return [array for item in value for array in as_arrays(item)]
    if isinstance(value, dict):
        return [array for key in sorted(value) for array in as_arrays(value[key])]
    return [np.asarray(value)]
