"""The past of a decoder among its inputs, and adapters that are a first past.

A decoder that was exported with its past has two inputs for each layer, for keys and values
of `(batch, heads, length, size)`. Exporters name them `past_key_values.0.key` (optimum,
onnxruntime-genai), `past_key_values_0_value`, `past_0_key` or `past_key_0`. What the model
gives back for the next call is named alike, with `present`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.errors import AdapterError

Shape = Sequence[int | str | None]
"""A declared shape: a number, a symbol or None for each axis."""

LENGTH = 2
"""The axis of a past that grows with the tokens: `(batch, heads, length, size)`."""

_NAMES = re.compile(
    r"(?P<what>past|present)(_key_values?|_kv)?[._]?(?:(?P<first>\d+)[._])?"
    r"(?P<part>key|value)s?(?:[._](?P<last>\d+))?",
    re.IGNORECASE,
)
_COUNTERS = {
    *("use_cache_branch", "past_seq_len", "past_sequence_length", "total_sequence_length"),
    "seqlens_k",
}
"""Inputs that count or choose the past, which a longer past would make wrong."""

EXPORT_WITH_PAST = (
    "export the decoder with past_key_values among its inputs: with optimum, by the task "
    "text-generation-with-past, or with onnxruntime-genai's builder"
)


def past_of(names: Iterable[str], what: str = "past") -> list[str]:
    """The inputs or outputs with the keys and values of each layer: key, value, key, ...

    Args:
        names: The names of all inputs, or of all outputs.
        what: `past`, or `present` for the outputs that are the next past.

    Raises:
        AdapterError: If there are none, or others that look like them.
    """
    kind = "input" if what == "past" else "output"
    found: dict[tuple[int, str], str] = {}
    for name in (name for name in names if what in name.lower()):
        match = _NAMES.fullmatch(name)
        number = match and (match["first"] or match["last"])
        if match is None or number is None or match["what"].lower() != what:
            raise AdapterError(
                f"{kind} {name!r} is not known as the keys or values of one layer",
                hint=EXPORT_WITH_PAST,
            )
        found[int(number), match["part"].lower()] = name
    layers = sorted({layer for layer, _ in found})
    wanted = [(layer, part) for layer in layers for part in ("key", "value")]
    if not layers or set(wanted) != set(found):
        told = "has no keys and values" if not layers else "lacks keys or values of a layer"
        raise AdapterError(
            f"the model {told} of earlier tokens among its {kind}s", hint=EXPORT_WITH_PAST
        )
    return [found[place] for place in wanted]


def state_misfits(
    adapter: Adapter, inputs: Mapping[str, Shape], dtypes: Mapping[str, str]
) -> list[str]:
    """List why an adapter cannot be the first past of a model; empty if it can.

    Args:
        adapter: The adapter, with an initial state.
        inputs: The declared shape of each input of the model.
        dtypes: The element type of each.
    """
    try:
        names = past_of(inputs)
    except AdapterError as error:
        return [f"it is a first past, and {error.message}: {error.hint}"]
    found = [f"the model counts its past by the input {n!r}" for n in _COUNTERS & set(inputs)]
    if set(names) != set(adapter.initial_state):
        found.append(f"it is a past of {len(adapter.initial_state)} inputs, not {len(names)}")
    for name in (name for name in names if name in adapter.initial_state):
        value, shape = adapter.initial_state[name], inputs[name]
        pairs = zip(shape, value.shape, strict=False)
        fits = len(shape) == value.ndim and all(
            axis == 0 or not isinstance(size, int) or size == own
            for axis, (size, own) in enumerate(pairs)
        )
        if not fits:
            found.append(f"{name!r} has shape {list(value.shape)}, the input {list(shape)}")
        if str(value.dtype) != dtypes[name]:
            found.append(f"{name!r} is {value.dtype}, the input {dtypes[name]}")
    return found


def state_length(state: Mapping[str, object]) -> int:
    """How many tokens a past is of; 0 if there is none."""
    return next((value.shape[LENGTH] for value in state.values()), 0)  # type: ignore[attr-defined]
