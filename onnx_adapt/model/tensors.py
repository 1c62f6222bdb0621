"""Read the values of a model's tensors from wherever they are, and make tensors of arrays."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_adapt.dtypes import ELEM_TYPES, Array
from onnx_adapt.errors import ModelFileError
from onnx_adapt.model import external_data
from onnx_adapt.model.external_data import external_to_memory
from onnx_adapt.model.file import Model
from onnx_adapt.model.payloads import Payload, Source, token_index


def tensor_of(name: str, value: Array) -> onnx.TensorProto:
    """Make a stored tensor of a float array."""
    return onnx.TensorProto(
        name=name,
        data_type=ELEM_TYPES[str(value.dtype)],
        dims=value.shape,
        raw_data=value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes(),
    )


def payload_of(
    model: Model, tensor: onnx.TensorProto, found: dict[str, Source] | None = None
) -> Payload | None:
    """Find where on disk a tensor's data is; None if it is in the tensor.

    Args:
        model: The model.
        tensor: A tensor of it.
        found: Data files beside the model by location, to find each only once.

    Raises:
        ExternalDataError: If the data is missing.
    """
    index = token_index(tensor.raw_data)
    if index is not None:
        return model.payloads[index]
    if external_data.is_external(tensor) and model.path is not None:
        return external_data.payload(model.path, tensor, found)
    return None


def read_tensor(model: Model, tensor: onnx.TensorProto) -> np.ndarray:
    """Read the value of one tensor of a model from wherever its data is.

    Raises:
        ModelFileError: If the data is missing or does not fit the shape.
    """
    place = payload_of(model, tensor)
    whole = tensor
    if place is not None:
        whole = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type)
        whole.raw_data = read_payload(place)
    elif external_data.is_external(tensor):
        raise external_to_memory(tensor.name)
    try:
        return numpy_helper.to_array(whole)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelFileError(
            f"tensor {tensor.name!r} is damaged: {error}", hint="export the model again"
        ) from error


def read_payload(place: Payload, limit: int | None = None) -> bytes:
    """Read the bytes of a payload, or the first `limit` of them."""
    try:
        with place.source.path.open("rb") as handle:
            handle.seek(place.offset)
            return handle.read(place.length if limit is None else min(limit, place.length))
    except OSError as error:
        raise ModelFileError(
            f"cannot read {place.source.path}: {error.strerror}",
            hint="the data of a model must stay where it is while the model is in use",
        ) from error
