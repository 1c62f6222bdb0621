"""Several adapters in one run of a batched model, each for its own rows.

The adapters are laid side by side along the bottleneck, as in a blend. A mask for each row
says which units of the bottleneck count in that row, and with which weight.

An example: `fr` has a bottleneck of 2 and `de` of 3, and the rows are `[fr, base, 0.5 de]`.
The shared `down` is `(H, 5)`: the two columns of `fr`, then the three of `de`. The mask is
`[[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, .5, .5, .5]]`. Parts that are vectors, such as
`up_bias`, are not masked but given for each row: that of `fr`, zeros, and half that of `de`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnx_adapt.adapter.blending import blend_part, blend_slot
from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import (
    for_file,
    require_fit,
    required_manifest,
    rows_of,
    warn_unchecked,
)
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import PARTS
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.weights import bottleneck_of, neutral_weights, row_shape

if TYPE_CHECKING:
    from onnx_adapt.model.file import Model
    from onnx_adapt.model.given import ModelLike


@dataclass(frozen=True, slots=True)
class PackedSlot:
    """One slot of a pack.

    Attributes:
        slot: The slot.
        sizes: The bottleneck of each adapter.
        moves: For each part that is a vector, the difference of each adapter's value from
            the value that keeps the slot off: `(adapters, size)` in float64.
    """

    slot: Slot
    sizes: tuple[int, ...]
    moves: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Pack:
    """Adapters side by side.

    Attributes:
        adapter: The weights that all rows share.
        slots: The slots for which at least one adapter has weights.
    """

    adapter: Adapter
    slots: tuple[PackedSlot, ...]


def pack(slots: Sequence[Slot], adapters: Sequence[Adapter]) -> Pack:
    """Lay adapters side by side.

    Args:
        slots: The slots of a model; all are batched.
        adapters: Adapters that fit the model.

    Raises:
        AdapterError: If they cannot share a run: one replaces weights of the base, or they
            have normalisations of their own.
    """
    for adapter in adapters:
        if adapter.initial_state:
            raise AdapterError(
                f"adapter {adapter.name!r} is the first past of a decoder, of another length "
                "than that of other rows",
                hint="run the rows of each adapter by themselves",
            )
        if adapter.replaced:
            raise AdapterError(
                f"adapter {adapter.name!r} replaces {min(adapter.replaced)!r} of the base, "
                "which all rows of a run share",
                hint="run the rows of each adapter by themselves",
            )
    packed, weights = [], {}
    for slot in owners(slots):
        given = [adapter.weights.get(slot.name) for adapter in adapters]
        there = [parts for parts in given if parts is not None]
        if there:
            shared = blend_slot(slot.name, [(parts, 1.0) for parts in there])
            off = neutral_weights(slot)
            vectors = [
                part
                for part in slot.parts
                if (row := PARTS[part].row) is not None and not row.masks
            ]
            weights[slot.name] = shared | {part: off[part] for part in vectors}
            sizes = tuple(bottleneck_of(slot, parts) if parts else 0 for parts in given)
            moves = {part: _moves(part, off[part], given) for part in vectors}
            packed.append(PackedSlot(slot, sizes, moves))
    name = " | ".join(adapter.name for adapter in adapters)
    return Pack(Adapter(name, weights), tuple(packed))


def _moves(part: str, off: Array, given: Sequence[Mapping[str, Array] | None]) -> Array:
    """Compute how far each adapter moves one part from its off value."""
    still = off.astype(np.float64)
    rows = []
    for parts in given:
        moved = still
        if parts is not None:
            wide = {key: np.asarray(value, np.float64) for key, value in parts.items()}
            moved = blend_part(part, [(wide, 1.0)])
        rows.append((moved - still).reshape(-1))
    return np.stack(rows)


def row_feeds(packed: Pack, shares: Array) -> dict[str, Array]:
    """Compute the inputs by row for a run of a pack.

    Args:
        packed: The pack.
        shares: The weight of each adapter in each row: `(rows, adapters)`.

    Returns:
        Arrays by input name.
    """
    feeds: dict[str, Array] = {}
    masks: dict[tuple[tuple[int, ...], tuple[int, ...], str], Array] = {}
    for item in packed.slots:
        slot = item.slot
        dtype = DTYPES[slot.dtype]
        moves = {PARTS[part].row: move for part, move in item.moves.items()}
        for name, row in slot.row_forms.items():
            shape = row_shape(slot, name, len(shares), sum(item.sizes))
            if not row.masks:
                value = shares @ moves[row] + row.off
                feeds[slot.weight(name)] = value.reshape(shape).astype(dtype)
                continue
            key = (item.sizes, shape, slot.dtype)
            if key not in masks:
                masks[key] = np.repeat(shares, item.sizes, 1).reshape(shape).astype(dtype)
            feeds[slot.weight(name)] = masks[key]
    return feeds


def pack_rows(model: ModelLike, adapters: Sequence[AdapterLike | None]) -> Adapter:
    """Pack one adapter for each row of a batch into a single adapter.

    Its file holds the adapters side by side and the mask of the rows, so a runtime that
    feeds one file at a time serves every row with its own: onnxruntime-genai, by
    `og.Adapters`. `AdapterSession` takes a list of adapters instead.

    Args:
        model: A model whose slots were inserted batched.
        adapters: The adapter of each row, None for the base. The batch must have exactly
            these rows. The same adapter in several rows is stored once.

    Raises:
        AdapterError: If an adapter does not fit, is packed already, replaces weights of the
            base, or cannot share a run; or if there is no row, or a slot is not batched.
        SlotError: If the model has no slots.

    Warns:
        UncheckedWarning: If an adapter does not tell its base or its activations.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> place = "mos_estimator_small_1/dense_4/MatMul_add"
        >>> model = oa.insert(base, after=place, batched=True)
        >>> (slot,) = oa.list_slots(model)
        >>> ones = {"down": np.ones((64, 4)), "up": np.ones((4, 64))}
        >>> fr = oa.make_adapter(model, "fr", {slot.name: ones})
        >>> rows = oa.pack_rows(model, [fr, None, fr])
        >>> rows.weights[slot.name]["mask"].shape
        (3, 1, 4)
    """
    from onnx_adapt.model.given import as_model

    model = as_model(model)
    manifest = required_manifest(model)
    slots = owners(manifest.slots)
    _refuse_unbatched(model, slots, len(adapters))
    each = _loaded(adapters)
    used = list({id(adapter): adapter for adapter in each if adapter is not None}.values())
    told: set[str] = set()
    for adapter in used:
        require_fit(model, adapter)
        if rows_of(manifest, adapter):
            raise AdapterError(
                f"adapter {adapter.name!r} is packed for rows already",
                hint="pack the adapters that it was made of",
            )
        warn_unchecked(manifest, adapter, told)
    own = [for_file(manifest, adapter) for adapter in used]
    packed = pack(slots, own or [_off(slots)])
    shares = np.zeros((len(adapters), max(len(used), 1)))
    for column, adapter in enumerate(used):
        shares[[other is adapter for other in each], column] = 1
    rows = row_feeds(packed, shares)
    weights = {
        item.slot.name: {
            **packed.adapter.weights[item.slot.name],
            **{name: rows[item.slot.weight(name)] for name in item.slot.row_parts},
        }
        for item in packed.slots
    }
    return Adapter(
        " | ".join(adapter.name if adapter else "-" for adapter in each),
        weights,
        activations={slot.name: slot.activation for slot in slots},
        fingerprint=manifest.fingerprint,
    )


def _loaded(adapters: Sequence[AdapterLike | None]) -> list[Adapter | None]:
    """The adapter of each row, a file that several rows name only once."""
    paths = {os.fspath(row) for row in adapters if isinstance(row, str | os.PathLike)}
    files = {path: as_adapter(path) for path in paths}
    return [
        files[os.fspath(row)]
        if isinstance(row, str | os.PathLike)
        else None
        if row is None
        else as_adapter(row)
        for row in adapters
    ]


def _off(slots: Sequence[Slot]) -> Adapter:
    """An adapter of one unit of zeros in every slot."""
    return Adapter("-", {slot.name: neutral_weights(slot, 1) for slot in slots})


def _refuse_unbatched(model: Model, slots: Sequence[Slot], rows: int) -> None:
    """Refuse what has no rows: slots that share their weights, and an empty list."""
    if single := [slot.name for slot in slots if not slot.batched]:
        raise AdapterError(
            f"slot {single[0]!r} of {model.label} is not batched: all rows share its weights",
            hint="insert with --batched to give each row an adapter of its own",
        )
    if not rows:
        raise AdapterError("there are no rows to pack", hint="give one adapter for each row")
