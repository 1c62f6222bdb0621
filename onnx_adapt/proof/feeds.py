"""The inputs that a model needs, and reading those that a caller gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnx_adapt.adapter import npz as npz_file
from onnx_adapt.errors import AdaptError, reason
from onnx_adapt.graph.index import TensorType, elem_name, read_type
from onnx_adapt.model.payloads import Source
from onnx_adapt.ort import shortened
from onnx_adapt.words import beside

Feeds = dict[str, Any]

_ALLOWANCE, _EXPANSION = 1 << 30, 16
"""Unpacked, inputs may have 1 GB more than this many times the size of their file."""


def required_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that must be fed: those without a default."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    stored |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    return [value for value in proto.graph.input if value.name not in stored]


_WRITTEN = 'numpy.savez("inputs.npz", **arrays) writes'
WITHOUT_PROOF = "`onnx-adapt insert --no-verify` does without the proof"


def inputs_hint(inputs: Mapping[str, TensorType]) -> str:
    """How to give inputs of these names and types to a proof, or to do without it."""
    arrays = ", ".join(
        f"{name}: {elem_name(known.elem_type) or 'any type'} "
        f"[{', '.join('?' if dim is None else str(dim) for dim in known.shape or ())}]"
        for name, known in inputs.items()
    )
    return (
        'write real inputs with numpy.savez("inputs.npz", **arrays) and give them with '
        f"--inputs inputs.npz (arrays: {shortened(arrays)}); {WITHOUT_PROOF}"
    )


def no_npz_hint(value: onnx.ValueInfoProto) -> str:
    """What to do about an input that no `.npz` can hold: a sequence, a map, an optional."""
    forms = {"sequence_type": "[array, ...]", "map_type": "{key: value}"}
    form = forms.get(value.type.WhichOneof("value") or "", "array or None")
    proof = f"inputs={{{value.name!r}: {form}}}, weights=False"
    return (
        f"no .npz can hold it; {WITHOUT_PROOF}, and in Python "
        f"onnx_adapt.verify(base, adapted, {proof}) is the proof"
    )


def load_feeds(path: Path, proto: onnx.ModelProto) -> Feeds:
    """Read inputs from an `.npz` and check them against the model.

    Raises:
        AdaptError: If the file cannot be read or does not fit the model.
    """
    return check_feeds(read_arrays(path), proto, str(path))


def read_arrays(path: Path) -> Feeds:
    """Read inputs from an `.npz`.

    Raises:
        AdaptError: If the file cannot be read.
    """
    try:
        size = Source.of(path).size
        with path.open("rb") as file:
            stored = npz_file.read_arrays(file, path, _ALLOWANCE + _EXPANSION * size)
    except OSError as error:
        raise AdaptError(
            f"cannot read inputs from {path}: {error.strerror or error}",
            hint=f"{_WRITTEN} such a file; {beside(path)}",
        ) from error
    except ValueError as error:
        raise AdaptError(
            f"cannot read inputs from {path}: {reason(error)}",
            hint=f"{_WRITTEN} such a file",
        ) from error
    return {name: np.array(value) for name, value in stored.items()}  # not read-only


def check_feeds(feeds: Mapping[str, Any], proto: onnx.ModelProto, origin: str) -> Feeds:
    """Check that inputs have the names and element types a model asks for.

    Raises:
        AdaptError: If one is missing, unknown or of another type.
    """
    known = {value.name: value for value in proto.graph.input}
    needed = {value.name: read_type(value) for value in required_inputs(proto)}
    if missing := [name for name in needed if name not in feeds]:
        first = known[missing[0]]
        raise AdaptError(
            f"{origin} has no array for input {first.name!r}",
            hint=f"the model needs: {', '.join(needed)}"
            if first.type.HasField("tensor_type")
            else no_npz_hint(first),
        )
    if unknown := [name for name in feeds if name not in known]:
        raise AdaptError(
            f"{origin} has {unknown[0]!r}, which is no input of the model",
            hint=f"the model needs: {', '.join(needed)}",
        )
    return {name: _checked(value, known[name], origin) for name, value in feeds.items()}


def _array(value: Any, known: onnx.ValueInfoProto, origin: str) -> np.ndarray[Any, Any]:
    """One input as an array; numbers and lists of them get the type that is wanted."""
    wanted = helper.tensor_dtype_to_np_dtype(known.type.tensor_type.elem_type)
    plain = isinstance(value, list | tuple | int | float)
    try:
        return np.asarray(value, wanted if plain else None)
    except (TypeError, ValueError, OverflowError) as error:
        raise AdaptError(
            f"{origin}: input {known.name!r} is no array: {error}",
            hint="give lists of one length, or numpy arrays",
        ) from error


def _checked(value: Any, known: onnx.ValueInfoProto, origin: str) -> Any:
    """One input as ONNX Runtime takes it; text in any of numpy's types is text."""
    wanted = known.type.tensor_type.elem_type
    if not wanted:  # a sequence, a map or an optional: ONNX Runtime says if it does not fit
        return value
    array = _array(value, known, origin)
    if elem_name(wanted) == "string" and array.dtype.kind in "USTO":
        return array.astype(object)
    if array.dtype != helper.tensor_dtype_to_np_dtype(wanted):
        raise AdaptError(
            f"{origin}: input {known.name!r} is {array.dtype}, the model wants "
            f"{elem_name(wanted)}",
            hint="convert it with numpy's astype",
        )
    return array
