"""An adapter: weights for the slots of a model, under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.slot.names import split_weight, weight_name
from onnx_adapt.slot.record import Extra
from onnx_adapt.tables import html_table
from onnx_adapt.words import count


@dataclass(frozen=True, slots=True)
class Adapter:
    """Weights by slot, and values that replace weights of the base.

    `make_adapter` makes one from arrays and records which model they are for.

    Attributes:
        name: What the adapter is called.
        weights: Slot -> part -> array, in the shapes of `onnx_adapt.slot.weights.part_shape`.
        replaced: Name of an input -> array, for replaceable weights of the base such as
            trained heads and biases.
        activations: Slot -> the activation that it was trained with, where known.
        fingerprint: The fingerprint of the base model, whole or abbreviated; '' if unknown.
        other_bases: Fingerprints of further models that it is for: other files of the same
            model, each of which has some of its slots.
        extra: Slot -> keys of its record that this version does not know; those of the
            adapter's own record under ''.
        stacks: Slot -> how many matrices the weight has that it is on, where it is a stack
            (experts, the directions of an LSTM): `down` has the rows of all of them, `up`
            the columns.
        invocation_tokens: Ids of the tokens that switch the adapter on (aLoRA): in each row
            it is on from where they stand last, and off where they do not stand. Empty if it
            is always on.
        initial_state: The first past of a decoder (prefix tuning): name of an input -> keys or
            values of `(1, heads, length, size)`.

    Example:
        >>> import numpy as np
        >>> down, up = np.zeros((8, 2), "float32"), np.zeros((2, 8), "float32")
        >>> adapter = Adapter("fr", {"fc": {"down": down, "up": up}})
        >>> sorted(adapter.feeds())
        ['adapter.fc.down', 'adapter.fc.up']
    """

    name: str
    weights: Mapping[str, Mapping[str, Array]]
    replaced: Mapping[str, Array] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    other_bases: tuple[str, ...] = ()
    extra: Mapping[str, Extra] = field(default_factory=dict)
    stacks: Mapping[str, int] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()
    initial_state: Mapping[str, Array] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Its name, its slots and its size; the shapes of the first slot, and no numbers."""
        more = f", {count(len(self.replaced), 'replaced weight')}" if self.replaced else ""
        first = next(iter(self.weights), None)
        shapes = "" if first is None else f"; {first}: {_shapes(self.weights[first])}"
        slots = count(len(self.weights), "slot")
        return f"<Adapter {self.name!r}: {slots}{more}, {self.size:,} bytes{shapes}>"

    def _repr_html_(self) -> str:
        rows = [(slot, _shapes(parts)) for slot, parts in self.weights.items()]
        rows += [(name, str(np.shape(value))) for name, value in self.replaced.items()]
        caption = f"Adapter {self.name!r}, {self.size:,} bytes"
        return html_table(caption, ("slot or weight", "shapes"), rows)

    def feeds(self) -> dict[str, Array]:
        """Every array by the name of the model input that takes it, sorted."""
        flat = {
            weight_name(slot, part): array
            for slot, parts in self.weights.items()
            for part, array in parts.items()
        }
        return dict(sorted({**flat, **self.replaced}.items()))

    def tensors(self) -> dict[str, Array]:
        """Every array that its file holds, sorted by name: its feeds and its initial state."""
        return dict(sorted({**self.feeds(), **self.initial_state}.items()))

    @property
    def size(self) -> int:
        """The number of bytes of all arrays."""
        return sum(array.nbytes for array in self.tensors().values())


def _shapes(parts: Mapping[str, Array]) -> str:
    return ", ".join(f"{part} {np.shape(value)}" for part, value in parts.items())


def adapter_from_tensors(
    name: str,
    tensors: Mapping[str, Array],
    *,
    activations: Mapping[str, str] | None = None,
    fingerprint: str = "",
) -> Adapter:
    """Sort arrays by input name into slots and replaced weights.

    Raises:
        AdapterError: If an array has an element type that no slot can have.
    """
    allowed = set(DTYPES.values())
    weights: dict[str, dict[str, Array]] = {}
    replaced: dict[str, Array] = {}
    for key, array in sorted(tensors.items()):
        if array.dtype not in allowed:
            raise AdapterError(
                f"tensor {key!r} of adapter {name!r} is {array.dtype}",
                hint=f"adapters hold {', '.join(DTYPES)}",
            )
        if found := split_weight(key):
            slot, part = found
            weights.setdefault(slot, {})[part] = np.asarray(array, order="C")
        else:
            replaced[key] = np.asarray(array, order="C")
    return Adapter(name, weights, replaced, dict(activations or {}), fingerprint)


_SHORT = "short:"


def short_fingerprint(fingerprint: str) -> int:
    """The first 31 bits of a fingerprint, for formats with no room for more; 0 if none."""
    if fingerprint.startswith(_SHORT):
        return int(fingerprint.removeprefix(_SHORT))
    digits = fingerprint.removeprefix("sha256:")[:8]
    return int(digits, 16) >> 1 if digits else 0


def abbreviated(number: int) -> str:
    """Write a `short_fingerprint` as the fingerprint of an adapter; '' if it is 0."""
    return f"{_SHORT}{number}" if number > 0 else ""


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints, whole or abbreviated, can be those of the same model."""
    if one.startswith(_SHORT) or other.startswith(_SHORT):
        return short_fingerprint(one) == short_fingerprint(other)
    return one == other
