"""What an adapter needs fed beside its weights: a first past, or for which tokens it is on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.session.fed_arrays import IDS, MASK, fed_array
from onnx_adapt.session.first_past import past_feeds
from onnx_adapt.session.ort_adapter import OrtAdapter
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import ACTIVE
from onnx_adapt.slot.places import owners


def adapter_feeds(
    adapter: OrtAdapter | None,
    feeds: Mapping[str, Any],
    slots: Iterable[Slot],
    inputs: Collection[str],
) -> dict[str, Array]:
    """What to feed for an adapter beside its weights, or in place of what the caller feeds.

    Args:
        adapter: The adapter, or None for the base.
        feeds: What the caller feeds: arrays or OrtValues, or None for memory that cannot be
            read.
        slots: The slots of the model.
        inputs: The names of its own inputs.

    Raises:
        AdapterError: If that cannot be told from the feeds.
    """
    if adapter is None:
        return {}
    tokens, state = adapter.invocation_tokens, adapter.initial_state
    gates = _gates(tokens, feeds, slots) if tokens else {}
    return {**gates, **past_feeds(state, feeds, inputs)} if state else gates


def _gates(
    tokens: tuple[int, ...], feeds: Mapping[str, Any], slots: Iterable[Slot]
) -> dict[str, Array]:
    """For which tokens the slots are on; what is fed already stays."""
    gates = {
        slot.weight(ACTIVE.name): DTYPES[slot.dtype] for slot in owners(slots) if slot.by_token
    }
    missing = [name for name in gates if name not in feeds]
    if not missing:
        return {}
    if len(missing) < len(gates):
        raise AdapterError(
            f"{missing[0]!r} is not fed, and the same input of other slots is",
            hint="feed it for all slots, or for none: then it follows from input_ids",
        )
    active = invoked(_ids(feeds, missing[0]), tokens)[..., None]
    return {name: active.astype(dtype) for name, dtype in gates.items()}


def invoked(ids: Array, tokens: tuple[int, ...]) -> Array:
    """For which tokens an adapter is on that is switched on by a sequence of tokens.

    It is on from where the sequence begins last in a row to the row's end, and off in a row
    without it, as in PEFT 0.21.2 (`calculate_alora_offsets`). An example with the tokens
    `7 8`:

        ids       5 7 8 2 7 8 3        0 1 2 7 3 8 7
        on        0 0 0 0 1 1 1        0 0 0 0 0 0 0

    Args:
        ids: `(batch, sequence)`.
        tokens: The ids of the sequence, in order.

    Returns:
        `(batch, sequence)`, true where it is on.
    """
    length = ids.shape[1]
    starts = np.zeros(ids.shape, bool)
    if length >= len(tokens):
        windows = np.lib.stride_tricks.sliding_window_view(ids, len(tokens), axis=1)
        starts[:, : windows.shape[1]] = (windows == tokens).all(axis=2)
    return np.asarray(np.logical_or.accumulate(_last(starts), axis=1))


def _last(marks: Array) -> Array:
    """The last mark of each row alone."""
    later = np.logical_or.accumulate(marks[:, ::-1], axis=1)[:, ::-1]
    behind = np.zeros_like(marks)
    behind[:, :-1] = later[:, 1:]
    return np.asarray(marks & ~behind)


def _ids(feeds: Mapping[str, Any], gate: str) -> Array:
    """The token ids that are fed, if they are all that the model has seen.

    Raises:
        AdapterError: If they are not, or cannot be read.
    """
    hint = (
        f"feed {gate!r} and its like for the other slots, (batch, sequence, 1): 1 for the "
        "tokens for which the adapter is on, 0 for the others"
    )
    ids = fed_array(feeds, IDS)
    if ids is None or ids.ndim != 2:
        raise AdapterError(
            f"the adapter is on from its invocation tokens on, and {IDS!r} does not tell "
            "where they are: it is not fed as an array of (batch, sequence)",
            hint=hint,
        )
    mask = fed_array(feeds, MASK)
    if mask is not None and mask.ndim == 2 and mask.shape[1] > ids.shape[1]:
        raise AdapterError(
            f"the adapter is on from its invocation tokens on, and {IDS!r} has only the last "
            f"{ids.shape[1]} of {mask.shape[1]} tokens: they may have stood before these",
            hint=hint,
        )
    return ids
