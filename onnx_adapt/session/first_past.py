"""Feed an adapter that is the first past of a decoder (prefix tuning), call by call.

The caller decodes as without an adapter: `attention_mask` and `position_ids` count the row's
own tokens alone, and the past that a call gives back is fed to the next. With an adapter of 3
tokens and rows of 2:

    call      fed by the caller                     fed to the model
    prompt    past 0, mask 1 1,   positions 0 1     past 3, mask 1 1 1 1 1,   positions 3 4
    token     past 5, mask 1 1 1, position  2       past 5, mask 1 1 1 1 1 1, position  5

As in PEFT 0.21.2, every row sees all tokens of the adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from onnx_adapt.adapter.data import Adapter, same_base
from onnx_adapt.adapter.states import LENGTH, state_length, state_misfits
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.session.fed_arrays import IDS, MASK, fed_array, fed_shape
from onnx_adapt.session.loaded_model import LoadedModel

_TOKENS = (IDS, "inputs_embeds")
_POSITIONS = ("position_ids", "cache_position")


def check_first_past(model: LoadedModel, adapter: Adapter) -> None:
    """Check that an adapter, if it is a first past, can be that of a model.

    Raises:
        AdapterError: If the model has no past among its inputs, or it is of another model.
    """
    if not adapter.initial_state:
        return
    found = state_misfits(adapter, model.inputs, model.input_types)
    identity = adapter.fingerprint and model.identity()
    if identity and not same_base(adapter.fingerprint, identity):
        found.append(
            "it was made for another base model: its fingerprint is "
            f"{adapter.fingerprint[:19]}..., the model's {identity[:19]}..."
        )
    if found:
        raise AdapterError(
            f"adapter {adapter.name!r} does not fit {model.label}: {'; '.join(found[:3])}",
            hint="make it for this model: `onnx-adapt convert CHECKPOINT --for MODEL.onnx`",
        )
    if odd := [n for n, v in adapter.initial_state.items() if not np.isfinite(v).all()]:
        raise AdapterError(
            f"adapter {adapter.name!r} does not fit {model.label}: {odd[0]!r} holds NaN or "
            "infinity",
            hint="the training diverged; load an earlier one",
        )


def past_feeds(
    state: Mapping[str, Array], feeds: Mapping[str, Any], inputs: Collection[str]
) -> dict[str, Array]:
    """What to feed in place of the past, mask and positions of a caller.

    Args:
        state: The first past: keys and values of `(1, heads, length, size)` by input.
        feeds: What the caller feeds.
        inputs: The names of the inputs of the model.

    Raises:
        AdapterError: If past or mask cannot be those of a run with the adapter.
    """
    shape = next((found for name in _TOKENS if (found := fed_shape(feeds, name))), ())
    if len(shape) < 2:
        raise AdapterError(
            f"how many rows and tokens the call has is not clear: none of "
            f"{', '.join(_TOKENS)} is fed",
            hint="the adapter is a first past, of which each row gets a copy",
        )
    rows, tokens = shape[:2]
    own, before = state_length(state), _fed_length(state, feeds)
    result = {} if before else {n: np.repeat(value, rows, 0) for n, value in state.items()}
    if 0 < before < own:
        raise AdapterError(
            f"the past that is fed is of {before} tokens, and the adapter's own are {own}: it "
            "was made without the adapter",
            hint="feed no past in the first call; then what each call gives back as present",
        )
    mask = fed_array(feeds, MASK) if MASK in inputs else None
    if mask is not None:
        expected = (before or own) - own + tokens
        if mask.shape != (rows, expected):
            raise AdapterError(
                f"{MASK!r} is {list(mask.shape)}; with this adapter it has to be "
                f"{[rows, expected]}: of the rows' own tokens, without the adapter's {own}",
                hint="count as without an adapter; the session adds the adapter's tokens",
            )
        result[MASK] = np.concatenate([np.ones((rows, own), mask.dtype), mask], axis=1)
    for name in _POSITIONS:
        positions = fed_array(feeds, name) if name in inputs else None
        if positions is not None:
            result[name] = positions + np.array(own, positions.dtype)
    return result


def _fed_length(state: Mapping[str, Array], feeds: Mapping[str, Any]) -> int:
    """Of how many tokens the past is that the caller feeds; 0 if there is none."""
    shapes = {name: fed_shape(feeds, name) for name in state if name in feeds}
    lengths = {shape[LENGTH] if len(shape) > LENGTH else -1 for shape in shapes.values()}
    if len(lengths) > 1 or -1 in lengths or (lengths - {0} and len(shapes) < len(state)):
        raise AdapterError(
            "the past that is fed is not of one length, or only a part of it is fed",
            hint="feed no past in the first call; then what each call gives back as present",
        )
    return max(lengths, default=0)
