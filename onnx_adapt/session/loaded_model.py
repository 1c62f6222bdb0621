"""A model loaded into ONNX Runtime, and which weights of its slots can be fed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_adapt.adapter.fitting import Replaceable
from onnx_adapt.dtypes import DTYPES, ORT_TYPES, Array
from onnx_adapt.errors import ArgumentError, RunError, SlotError
from onnx_adapt.model import borrowed
from onnx_adapt.model.signatures import HEAD, recognised
from onnx_adapt.ort import (
    onnxruntime,
    read_providers,
    run_ort_values,
    run_session,
    runs_on_cpu,
    start_session,
    without_slot_warnings,
)
from onnx_adapt.session.choosing import base_size
from onnx_adapt.session.ort_adapter import as_ort_value, stamp_of
from onnx_adapt.slot.manifest import KEY, Manifest, Slot, manifest_from_text, read_manifest
from onnx_adapt.slot.required import required_feeds
from onnx_adapt.words import beside

if TYPE_CHECKING:
    from onnx_adapt.model.given import ModelLike


class LoadedModel:
    """A session of ONNX Runtime on one model.

    Args:
        model: Its path, or the model in memory.
        providers: Execution providers as `read_providers` takes them; by default the CPU.
        options: Session options, or None.

    Attributes:
        label: The name of the model in messages.
        inputs: The declared shape of each input that the caller must feed.
        outputs: The declared shape of each output.
        manifest: The record of its slots, or None.
        neutral: OrtValues by input name that turn off the slots that must be fed; empty if
            the model has defaults.
        is_batched: Whether rows can have adapters of their own in one run.
        base_size: The bytes of weights of the base that a run reads; 0 if it is not batched.

    Raises:
        RunError: If ONNX Runtime refuses the model.
        ExternalDataError: If the base of a thin model is another one now.
    """

    def __init__(
        self,
        model: ModelLike,
        providers: Sequence[Any] | None,
        options: Any,
    ) -> None:
        self._given = model
        self.label, self._session = _start(model, providers, options)
        given = self._session.get_inputs()
        self.outputs = {item.name: item.shape for item in self._session.get_outputs()}
        record = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        self.manifest = manifest_from_text(record) if record else None
        feeds = required_feeds(self.manifest, base_values(model))
        self.neutral = {name: as_ort_value(value) for name, value in feeds.items()}
        self.inputs = {i.name: i.shape for i in given if i.name not in self.neutral}
        self._slots: tuple[Manifest, Replaceable] | None = None
        self.is_batched = bool(self.all_slots) and all(s.batched for s in self.all_slots)
        self.base_size = base_size(model) if self.is_batched else 0

    @property
    def session(self) -> Any:
        """ONNX Runtime's session.

        Raises:
            RunError: If it was closed.
        """
        if self._session is None:
            raise RunError("the session is closed", hint="make a new AdapterSession")
        return self._session

    def close(self) -> None:
        """Free the model once the runs under way have ended."""
        self._session = None

    def output_names(self, outputs: Sequence[str] | None) -> list[str]:
        """The names of the outputs to compute.

        Raises:
            RunError: If the model has no such output, or the session was closed.
        """
        _ = self.session
        if outputs is None:
            return list(self.outputs)
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        if not names:
            raise RunError("no output is asked for", hint="leave outputs= out for all of them")
        if unknown := [name for name in names if name not in self.outputs]:
            raise RunError(
                f"{self.label} has no output {unknown[0]!r}",
                hint=f"it has {', '.join(self.outputs)}",
            )
        return names

    def run(
        self, names: list[str], feeds: Mapping[str, Any], options: Any = None
    ) -> list[Any]:
        """Run the model once.

        Raises:
            RunError: If it does not take the feeds.
        """
        fed = {**self.neutral, **feeds} if self.neutral else feeds
        return run_session(self.session, names, fed, label=self.label, run_options=options)

    def run_with_ort_values(self, names: list[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Run the model once, OrtValues in and out.

        Raises:
            RunError: If it does not take the feeds.
        """
        fed = {**self.neutral, **feeds}
        return run_ort_values(self.session, names, fed, label=self.label)

    @property
    def all_slots(self) -> tuple[Slot, ...]:
        """Its slots; none if it is a model without."""
        return self.manifest.slots if self.manifest else ()

    @property
    def is_swappable(self) -> bool:
        """Whether it has slots or weights that can be fed."""
        known = self.manifest
        if known is None:
            return False
        return any(s.swappable for s in known.slots) or any(w.swappable for w in known.weights)

    @property
    def runs_on_cpu(self) -> bool:
        """Whether no other execution provider comes before the CPU."""
        return runs_on_cpu(self.session)

    @property
    def input_types(self) -> dict[str, str]:
        """The element type of each input, as adapters name it."""
        given = self.session.get_inputs()
        return {item.name: ORT_TYPES.get(item.type, item.type) for item in given}

    def identity(self) -> str:
        """The fingerprint of the base."""
        if self.manifest is not None:
            return self.manifest.fingerprint
        from onnx_adapt.model.file import Model, open_model
        from onnx_adapt.model.fingerprint import fingerprint

        given = self._given
        return fingerprint(given if isinstance(given, Model) else open_model(given))

    def slots(self) -> tuple[Manifest, Replaceable]:
        """The slots and weights that can be fed.

        Raises:
            SlotError: If there are none, or another tool took their inputs away.
        """
        if self._slots is None:
            replaceable = self.session.get_overridable_initializers()
            required = [i for i in self.session.get_inputs() if i.name in self.neutral]
            declared = {item.name: item for item in (*replaceable, *required)}
            self._slots = _swappable(self.manifest, declared, self.inputs, self.label)
        return self._slots


