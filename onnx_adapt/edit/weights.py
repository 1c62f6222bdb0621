"""Add, read, fill, bake and drop the weights of slots inside a model.

A weight is an initializer of the main graph; that of a swappable slot is a graph input
too. This module is the only one that touches either, so the two stay in step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import DTYPES, ELEM_TYPES, Array
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.errors import SlotError
from onnx_adapt.graph.index import default_opset
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor, tensor_of
from onnx_adapt.slot.base_changes import ReplaceableWeight, Widened
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.manifest import Manifest, Slot, slot_of, write_manifest
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.weights import (
    bottleneck_axis,
    neutral_rows,
    neutral_weights,
    part_shape,
    row_rank,
)

Weights = Mapping[str, Array]
"""The weights of one slot, by part."""


def add_weights(proto: onnx.ModelProto, slot: Slot, weights: Weights) -> None:
    """Add the weights of a new slot to a model, in place."""
    for part in slot.parts:
        name = slot.weight(part)
        proto.graph.initializer.append(_tensor(name, slot, weights[part]))
        if slot.swappable:
            proto.graph.input.append(_declaration(slot, part))
    for part, value in neutral_rows(slot).items():
        proto.graph.initializer.append(_tensor(slot.weight(part), slot, value))
        proto.graph.input.append(_row_declaration(slot, part))


def _tensor(name: str, slot: Slot, value: Array) -> onnx.TensorProto:
    return tensor_of(name, np.ascontiguousarray(value, DTYPES[slot.dtype]))


def _declaration(slot: Slot, part: str) -> onnx.ValueInfoProto:
    shape: list[int | str] = list(part_shape(slot, part, slot.bottleneck))
    axis = bottleneck_axis(slot, part)
    if axis is not None and not slot.bottleneck:
        shape[axis] = slot.symbol
    elem_type = ELEM_TYPES[slot.dtype]
    return helper.make_tensor_value_info(slot.weight(part), elem_type, shape)


def _row_declaration(slot: Slot, part: str) -> onnx.ValueInfoProto:
    """Declare an input with a value for each row or token; its default is one for all."""
    name = slot.weight(part)
    shape: list[int | str] = [1] * row_rank(slot)
    other, said = (1, "positions") if slot.by_token else (slot.axis, "size")
    shape[0], shape[other] = f"{name}.rows", f"{name}.{said}"
    return helper.make_tensor_value_info(name, ELEM_TYPES[slot.dtype], shape)


def check_model_weights(proto: onnx.ModelProto, manifest: Manifest) -> None:
    """Check that a model has everything that its manifest names.

    Raises:
        SlotError: If another tool took initializers or inputs away.
    """
    check_weights(proto, manifest.slots)
    marked = {slot_of(n) for scope in walk.scopes(proto.graph) for n in scope.graph.node}
    for slot in manifest.slots:
        if slot.name not in marked:
            raise SlotError(
                f"slot {slot.name!r} is damaged: its nodes are gone, or have lost their mark",
                hint="another tool rewrote the graph; insert into the base model again",
            )
    check_base_weights(proto, manifest.weights)
    check_widened(proto, manifest.widened)


def check_base_weights(proto: onnx.ModelProto, weights: Iterable[ReplaceableWeight]) -> None:
    """Check that the replaceable weights of the base can still be replaced.

    Raises:
        SlotError: If another tool took them away.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name for value in proto.graph.input}
    for weight in weights:
        held = weight.default or weight.name
        if held not in stored or (weight.swappable and weight.name not in inputs):
            raise SlotError(
                f"weight {weight.name!r} is not replaceable any more: it was stripped from "
                "the model",
                hint="simplifiers do this; run them on the base first, then insert",
            )


