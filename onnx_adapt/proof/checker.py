"""What the ONNX checker and strict shape inference say of a model, without its weights."""

from __future__ import annotations

import onnx

from onnx_adapt import walk
from onnx_adapt.files import external_data
from onnx_adapt.files.payloads import token_index
from onnx_adapt.model_file import Model


def complaints(model: Model) -> list[str]:
    """Everything the checker and strict shape inference have to say, line by line."""
    return [
        f"{what}: {line}"
        for what, ask in (
            ("checker", _ask_checker),
            ("strict shape inference", _ask_inference),
        )
        for line in ask(model)
    ]


def _ask_checker(model: Model) -> list[str]:
    """What the checker says of a model; data on disk stands as an empty tensor."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in walk.tensors(proto):
        if token_index(tensor.raw_data) is not None or external_data.is_external(tensor):
            tensor.ClearField("raw_data")
            tensor.ClearField("data_location")
            del tensor.external_data[:]
            tensor.dims[:] = [0]
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        return str(error).splitlines()
    return []


def _ask_inference(model: Model) -> list[str]:
    try:
        onnx.shape_inference.infer_shapes(model.proto, check_type=True, strict_mode=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        return str(error).splitlines()
    return []
