"""ONNX Runtime's session on a model with slots, and which of its weights can be fed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import RunError, SlotError
from onnx_adapt.fitting import Replaceable
from onnx_adapt.manifest import Manifest, OpenWeight
from onnx_adapt.ort import failures, onnxruntime, shortened, without_slot_warnings

if TYPE_CHECKING:
    from onnx_adapt.model_file import Model

_ELEM_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}


def start(
    model: str | os.PathLike[str] | Model, providers: Sequence[Any] | None, options: Any
) -> tuple[str, Any]:
    """Start ONNX Runtime on a model.

    Args:
        model: Its path, or the model in memory.
        providers: Execution providers; by default the CPU.
        options: Session options, or None.

    Returns:
        What to call the model, and the session.

    Raises:
        RunError: If ONNX Runtime refuses the model.
    """
    ort = onnxruntime()
    given: str | bytes
    if isinstance(model, str | os.PathLike):
        label, given = Path(model).name, os.fspath(model)
        if not Path(model).is_file():
            raise RunError(f"there is no model {given}", hint="check the path")
    else:
        from onnx_adapt.runtime import model_bytes

        label = model.label
        options = ort.SessionOptions() if options is None else options
        given = model_bytes(model, options)
    chosen = list(providers or ["CPUExecutionProvider"])
    try:
        with without_slot_warnings():
            return label, ort.InferenceSession(given, options, providers=chosen)
    except failures() as error:
        raise RunError(
            f"ONNX Runtime {ort.__version__} cannot load {label}: {shortened(error)}",
            hint="does the model run without adapters?",
        ) from error


def swappable(
    manifest: Manifest | None, session: Any, label: str
) -> tuple[Manifest, Replaceable]:
    """The slots and weights that can be fed.

    Raises:
        SlotError: If there are none, or another tool took their inputs away.
    """
    if manifest is None:
        raise SlotError(f"{label} has no slots", hint="`onnx-adapt insert` puts some into it")
    slots = tuple(slot for slot in manifest.slots if slot.swappable)
    weights = tuple(weight for weight in manifest.weights if weight.swappable)
    if not slots and not weights:
        raise SlotError(
            f"the slots of {label} are baked: their weights are constants",
            hint="insert without --baked to swap adapters",
        )
    declared = {item.name: item for item in session.get_overridable_initializers()}
    names = [name for slot in slots for name in slot.inputs]
    for name in names + [weight.name for weight in weights]:
        if name not in declared:
            raise SlotError(
                f"{label} is not swappable any more: input {name!r} was stripped from it",
                hint="simplifiers do this; run them on the base first, then insert",
            )
    replaceable = {
        weight.name: (tuple(item.shape), _ELEM_TYPES.get(item.type, item.type))
        for weight in weights
        if (item := declared[weight.name])
    }
    return replace(manifest, slots=slots, weights=weights), replaceable


def base_values(
    model: str | os.PathLike[str] | Model, weights: Sequence[OpenWeight]
) -> dict[str, Array]:
    """The base's own values of weights that adapters replace, out of the model."""
    from onnx_adapt.model_file import Model, open_model, read_tensor

    opened = model if isinstance(model, Model) else open_model(model)
    stored = {tensor.name: tensor for tensor in opened.proto.graph.initializer}
    return {
        weight.name: read_tensor(
            opened, stored[weight.original if weight.copied else weight.name]
        )
        for weight in weights
    }
