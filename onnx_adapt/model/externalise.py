"""Move the data of tensors out of a model file, marked so that it can come back.

An example: a model of 3 GB cannot be one protobuf file. It is saved as `a.onnx` with
`a.onnx.data` beside it. A tensor `W` that held 10 000 bytes in `raw_data` then says that they
are at offset 0 of `a.onnx.data`, and has the entry `pkg.onnx_adapt.inline = "raw_data"` in its
`metadata_props`. The next tensor's data begins at 12288, the next multiple of a page. When
the slots are removed, `internalise` reads the entry, drops it and the reference, and gives
`W` a token for those 10 000 bytes: saved, the base is the same as it was, byte for byte.

A tensor with inline data can have fields about external data all the same. They follow in
the mark as a TensorProto in hexadecimal: `"raw_data 7000"` is `data_location: DEFAULT`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnx_adapt.errors import ExternalDataError
from onnx_adapt.model import walk
from onnx_adapt.model.external_data import FIELDS, is_external, payload, refer, reference
from onnx_adapt.model.payloads import Payload, Source, token, token_index

EXTERNALISED = "pkg.onnx_adapt.inline"
"""The mark of a tensor whose data was moved out because of protobuf's 2 GB."""

_ALIGNMENT = 4096


def externalise_tensor(
    tensor: onnx.TensorProto, place: Payload, location: str, offset: int, key: str
) -> None:
    """Make one tensor refer to `location`, and mark it so that `internalise` can undo it.

    Args:
        tensor: The tensor, which is changed.
        place: Where its data is now.
        location: The file that it shall refer to.
        offset: Where in that file its data will be.
        key: The key of the mark. Its value is the name of the field that held the data
            and, if it had any, the tensor's fields about external data, as a TensorProto
            in hexadecimal.
    """
    header = onnx.TensorProto(external_data=tensor.external_data)
    if tensor.HasField("data_location"):
        header.data_location = tensor.data_location
    mark = f"{FIELDS[place.number]} {header.SerializeToString().hex()}".rstrip()
    refer(tensor, location, offset, place.length)
    tensor.metadata_props.add(key=key, value=mark)


def externalise(
    proto: onnx.ModelProto, payloads: Sequence[Payload], location: str
) -> tuple[onnx.ModelProto, list[tuple[int, Payload]]]:
    """Move all bulk data of a model to `location`, because it passes protobuf's 2 GB.

    Returns:
        A copy of the model that refers to `location`, and each payload with the offset
        at which to write it there.
    """
    small = onnx.ModelProto()
    small.CopyFrom(proto)
    plan: list[tuple[int, Payload]] = []
    offset = 0
    for tensor in walk.tensors(small, sparse=False):
        index = token_index(tensor.raw_data)
        if index is None:
            continue
        place = payloads[index]
        externalise_tensor(tensor, place, location, offset, EXTERNALISED)
        plan.append((offset, place))
        offset += -(-place.length // _ALIGNMENT) * _ALIGNMENT
    return small, plan


def internalise(
    model: Path | None,
    proto: onnx.ModelProto,
    payloads: Sequence[Payload],
    key: str = EXTERNALISED,
) -> tuple[Payload, ...]:
    """Undo `externalise_tensor` in place: the marked tensors hold their data again.

    Returns:
        The payloads, with those of the tensors that hold their data again appended.

    Raises:
        ExternalDataError: If the data is missing, a mark is damaged, or marked tensors
            share data, which `externalise` never makes them do.
    """
    result = list(payloads)
    claimed: Counter[Source] = Counter()
    for tensor in walk.tensors(proto):
        mark = _mark(tensor, key)
        if mark is None or model is None:
            continue
        place = payload(model, tensor) if is_external(tensor) else None
        number, header = _read_mark(tensor, mark)
        tensor.metadata_props.remove(mark)
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
        tensor.MergeFrom(header)
        if place is not None:
            claimed[place.source] += place.length
            # A hostile file of a few bytes could claim the same range a million times.
            if claimed[place.source] > place.source.size:
                raise ExternalDataError(
                    f"the tensors in {place.source.path.name} have more bytes than the file",
                    hint="another tool changed the model; insert the slots anew",
                )
            tensor.raw_data = token(len(result))
            result.append(replace(place, number=number))
    return tuple(result)


def is_externalised(proto: onnx.ModelProto, location: str) -> bool:
    """Whether all data in a file was put there by `externalise` for this model."""
    users = [
        tensor
        for tensor in walk.tensors(proto)
        if is_external(tensor) and reference(tensor).location == location
    ]
    return bool(users) and all(_mark(tensor, EXTERNALISED) is not None for tensor in users)


def _mark(tensor: onnx.TensorProto, key: str) -> onnx.StringStringEntryProto | None:
    return next((entry for entry in tensor.metadata_props if entry.key == key), None)


def _read_mark(
    tensor: onnx.TensorProto, mark: onnx.StringStringEntryProto
) -> tuple[int, onnx.TensorProto]:
    name, _, header = mark.value.partition(" ")
    try:
        number = {field: number for number, field in FIELDS.items()}[name]
        return number, onnx.TensorProto.FromString(bytes.fromhex(header))
    except (KeyError, ValueError, DecodeError) as error:
        raise ExternalDataError(
            f"tensor {tensor.name!r} has a damaged {mark.key!r}",
            hint="another tool changed the model; insert the slots anew",
        ) from error