_LOOSE = (list, tuple, bool, int, float)
"""What becomes an array of the type that an input asks for."""


def checked_feeds(feeds: Mapping[str, Any], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Feeds as ONNX Runtime takes them: numbers and lists of them as arrays.

    Args:
        feeds: Arrays by input name.
        inputs: The inputs as ONNX Runtime describes them, by name.

    Raises:
        ArgumentError: If they are no mapping, or a list is no array of the input's type.
    """
    if not isinstance(feeds, Mapping):
        raise ArgumentError(
            f"the feeds are of type {type(feeds).__name__}, not a mapping",
            hint="give {input name: array} first; outputs= names what to compute, and comes "
            "last, unlike in ONNX Runtime",
        )
    loose = {name: value for name, value in feeds.items() if isinstance(value, _LOOSE)}
    arrays = {
        name: _array(name, value, inputs[name].type)
        for name, value in loose.items()
        if name in inputs and inputs[name].type.startswith("tensor(")
    }
    odd = {
        name: value.astype(value.dtype.newbyteorder("="))
        for name, value in feeds.items()
        if isinstance(value, np.ndarray) and not value.dtype.isnative
    }
    return {**feeds, **arrays, **odd} if arrays or odd else feeds


def _array(name: str, value: Any, kind: str) -> Array:
    """A number, or a list of them, as an array of ONNX Runtime's type of an input."""
    plain = kind.removeprefix("tensor(").removesuffix(")")
    dtype = DTYPES.get(ORT_TYPES.get(kind, ""), "object" if plain == "string" else plain)
    try:
        return np.asarray(value, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(
            f"input {name!r} is no array of {plain}: {error}",
            hint="give a numpy array, or lists of one length",
        ) from error


def _start(model: ModelLike, providers: Sequence[Any] | None, options: Any) -> tuple[str, Any]:
    """Start ONNX Runtime; returns the model's name for messages, and the session."""
    given: str | bytes
    if isinstance(model, str | os.PathLike):
        label, given = Path(model).name, os.fspath(model)
        if not Path(model).is_file():
            hint = "name the .onnx file in it" if Path(model).is_dir() else beside(Path(model))
            raise RunError(f"there is no model {given}", hint=hint)
    else:
        label, given, options = _in_memory(model, options)
    chosen = read_providers(providers)
    hint = "`onnx-adapt check` says whether a file that it needs is missing"
    try:
        with without_slot_warnings() as unwanted:
            session = start_session(given, options, chosen, label=label, hint=hint)
            metadata = session.get_modelmeta().custom_metadata_map
            unwanted.update(_weight_names(metadata.get(KEY)))
    except RunError as error:
        if found := recognised(_head(given), label):
            raise RunError(f"{label} is {found[0]}, no ONNX model", hint=found[1]) from error
        raise
    record = metadata.get(borrowed.KEY)
    if record and isinstance(given, str):
        borrowed.check_borrowed_files(Path(given).parent, record, label)
    return label, session


def _head(given: str | bytes) -> bytes:
    """The first bytes of a model that was given by its path or whole."""
    if isinstance(given, bytes):
        return given[:HEAD]
    with open(given, "rb") as file:
        return file.read(HEAD)


def _in_memory(model: ModelLike, options: Any) -> tuple[str, bytes, Any]:
    from onnx_adapt.model.given import as_model
    from onnx_adapt.model.runtime_bytes import model_bytes

    model = as_model(model)
    options = onnxruntime().SessionOptions() if options is None else options
    return model.label, model_bytes(model, options), options


def _weight_names(record: str | None) -> set[str]:
    """The names of slots' weights, of replaceable weights, and of their originals."""
    if not record:
        return set()
    manifest = manifest_from_text(record)
    names = {name for slot in manifest.slots for name in slot.inputs}
    kept = ((w.name, w.original, w.default) for w in manifest.weights)
    return names | {name for each in kept for name in each}


def base_values(model: ModelLike) -> Callable[[], dict[str, Array]]:
    """Make a function that reads the base's own values of replaceable weights.

    Raises:
        RunError: From that function, if the model file was replaced since.
    """
    path = Path(model).absolute() if isinstance(model, str | os.PathLike) else None
    stamp = stamp_of(path) if path else None

    def read() -> dict[str, Array]:
        from onnx_adapt.model.given import as_model
        from onnx_adapt.model.tensors import read_tensor

        if path and stamp_of(path) != stamp:
            raise RunError(
                f"{path} is another file than this session has loaded",
                hint="start a new session; a blend of trained heads needs the base's own",
            )
        opened = as_model(path or model)
        manifest = read_manifest(opened.proto)
        stored = {tensor.name: tensor for tensor in opened.proto.graph.initializer}
        return {
            weight.name: read_tensor(
                opened,
                stored[weight.default or (weight.original if weight.copied else weight.name)],
            )
            for weight in (manifest.weights if manifest else ())
        }

    return read


def _swappable(
    manifest: Manifest | None,
    declared: Mapping[str, Any],
    required: Collection[str],
    label: str,
) -> tuple[Manifest, Replaceable]:
    if manifest is None:
        raise SlotError(f"{label} has no slots", hint="`onnx-adapt insert` puts some into it")
    slots = tuple(slot for slot in manifest.slots if slot.swappable)
    weights = tuple(weight for weight in manifest.weights if weight.swappable)
    if not slots and not weights:
        raise SlotError(
            f"the slots of {label} are baked: their weights are constants",
            hint="insert without --baked to swap adapters",
        )
    names = [name for slot in slots for name in slot.inputs]
    for name in names + [weight.name for weight in weights]:
        if name in required:
            raise SlotError(
                f"input {name!r} of {label} has no default any more: it must be fed",
                hint="another tool took the initializer away; insert into the base again",
            )
        if name not in declared:
            raise SlotError(
                f"{label} is not swappable any more: input {name!r} was stripped from it",
                hint="simplifiers do this; run them on the base first, then insert",
            )
    replaceable = {
        weight.name: (tuple(item.shape), ORT_TYPES.get(item.type, item.type))
        for weight in weights
        if (item := declared[weight.name])
    }
    return replace(manifest, slots=slots, weights=weights), replaceable
