"""Fill adapters into models, bake them in, and extract them again."""

from __future__ import annotations

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import (
    for_file,
    require_fit,
    required_manifest,
    warn_unchecked,
)
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.edit.base_weights import fill_base_weights
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.edit.weights import (
    bake_weights,
    check_model_weights,
    fill_weights,
    read_weights,
)
from onnx_adapt.errors import AdapterError
from onnx_adapt.model.file import Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.weights import is_empty, stacks_of


def fill(model: ModelLike, adapter: AdapterLike, *, allow_partial: bool = False) -> Model:
    """Make an adapter the default of a model's slots: it is on when nothing is fed.

    Args:
        model: A model with slots; it is left as it was.
        adapter: The adapter.
        allow_partial: Leave slots that the adapter has no weights for as they are.

    Raises:
        AdapterError: If the adapter does not fit, or the slots are batched.

    Warns:
        UncheckedWarning: If the adapter does not tell its base or its activations.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> model = oa.insert(base, after="mos_estimator_small_1/dense_4/MatMul_add")
        >>> (slot,) = oa.list_slots(model)
        >>> ones = {"down": np.ones((64, 4)), "up": np.ones((4, 64))}
        >>> filled = oa.fill(model, oa.make_adapter(model, "ones", {slot.name: ones}))
        >>> oa.extract(filled, name="ones").weights[slot.name]["up"].shape
        (4, 64)
    """
    model = as_model(model)
    adapter = as_adapter(adapter)
    check_model_weights(model.proto, required_manifest(model))
    _refuse_batched(model)
    if adapter.invocation_tokens:
        raise AdapterError(
            f"adapter {adapter.name!r} is on from its invocation tokens on (aLoRA): in the "
            "model it would be on for all tokens",
            hint="keep it in a file; AdapterSession feeds which tokens it is on for",
        )
    if adapter.initial_state:
        raise AdapterError(
            f"adapter {adapter.name!r} is the first past of a decoder, which is fed and is no "
            "weight of the model",
            hint="keep it in a file; AdapterSession feeds it",
        )
    require_fit(model, adapter, allow_partial=allow_partial)
    adapter = for_file(required_manifest(model), adapter)
    warn_unchecked(required_manifest(model), adapter, set())
    return fill_base_weights(fill_weights(model, adapter.weights), adapter.replaced)


def bake(model: ModelLike) -> Model:
    """Make the weights that a model's slots have constants: they are no longer inputs.

    Raises:
        AdapterError: If the slots are empty or batched.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> model = oa.insert(base, after="conv2d_5", bottleneck=8)
        >>> [value.name for value in oa.bake(model).proto.graph.input]
        ['input_1']
    """
    model = as_model(model)
    check_model_weights(model.proto, required_manifest(model))
    _refuse_batched(model)
    _refuse_empty(model)
    return bake_weights(model)


def extract(model: ModelLike, *, name: str = "") -> Adapter:
    """Extract the adapter that a model's slots have as their default; the inverse of `fill`.

    Args:
        model: A model with filled or baked slots.
        name: The adapter's name; by default the model's file name.

    Raises:
        AdapterError: If the slots are empty.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> model = oa.insert(base, after="conv2d_5", bottleneck=8)
        >>> oa.extract(model, name="fresh").weights["conv2d_5"]["down"].shape
        (8, 32, 1, 1)
    """
    model = as_model(model)
    manifest = required_manifest(model)
    check_model_weights(model.proto, manifest)
    _refuse_empty(model)
    model = with_defaults(model)
    manifest = required_manifest(model)
    stored = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    label = name or (model.path.stem if model.path else "adapter")
    return Adapter(
        label,
        read_weights(model, manifest.slots),
        {w.name: read_tensor(model, stored[w.name]) for w in manifest.weights},
        {slot.name: slot.activation for slot in owners(manifest.slots)},
        manifest.fingerprint,
        stacks=stacks_of(manifest.slots),
    )


def _refuse_batched(model: Model) -> None:
    """Refuse batched slots: a row without an adapter is the base, so they have no default."""
    if batched := [slot.name for slot in required_manifest(model).slots if slot.batched]:
        raise AdapterError(
            f"slot {batched[0]!r} of {model.label} is batched: its weights are fed, one "
            "adapter for each row",
            hint="insert without --batched to put an adapter into the model",
        )


def _refuse_empty(model: Model) -> None:
    manifest = required_manifest(model)
    stored = read_weights(model, manifest.slots)
    slots = owners(manifest.slots)
    empty = [slot.name for slot in slots if is_empty(slot, stored[slot.name])]
    if empty:
        raise AdapterError(
            f"slot {empty[0]!r} of {model.label} is empty",
            hint="fill it with an adapter first: `onnx-adapt fill MODEL FILE`",
        )
