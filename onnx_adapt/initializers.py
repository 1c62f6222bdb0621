"""The weights of slots inside a model: added, read, filled, baked and dropped.

A weight is an initializer of the main graph; that of a swappable slot is a graph input
too. This module is the only one that touches either, so the two stay in step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnx_adapt.activations import DTYPES, Array
from onnx_adapt.errors import SlotError
from onnx_adapt.graph import FLOATS
from onnx_adapt.manifest import Manifest, Slot, read_manifest, write_manifest
from onnx_adapt.model_file import Model, read_tensor
from onnx_adapt.slot import bottleneck_axis, part_shape

_ELEM_TYPES = {name: elem_type for elem_type, name in FLOATS.items()}

Weights = Mapping[str, Array]
"""The weights of one slot, by part."""


def add_weights(proto: onnx.ModelProto, slot: Slot, weights: Weights) -> None:
    """Add the weights of a new slot to a model, in place."""
    for part in slot.parts:
        name = slot.weight(part)
        proto.graph.initializer.append(_tensor(name, slot, weights[part]))
        if slot.swappable:
            proto.graph.input.append(_declaration(slot, part))


def _tensor(name: str, slot: Slot, value: Array) -> onnx.TensorProto:
    data = np.ascontiguousarray(value, DTYPES[slot.dtype])
    return onnx.TensorProto(
        name=name,
        data_type=_ELEM_TYPES[slot.dtype],
        dims=value.shape,
        raw_data=data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes(),
    )


def _declaration(slot: Slot, part: str) -> onnx.ValueInfoProto:
    shape: list[int | str] = list(part_shape(slot, part, slot.bottleneck))
    axis = bottleneck_axis(slot, part)
    if axis is not None and not slot.bottleneck:
        shape[axis] = slot.symbol
    elem_type = _ELEM_TYPES[slot.dtype]
    return helper.make_tensor_value_info(slot.weight(part), elem_type, shape)


def check_weights(proto: onnx.ModelProto, slots: Iterable[Slot]) -> None:
    """Check that every weight of every slot is there, as initializer and as input.

    Raises:
        SlotError: If another tool took initializers or inputs away.
    """
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    inputs = {value.name for value in proto.graph.input}
    for slot in slots:
        names = [slot.weight(part) for part in slot.parts]
        if lost := [name for name in names if name not in stored]:
            raise SlotError(
                f"slot {slot.name!r} is damaged: weight {lost[0]!r} is gone from the model",
                hint="another tool folded or renamed it; insert into the base model again",
            )
        closed = [name for name in names if name not in inputs]
        if slot.swappable and closed:
            raise SlotError(
                f"slot {slot.name!r} is not swappable any more: input {closed[0]!r} was "
                "stripped from the model",
                hint="simplifiers do this; run them on the base first, then insert",
            )
        for part in slot.parts:
            _check_shape(slot, part, stored[slot.weight(part)].dims)


def _check_shape(slot: Slot, part: str, dims: Iterable[int]) -> int:
    """Check one weight's shape and return its bottleneck, or -1 if it has none."""
    found = tuple(dims)
    axis = bottleneck_axis(slot, part)
    expected = part_shape(slot, part, slot.bottleneck)
    size = -1
    if axis is not None and len(found) == len(expected):
        size = found[axis]
        if not slot.bottleneck:
            expected = part_shape(slot, part, size)
    if found != expected:
        raise SlotError(
            f"weight {slot.weight(part)!r} has shape {list(found)}, not {list(expected)}"
        )
    return size


def read_weights(model: Model, slots: Iterable[Slot]) -> dict[str, dict[str, Array]]:
    """The weights stored in a model, by slot and part.

    Raises:
        SlotError: If they are not all there.
    """
    slots = tuple(slots)
    check_weights(model.proto, slots)
    stored = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    return {
        slot.name: {part: read_tensor(model, stored[slot.weight(part)]) for part in slot.parts}
        for slot in slots
    }


def fill_weights(model: Model, values: Mapping[str, Weights]) -> Model:
    """A model whose slots have these weights as their default.

    Args:
        model: A model with slots.
        values: Weights by slot and part; slots that are not named keep theirs.

    Raises:
        SlotError: If a slot or part does not exist or a shape does not fit.
    """
    manifest = _manifest(model)
    slots = {slot.name: slot for slot in manifest.slots}
    result = model.copy()
    stored = {tensor.name: tensor for tensor in result.proto.graph.initializer}
    for name, weights in values.items():
        if name not in slots:
            raise SlotError(f"no slot is called {name!r}", hint="see `onnx-adapt slots`")
        slot = slots[name]
        if set(weights) != set(slot.parts):
            raise SlotError(
                f"slot {name!r} has the parts {', '.join(slot.parts)}, not "
                f"{', '.join(weights)}"
            )
        sizes = {_check_shape(slot, part, value.shape) for part, value in weights.items()}
        if len(sizes - {-1}) > 1:
            raise SlotError(f"the weights for slot {name!r} have different bottlenecks")
        for part, value in weights.items():
            tensor = stored[slot.weight(part)]
            tensor.CopyFrom(_tensor(tensor.name, slot, value))
    return result


def bake_weights(model: Model) -> Model:
    """A model whose slots are constants: their inputs are gone, their weights stay."""
    return _with_swappable(model, swappable=False)


def open_weights(model: Model) -> Model:
    """A model whose slots are all swappable, of any bottleneck; the reverse of baking."""
    return _with_swappable(model, swappable=True)


def _with_swappable(model: Model, *, swappable: bool) -> Model:
    manifest = _manifest(model)
    stored = read_weights(model, manifest.slots)
    result = model.copy()
    _drop_inputs(result.proto, manifest.slots)
    slots = []
    for slot in manifest.slots:
        sizes = [
            stored[slot.name][part].shape[axis]
            for part in slot.parts
            if (axis := bottleneck_axis(slot, part)) is not None
        ]
        size = 0 if swappable or not sizes else sizes[0]
        slots.append(replace(slot, swappable=swappable, bottleneck=size))
        if swappable:
            result.proto.graph.input.extend(_declaration(slots[-1], p) for p in slot.parts)
    write_manifest(result.proto, replace(manifest, slots=tuple(slots)))
    return result


def drop_weights(proto: onnx.ModelProto, slots: Iterable[Slot]) -> None:
    """Take the weights of slots out of a model, in place."""
    slots = tuple(slots)
    _drop_inputs(proto, slots)
    _drop(proto.graph.initializer, _weight_names(slots))


def _drop_inputs(proto: onnx.ModelProto, slots: Iterable[Slot]) -> None:
    _drop(proto.graph.input, _weight_names(slots))


def _weight_names(slots: Iterable[Slot]) -> set[str]:
    return {slot.weight(part) for slot in slots for part in slot.parts}


def _drop(items: Any, names: set[str]) -> None:
    """Delete the items with these names, a run of neighbours at a time."""
    doomed = [item.name in names for item in items]
    end = len(doomed)
    while end:
        start = end
        while start and doomed[start - 1] == doomed[end - 1]:
            start -= 1
        if doomed[start]:
            del items[start:end]
        end = start


def _manifest(model: Model) -> Manifest:
    manifest = read_manifest(model.proto)
    if manifest is None:
        raise SlotError(f"{model.label} has no slots", hint="insert some first")
    return manifest
