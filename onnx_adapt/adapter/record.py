"""The record in an adapter file: a JSON text that describes the tensors beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx_adapt.adapter.data import Adapter, adapter_from_tensors
from onnx_adapt.adapter.quantised import Quantised, dequantised
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.slot.record import Extra, read_extra, write_extra

KEY = "onnx_adapt"
VERSION = 3
"""The newest format that is read. 1 is that of most files. 2 has quantised numbers, and 3 what
a runtime has to act on, such as invocation tokens; older readers refuse them by it."""


_KEYS = (
    *("format", "name", "fingerprint", "other_bases", "slots", "quantised"),
    *("invocation_tokens", "initial_state"),
)


def write_record(adapter: Adapter, quantised: Quantised | None = None) -> str:
    """Write the record of an adapter: its name, slots and fingerprint.

    Args:
        adapter: The adapter.
        quantised: Its quantised form, if that is what the tensors beside the record are.
    """
    slots = {
        slot: {
            "parts": sorted(parts),
            "activation": adapter.activations.get(slot, ""),
            **({"stack": adapter.stacks[slot]} if slot in adapter.stacks else {}),
            **write_extra(adapter.extra.get(slot, ())),
        }
        for slot, parts in sorted(adapter.weights.items())
    }
    data = {
        "format": 1,
        "name": adapter.name,
        "fingerprint": adapter.fingerprint,
        "slots": slots,
        **({"other_bases": list(adapter.other_bases)} if adapter.other_bases else {}),
        **write_extra(adapter.extra.get("", ())),
    }
    if quantised is not None:
        data["format"] = 2
        data["quantised"] = {"bits": quantised.bits, "tensors": dict(quantised.forms)}
    if adapter.invocation_tokens:
        data["format"] = 3
        data["invocation_tokens"] = list(adapter.invocation_tokens)
    if adapter.initial_state:
        data["format"] = 3
        data["initial_state"] = sorted(adapter.initial_state)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def adapter_from_record(text: str | None, tensors: Mapping[str, Array], path: Path) -> Adapter:
    """Make an adapter from its tensors and its record, if there is one.

    Raises:
        AdapterError: If the record is damaged, too new, or not about these tensors.
    """
    if text is None:
        return adapter_from_tensors(path.stem, tensors)
    try:
        data: dict[str, Any] = json.loads(text)
        version = data["format"]
        if not isinstance(version, int) or version > VERSION:
            raise AdapterError(
                f"{path.name} is an adapter file of format {version}; this version of "
                f"onnx-adapt reads up to {VERSION}",
                hint="upgrade: pip install -U onnx-adapt",
            )
        slots = {str(s): sorted(map(str, item["parts"])) for s, item in data["slots"].items()}
        activations = {str(s): str(i["activation"]) for s, i in data["slots"].items()}
        name, fingerprint = _text(data["name"]), _text(data["fingerprint"])
        facts = _read_facts(data, tensors)
        if "quantised" in data:
            form = data["quantised"]
            tensors = dequantised(tensors, form["bits"], form["tensors"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"the record in {path.name} is damaged ({error!r})",
            hint="write the file again with onnx-adapt",
        ) from error
    activations = {slot: value for slot, value in activations.items() if value}
    state = facts["initial_state"]
    rest = {key: value for key, value in tensors.items() if key not in state}
    adapter = adapter_from_tensors(
        name, rest, activations=activations, fingerprint=fingerprint
    )
    if slots != {slot: sorted(parts) for slot, parts in adapter.weights.items()}:
        raise AdapterError(
            f"the tensors in {path.name} are not those its record names",
            hint="the file is damaged or was edited; write it again",
        )
    return replace(adapter, **facts)


def _read_facts(data: dict[str, Any], tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Return the fields of an adapter that its record has beside those of its slots."""
    return {
        "other_bases": tuple(map(_text, data.get("other_bases", ()))),
        "extra": _read_extra(data),
        "stacks": _read_stacks(data),
        "invocation_tokens": _read_invocation(data),
        "initial_state": {
            _text(name): tensors[name] for name in data.get("initial_state", ())
        },
    }


def _read_extra(data: dict[str, Any]) -> dict[str, Extra]:
    """Return the unknown keys by slot, and those of the record itself under ''."""
    extra = {"": read_extra(data, _KEYS)}
    of_slot = ("parts", "activation", "stack")
    extra |= {s: read_extra(i, of_slot) for s, i in data["slots"].items()}
    return {slot: keys for slot, keys in extra.items() if keys}


def _read_stacks(data: dict[str, Any]) -> dict[str, int]:
    """Return how many matrices the weights have that slots are on, where several."""
    found = {s: i["stack"] for s, i in data["slots"].items() if "stack" in i}
    for groups in found.values():
        if type(groups) is not int or groups < 2:
            raise ValueError(f"a stack of {groups!r}")
    return found


def _read_invocation(data: dict[str, Any]) -> tuple[int, ...]:
    """Return the tokens that switch the adapter on, if some do."""
    tokens = data.get("invocation_tokens", ())
    if any(type(token) is not int or token < 0 for token in tokens):
        raise ValueError(f"invocation tokens {tokens!r}")
    return tuple(tokens)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
