"""The model that a caller means: a path, a `Model`, or ONNX's own `ModelProto`."""

from __future__ import annotations

import os

import onnx

from onnx_adapt.errors import ArgumentError
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model, open_model
from onnx_adapt.model.payloads import token_index

ModelLike = str | os.PathLike[str] | Model | onnx.ModelProto
"""What every function takes where it asks for a model."""


def as_model(given: ModelLike) -> Model:
    """The model that is given; a path is opened.

    Raises:
        ArgumentError: If it is of another kind.
        ModelFileError: If it is the path of no model.

    Example:
        >>> as_model("models/dnsmos-p808.onnx").label
        'dnsmos-p808.onnx'
    """
    if isinstance(given, Model):
        return given
    if isinstance(given, onnx.ModelProto):
        if any(token_index(tensor.raw_data) is not None for tensor in walk.tensors(given)):
            raise ArgumentError(
                "the ModelProto is a part of a Model, whose large tensors are in its file",
                hint="give the Model itself, or onnx.load(path)",
            )
        return Model(given)
    if isinstance(given, str | os.PathLike):
        return open_model(given)
    raise ArgumentError(
        f"{type(given).__name__} is no model",
        hint="give the path of an .onnx file, an onnx.ModelProto, or what `oa.open_model` "
        "returned; a function's help says in which place",
    )
