"""Requests of the Open Inference Protocol over gRPC, from their messages."""

from __future__ import annotations

from typing import Any

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.protocol import InferRequest, refuse_unknown
from onnx_adapt.serve.tensors import array_of_bytes, array_of_json

_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where the values of a datatype are, if they are not raw; others can only be raw."""

_IGNORED = {"binary_data_output", "binary_data_size", "binary_data"}
"""Parameters of the HTTP protocol that mean nothing here: outputs are always raw."""


def read_grpc_request(request: Any) -> InferRequest:
    """A request to run the model, from its message.

    Raises:
        RequestError: If anything about it is not as the protocol has it.
    """
    parameters = parameters_of(request.parameters)
    refuse_unknown(parameters, {"adapter"} | _IGNORED)
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"{len(raw)} raw contents for {len(request.inputs)} inputs")
    feeds: dict[str, Any] = {}
    for i, tensor in enumerate(request.inputs):
        refuse_unknown(parameters_of(tensor.parameters), _IGNORED)
        if tensor.name in feeds:
            raise RequestError(f"input {tensor.name!r} is given twice")
        try:
            feeds[tensor.name] = _array(tensor, raw[i] if raw else None)
        except RequestError as error:
            raise RequestError(
                f"input {tensor.name!r}: {error.message}", hint=error.hint
            ) from error
    if not feeds:
        raise RequestError("the request has no `inputs`")
    return InferRequest(
        id=request.id,
        adapter=parameters.get("adapter"),
        feeds=feeds,
        datatypes={tensor.name: tensor.datatype for tensor in request.inputs},
        outputs=tuple(output.name for output in request.outputs),
        binary=frozenset(),
        all_binary=True,
    )


def _array(tensor: Any, raw: bytes | None) -> Any:
    shape = list(tensor.shape)
    if any(size < 0 for size in shape) or len(shape) > 32:
        raise RequestError(f"`shape` is {shape!r:.99}", hint="give a list of numbers")
    if raw is not None:
        if tensor.HasField("contents"):
            raise RequestError("give `contents` or `raw_input_contents`, not both")
        return array_of_bytes(tensor.datatype, shape, memoryview(raw))
    if tensor.datatype not in _CONTENTS:
        raise RequestError(
            f"{tensor.datatype!r:.20} has no contents", hint="send `raw_input_contents`"
        )
    values = list(getattr(tensor.contents, _CONTENTS[tensor.datatype]))
    if tensor.datatype == "BYTES":
        try:
            values = [text.decode() for text in values]
        except UnicodeDecodeError as error:
            raise RequestError(f"ONNX texts are UTF-8: {error}") from error
    return array_of_json(tensor.datatype, shape, values)


def parameters_of(found: Any) -> dict[str, Any]:
    """The parameters of a message, each as the value of its kind."""
    chosen = {key: value.WhichOneof("parameter_choice") for key, value in found.items()}
    return {key: getattr(found[key], kind) if kind else None for key, kind in chosen.items()}
