"""Whether a session can use an adapter: it fits the model, and what it lacks is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import (
    manifest_misfits,
    refuse_misfits,
    rows_of,
    warn_unchecked,
)
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.session.first_past import check_first_past
from onnx_adapt.session.loaded_model import LoadedModel
from onnx_adapt.session.ort_adapter import as_ort_value
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.weights import neutral_weights


def check_adapter(
    model: LoadedModel,
    adapter: Adapter,
    base_values: Callable[[], Mapping[str, Array]],
    allow_partial: bool,
    told: set[str] | None,
) -> dict[str, Any]:
    """Check that an adapter fits a model.

    Args:
        model: The model.
        adapter: The adapter.
        base_values: Reads the base's own values of replaceable weights.
        allow_partial: Whether it may be without weights for some slots.
        told: What was warned of before; None for no warnings.

    Returns:
        Weights by input name that keep the rest of the model off.

    Raises:
        AdapterError: If it does not fit.
    """
    check_first_past(model, adapter)
    if adapter.initial_state and not (adapter.feeds() or model.is_swappable):
        return {}
    manifest, replaceable = model.slots()
    partial = allow_partial or bool(adapter.initial_state)
    found = manifest_misfits(manifest, replaceable, adapter, allow_partial=partial)
    refuse_misfits(found, adapter, model.label)
    if rows_of(manifest, adapter):
        raise AdapterError(
            f"adapter {adapter.name!r} is packed for the rows of one batch",
            hint="load the adapters that it was made of, and give a list: adapter=[...]",
        )
    if told is not None:
        warn_unchecked(manifest, adapter, told)
    rest = {
        slot.weight(part): as_ort_value(array)
        for slot in owners(manifest.slots)
        if slot.name not in adapter.weights
        for part, array in neutral_weights(slot, slot.bottleneck).items()
    }
    filled = [w.name for w in manifest.weights if w.trained]
    missing = [name for name in filled if name not in adapter.replaced]
    own = base_values() if missing else {}
    return {**rest, **{name: as_ort_value(own[name]) for name in missing}}
