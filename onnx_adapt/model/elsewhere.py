"""Tensors whose data was taken out of a model file, with a mark that leads back."""

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

MOVED_OUT = "pkg.onnx_adapt.inline"
"""Marks a tensor whose data moved into a file of its own, past protobuf's 2 GB."""

_ALIGNMENT = 4096


def take_out(
    tensor: onnx.TensorProto, place: Payload, location: str, offset: int, key: str
) -> None:
    """Make a tensor refer to `location`, and mark it so that `move_in` finds back.

    The mark is the name of the field that held the data and, where there were any, the
    fields about external data that the tensor had then, as a TensorProto in hexadecimal.
    """
    header = onnx.TensorProto(external_data=tensor.external_data)
    if tensor.HasField("data_location"):
        header.data_location = tensor.data_location
    mark = f"{FIELDS[place.number]} {header.SerializeToString().hex()}".rstrip()
    refer(tensor, location, offset, place.length)
    tensor.metadata_props.add(key=key, value=mark)


def move_out(
    proto: onnx.ModelProto, payloads: Sequence[Payload], location: str
) -> tuple[onnx.ModelProto, list[tuple[int, Payload]]]:
    """Refer to `location` for all bulk data, for a model that passes protobuf's 2 GB.

    Returns:
        A copy of the model, and for each tensor the offset its payload goes to.
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
        take_out(tensor, place, location, offset, MOVED_OUT)
        plan.append((offset, place))
        offset += -(-place.length // _ALIGNMENT) * _ALIGNMENT
    return small, plan


def move_in(
    model: Path | None,
    proto: onnx.ModelProto,
    payloads: Sequence[Payload],
    key: str = MOVED_OUT,
) -> tuple[Payload, ...]:
    """Undo `take_out` in place: the marked tensors hold their data again.

    Returns:
        The payloads, with those of the tensors that came back in appended.

    Raises:
        ExternalDataError: If the data is not there any more, a mark is damaged, or tensors
            share data, which those that were taken out never do.
    """
    result = list(payloads)
    lent: Counter[Source] = Counter()
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
            lent[place.source] += place.length
            if lent[place.source] > place.source.size:  # whole, they would fill the disk
                raise ExternalDataError(
                    f"the tensors that {place.source.path.name} lends are more than it has",
                    hint="another tool changed the model; insert the slots anew",
                )
            tensor.raw_data = token(len(result))
            result.append(replace(place, number=number))
    return tuple(result)


def is_moved_out(proto: onnx.ModelProto, location: str) -> bool:
    """Whether a data file holds what `move_out` took out of this model, and nothing else."""
    users = [
        tensor
        for tensor in walk.tensors(proto)
        if is_external(tensor) and reference(tensor).location == location
    ]
    return bool(users) and all(_mark(tensor, MOVED_OUT) is not None for tensor in users)


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
