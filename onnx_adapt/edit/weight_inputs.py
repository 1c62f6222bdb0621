"""Weights that a model of an IR before 4 declares as inputs: not while it has slots."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from google.protobuf.message import DecodeError

from onnx_adapt.edit.weights import drop_named
from onnx_adapt.errors import ManifestError
from onnx_adapt.slot.base_changes import ReplaceableWeight


def drop_weight_inputs(
    proto: onnx.ModelProto, replaceable: Sequence[ReplaceableWeight]
) -> tuple[tuple[int, str], ...]:
    """Stop declaring weights as inputs, in place; before IR 4 each had to be declared as one.

    Returns:
        The position of each input that is gone, and its declaration in hexadecimal.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    stored |= {weight.original for weight in replaceable}
    stored -= {weight.name for weight in replaceable}
    inputs = proto.graph.input
    found = [(i, value) for i, value in enumerate(inputs) if value.name in stored]
    taken = tuple((i, value.SerializeToString().hex()) for i, value in found)
    drop_named(inputs, stored)
    return taken


def undo_dropped_inputs(proto: onnx.ModelProto, inputs: Sequence[tuple[int, str]]) -> None:
    """Declare weights of a model of an IR before 4 as inputs again, in place.

    Raises:
        ManifestError: If what it was is not recorded as it should be.
    """
    for place, declared in inputs:
        try:
            value = onnx.ValueInfoProto.FromString(bytes.fromhex(declared))
        except DecodeError as error:
            raise ManifestError(f"the record of input {place} is damaged: {error}") from error
        proto.graph.input.insert(place, value)