def check_widened(proto: onnx.ModelProto, widened: Iterable[Widened]) -> None:
    """Check that the ranges that were widened are in the model.

    Raises:
        SlotError: If another tool took them away.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    for item in widened:
        if item.name not in stored:
            raise SlotError(
                f"{item.name!r}, the widened range behind {item.quantizer!r}, is gone from "
                "the model",
                hint="another tool folded or renamed it; insert into the base model again",
            )


def check_weights(proto: onnx.ModelProto, slots: Iterable[Slot]) -> None:
    """Check that every weight of every slot is there, as initializer and as input.

    Raises:
        SlotError: If a slot has no meaning, or another tool took initializers or inputs
            away.
    """
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    inputs = {value.name for value in proto.graph.input}
    for slot in slots:
        check_slot(slot, default_opset(proto))
        names = slot.inputs
        if slot.required:
            _check_required(slot, stored.keys(), inputs)
            continue
        if lost := [name for name in names if name not in stored]:
            raise SlotError(
                f"slot {slot.name!r} is damaged: weight {lost[0]!r} is gone from the model",
                hint="another tool folded or renamed it; insert into the base model again",
            )
        stripped = [name for name in names if name not in inputs]
        if slot.swappable and stripped:
            raise SlotError(
                f"slot {slot.name!r} is not swappable any more: input {stripped[0]!r} was "
                "stripped from the model",
                hint="simplifiers do this; run them on the base first, then insert",
            )
        sizes = set()
        for part in slot.parts:
            tensor = stored[slot.weight(part)]
            sizes.add(_check_shape(slot, part, tensor.dims))
            if tensor.data_type != ELEM_TYPES[slot.dtype]:
                raise SlotError(f"weight {tensor.name!r} is not {slot.dtype}, as its slot is")
        if len(sizes - {-1}) > 1:
            raise SlotError(f"the weights of slot {slot.name!r} have different bottlenecks")


def _check_required(slot: Slot, stored: Collection[str], inputs: Collection[str]) -> None:
    """Check the inputs of a slot that must be fed; they have no default."""
    for name in slot.inputs:
        if name not in inputs:
            raise SlotError(
                f"slot {slot.name!r} is not swappable any more: input {name!r} is gone",
                hint="another tool fixed or folded it; export the model with slots again",
            )
        if name in stored:
            raise SlotError(
                f"slot {slot.name!r} is damaged: {name!r} must be fed, and has a default",
                hint="another tool added it; export the model with slots again",
            )


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
    """Read the weights stored in a model, by slot and part.

    A slot whose weights must be fed is as if it were empty.

    Raises:
        SlotError: If a weight is missing.
    """
    slots = tuple(slots)
    check_weights(model.proto, slots)
    stored = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    return {
        slot.name: neutral_weights(slot, slot.bottleneck)
        if slot.required
        else {part: read_tensor(model, stored[slot.weight(part)]) for part in slot.parts}
        for slot in owners(slots)
    }


def fill_weights(model: Model, values: Mapping[str, Weights]) -> Model:
    """Make weights the default of a model's slots.

    Args:
        model: A model with slots.
        values: Weights by slot and part; slots that are not named keep theirs.

    Raises:
        SlotError: If a slot or part does not exist or a shape does not fit.
    """
    model = with_defaults(model)
    manifest = required_manifest(model)
    slots = {slot.name: slot for slot in owners(manifest.slots)}
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
    """Make the weights of all slots constants: their inputs go, their values stay."""
    return _with_swappable(model, swappable=False)


def make_swappable(model: Model) -> Model:
    """Make the weights of all slots inputs again, of any bottleneck; the reverse of baking."""
    return _with_swappable(model, swappable=True)


def _with_swappable(model: Model, *, swappable: bool) -> Model:
    model = with_defaults(model)
    manifest = required_manifest(model)
    stored = read_weights(model, manifest.slots)
    result = model.copy()
    _drop_inputs(result.proto, manifest.slots)
    slots = []
    for slot in manifest.slots:
        sizes = [
            stored[slot.owner][part].shape[axis]
            for part in slot.parts
            if (axis := bottleneck_axis(slot, part)) is not None
        ]
        size = 0 if swappable or not sizes else sizes[0]
        slots.append(replace(slot, swappable=swappable, bottleneck=size))
        if swappable and not slot.shares:
            result.proto.graph.input.extend(_declaration(slots[-1], p) for p in slot.parts)
            rows = (_row_declaration(slots[-1], part) for part in slot.row_parts)
            result.proto.graph.input.extend(rows)
    drop_named(result.proto.graph.input, {weight.name for weight in manifest.weights})
    tensors = {tensor.name: tensor for tensor in result.proto.graph.initializer}
    for weight in manifest.weights if swappable else ():
        tensor = tensors[weight.name]
        result.proto.graph.input.append(
            helper.make_tensor_value_info(weight.name, tensor.data_type, list(tensor.dims))
        )
    weights = tuple(replace(weight, swappable=swappable) for weight in manifest.weights)
    write_manifest(result.proto, replace(manifest, slots=tuple(slots), weights=weights))
    return result


def drop_weights(proto: onnx.ModelProto, slots: Iterable[Slot]) -> None:
    """Remove the weights of slots from a model, in place."""
    slots = tuple(slots)
    _drop_inputs(proto, slots)
    drop_named(proto.graph.initializer, _weight_names(slots))


def _drop_inputs(proto: onnx.ModelProto, slots: Iterable[Slot]) -> None:
    drop_named(proto.graph.input, _weight_names(slots))


def _weight_names(slots: Iterable[Slot]) -> set[str]:
    return {name for slot in slots for name in slot.inputs}


def drop_named(items: Any, names: set[str]) -> None:
    """Delete the items with these names; neighbours together, which is much faster."""
    doomed = [item.name in names for item in items]
    end = len(doomed)
    while end:
        start = end
        while start and doomed[start - 1] == doomed[end - 1]:
            start -= 1
        if doomed[start]:
            del items[start:end]
        end = start
