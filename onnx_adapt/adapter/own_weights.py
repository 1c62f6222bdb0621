"""Make an adapter of your own weights for the slots of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import PARTS
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.weights import bottleneck_axis, neutral_weights, part_shape, stacks_of
from onnx_adapt.words import nearest

Weights = Mapping[str, Mapping[str, Any]]


def make_adapter(model: ModelLike, name: str, weights: Weights) -> Adapter:
    """Make an adapter for a model's slots from arrays.

    The arrays are checked, and the adapter records the base model and the activations that
    it is for.

    Args:
        model: A model with slots, or its path.
        name: What to call the adapter.
        weights: Slot -> part -> array of floats, or lists of numbers. `down` is
            `(source width, r)` and `up` is `(r, width)`. For a slot on channels, the shapes of
            Conv's weights are accepted too: `(r, source width, 1, ...)` and
            `(width, r, 1, ...)`. Biases that are left out are 0, and `scale` and `gain` are 1.
            Slots may be left out; load the adapter with `allow_partial` then, and they stay
            off.

    Returns:
        The adapter, in the slots' shapes and element types.

    Raises:
        AdapterError: If a name is unknown, a weight is missing, transposed, of another
            shape or no float array, or holds NaN or infinity.
        SlotError: If the model has no slots.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> model = oa.insert(base, after="conv2d_5", activation="gelu")
        >>> ones = {"down": np.ones((32, 4)), "up": np.ones((4, 32))}
        >>> mine = oa.make_adapter(model, "mine", {"conv2d_5": ones})
        >>> mine.weights["conv2d_5"]["down"].shape, mine.activations
        ((4, 32, 1, 1), {'conv2d_5': 'gelu'})
    """
    opened = as_model(model)
    manifest = required_manifest(opened)
    slots = {slot.name: slot for slot in owners(manifest.slots)}
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError(
            f"adapter {name!r} has no weights", hint=f"give some of {_some(slots)}"
        )
    made: dict[str, dict[str, Array]] = {}
    for label, parts in weights.items():
        if label not in slots:
            close = nearest(str(label), slots)
            raise AdapterError(
                f"{opened.label} has no slot {label!r}",
                hint=f"did you mean {', '.join(close)}?"
                if close
                else f"it has {_some(slots)}",
            )
        made[label] = _slot_weights(slots[label], parts)
    activations = {label: slots[label].activation for label in made}
    stacks = stacks_of(slots[label] for label in made)
    return Adapter(name, made, {}, activations, manifest.fingerprint, stacks=stacks)


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")


def _slot_weights(slot: Slot, given: Any) -> dict[str, Array]:
    """Complete the weights of one slot, in its shapes and element type.

    Raises:
        AdapterError: If a part is missing that has no default, or a weight does not fit.
    """
    if not isinstance(given, Mapping):
        raise AdapterError(
            f"the weights for slot {slot.name!r} are {type(given).__name__}",
            hint=f"give {{part: array}} with {', '.join(slot.parts)}",
        )
    for part in given:
        if part not in slot.parts:
            close = nearest(str(part), slot.parts, 1)
            raise AdapterError(
                f"slot {slot.name!r} has no part {part!r}; it has {', '.join(slot.parts)}",
                hint=f"did you mean {close[0]!r}?" if close else "parts come with `insert`",
            )
    if missing := [p for p in slot.parts if p not in given and not PARTS[p].optional]:
        raise AdapterError(
            f"the weights for slot {slot.name!r} lack {', '.join(missing)}",
            hint=f"give all of {', '.join(slot.parts)}; biases, scale, gain may be left out",
        )
    arrays = {part: _laid_out(slot, part, _floats(slot, part, given[part])) for part in given}
    size = _bottleneck(slot, arrays)
    whole = {
        part: arrays.get(part, value) for part, value in neutral_weights(slot, size).items()
    }
    return {part: np.ascontiguousarray(whole[part], DTYPES[slot.dtype]) for part in slot.parts}


def _floats(slot: Slot, part: str, value: Any) -> Array:
    """A weight as an array of finite floats that the slot's element type can hold."""
    label = f"{part!r} for slot {slot.name!r}"
    plain = isinstance(value, list | tuple | int | float)
    try:
        array = np.asarray(value, DTYPES[slot.dtype] if plain else None)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{label} is no array: {error}", hint="give a numpy array of floats"
        ) from error
    if array.dtype.newbyteorder("=") not in set(DTYPES.values()):
        raise AdapterError(
            f"{label} is {array.dtype}",
            hint=f"give floats ({', '.join(DTYPES)}): array.astype({slot.dtype!r})",
        )
    with np.errstate(over="ignore"):
        cast = array.astype(DTYPES[slot.dtype])
    for kind, values in ((array.dtype, array), (slot.dtype, cast)):
        if not np.isfinite(values).all():
            raise AdapterError(
                f"{label} holds NaN or infinity in {kind}",
                hint="the training diverged, or the values are too large for the slot",
            )
    return np.asarray(cast)


def _laid_out(slot: Slot, part: str, value: Array) -> Array:
    """Give a weight the shape that its slot needs, for any bottleneck.

    For example, a channel slot on `(n, C, height, width)` needs `up` as `(C, r, 1, 1)`. An
    array of `(r, C)` is transposed and gets the two trailing axes.

    Raises:
        AdapterError: If it has another shape.
    """
    rank = len(part_shape(slot, part, 1))
    shaped = value
    if value.ndim == 2 < rank:
        shaped = value.T.reshape(*value.T.shape, *(1,) * (rank - 2))
    elif value.ndim == 1 == len(PARTS[part].shape) < rank:
        shaped = value.reshape(-1, *(1,) * (rank - 1))
    if part == "gain" and value.size == 1:
        shaped = np.full(part_shape(slot, part, 1), value.item(), value.dtype)
    if _fits(slot, part, shaped):
        return shaped
    turned = value.T if value.ndim == 2 else None
    if turned is not None and rank > 2:
        turned = value.reshape(*value.shape, *(1,) * (rank - 2))
    if turned is not None and _fits(slot, part, turned):
        raise AdapterError(
            f"{part!r} for slot {slot.name!r} has shape {list(value.shape)}, not "
            f"{_expected(slot, part)}: it looks transposed; PyTorch's Linear.weight is "
            "(out, in)",
            hint="give its transpose, weight.T",
        )
    raise AdapterError(
        f"{part!r} for slot {slot.name!r} has shape {list(value.shape)}, not "
        f"{_expected(slot, part)}",
        hint=f"the slot is {slot.width} wide and reads {slot.source_width}; r is any size",
    )


def _fits(slot: Slot, part: str, value: Array) -> bool:
    """Whether a weight has its slot's shape with some bottleneck."""
    axis = bottleneck_axis(slot, part)
    if axis is not None and value.ndim <= axis:
        return False
    size = 0 if axis is None else value.shape[axis]
    return value.size > 0 and value.shape == part_shape(slot, part, size)


def _expected(slot: Slot, part: str) -> str:
    """The shapes that a weight may have, with `r` for the bottleneck."""
    axis = bottleneck_axis(slot, part)
    shape: list[object] = list(part_shape(slot, part, 1))
    if axis is not None:
        shape[axis] = "r"
    shown = f"[{', '.join(map(str, shape))}]"
    if len(shape) > 2 and all(size == 1 for size in shape[2:]):
        shown = f"[{', '.join(map(str, shape[1::-1]))}] or {shown}"
    return shown


def _bottleneck(slot: Slot, weights: Mapping[str, Array]) -> int:
    """The one bottleneck of a slot's weights; 0 if it has none.

    Raises:
        AdapterError: If they have several, or another than the slot's own.
    """
    sizes = {
        part: value.shape[axis]
        for part, value in weights.items()
        if (axis := bottleneck_axis(slot, part)) is not None
    }
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{part} {size}" for part, size in sizes.items())
        raise AdapterError(
            f"the weights for slot {slot.name!r} have different bottlenecks: {shown}",
            hint="all parts of a slot have one r",
        )
    size = next(iter(sizes.values()), 0)
    if slot.bottleneck and size and size != slot.bottleneck:
        raise AdapterError(
            f"slot {slot.name!r} has a fixed bottleneck of {slot.bottleneck}, the weights "
            f"have {size}",
            hint="insert without --bottleneck for any size",
        )
    return size
