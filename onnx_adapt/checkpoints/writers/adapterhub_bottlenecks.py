"""Write bottleneck and invertible adapters with AdapterHub's keys and settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import Bottleneck, Coupling, SlotEdit
from onnx_adapt.checkpoints.readers.adapterhub import ACTIVATIONS
from onnx_adapt.checkpoints.readers.adapterhub_places import bottleneck_place
from onnx_adapt.checkpoints.writers.adapterhub_models import ModelKind
from onnx_adapt.checkpoints.writers.wanted import refuse
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_OURS = ("down", "up", "down_bias", "up_bias", "norm_weight", "norm_bias", "gate", "gate_bias",
         "after_weight", "after_bias")  # fmt: skip
_NAMES = {name: key for key, name in reversed(ACTIVATIONS.items())}
_FLAGS = ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln")
_SITES = ("mh_adapter", "output_adapter", "cross_adapter")

Tensors = dict[str, Array]


def write_bottlenecks(
    items: Sequence[SlotEdit], kind: ModelKind, name: str
) -> tuple[Tensors, dict[str, Any], int]:
    """Write the bottlenecks and the invertible adapter of one adapter.

    Args:
        items: The slots.
        kind: The model.
        name: The adapter's name.

    Returns:
        The tensors, the settings, and the width of the model.

    Raises:
        CheckpointError: If the library has no place for one, or two have other settings.
    """
    bottlenecks = [(i, i.edit) for i in items if isinstance(i.edit, Bottleneck)]
    couplings = [(i, i.edit) for i in items if isinstance(i.edit, Coupling)]
    config = _common(bottlenecks, kind) if bottlenecks else _none()
    for item, coupling in couplings:
        activation = _activation(item, coupling.activation)
        if bottlenecks and activation != config["non_linearity"]:
            raise refuse(item, "its activation is another than that of the bottlenecks")
        config["non_linearity"] = activation
    tensors, width = _placed(bottlenecks, kind, name, config)
    for _, coupling in couplings:
        around = coupling.module.rpartition(".")[0]
        prefix = f"{around}." if around else ""
        prefix += f"invertible_adapters.{name}."
        tensors |= {prefix + key: value for key, value in _coupling(coupling)}
        half, size = coupling.parts["f_down"].shape
        config |= {"inv_adapter": "nice", "inv_adapter_reduction_factor": _factor(half, size)}
        width = 2 * half
    return tensors, config, width


def _placed(
    found: Sequence[tuple[SlotEdit, Bottleneck]],
    kind: ModelKind,
    name: str,
    config: dict[str, Any],
) -> tuple[Tensors, int]:
    """The tensors of all bottlenecks; where they are goes into the settings, in place."""
    sites: dict[int, dict[str, tuple[str, Bottleneck]]] = {}
    for item, edit in found:
        place, layer = kind.location(edit.module), kind.layer(edit.module)
        if place is None or layer is None:
            reason = f"AdapterHub has no bottleneck at {edit.module!r} of a {kind.name}"
            raise refuse(item, reason)
        sites.setdefault(layer, {})[place[1]] = place[0], edit
    on = [site for site in _SITES if any(site in there for there in sites.values())]
    tensors: Tensors = {}
    factors, width = {}, 0
    for layer, there in sites.items():
        _refuse_gap(layer, there, on)
        width = next(iter(there.values()))[1].parts["up"].shape[1]
        size = max(1, *(edit.parts["up"].shape[0] for _, edit in there.values()))
        factors[str(layer)] = _factor(width, size)
        for location, edit in there.values():
            prefix = f"{location}.adapters.{name}."
            tensors |= {prefix + key: value for key, value in _bottleneck(edit, size)}
    config |= {site: site in on for site in _SITES}
    config["leave_out"] = [i for i in range(kind.layers) if i not in sites]
    config |= _factors(factors)
    return tensors, width


def _refuse_gap(
    layer: int, there: Mapping[str, tuple[str, Bottleneck]], on: Sequence[str]
) -> None:
    """Refuse a layer that lacks one of two adapters which the settings switch on."""
    if len(there) < len(on):
        location, lacking = (
            next(iter(there.values()))[0],
            next(s for s in on if s not in there),
        )
        raise CheckpointError(
            f"layer {layer} has an adapter at {location!r} and none for {lacking}, which "
            "other layers have; AdapterHub has both or neither in a layer",
            hint="give the slot that is left off weights of zero",
        )


def _none() -> dict[str, Any]:
    """The settings of an adapter without bottlenecks."""
    return {**_settings(False, False, True, True), "non_linearity": "relu"}


def _settings(
    parallel: bool, before: bool, after: bool, residual: bool | str
) -> dict[str, Any]:
    flags = dict(zip(_FLAGS, (parallel, before, after, residual), strict=True))
    return {
        **flags,
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "init_weights": "bert",
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "leave_out": [],
        "ln_after": False,
        "ln_before": False,
        "phm_layer": False,
        "reduction_factor": 1,
        "scaling": 1.0,
        "use_gating": False,
    }


_RESIDUALS: tuple[bool | str, ...] = (True, False, "post_add")
_PRESETS: tuple[tuple[bool, bool, bool, bool | str], ...] = (
    *((False, True, True, True), (False, False, True, True), (True, False, True, True)),
    *product((False, True), (False, True), (False, True), _RESIDUALS),
)
"""Values of the flags: the library's presets SeqBn, DoubleSeqBn and ParBn, then all others."""


def _common(found: Sequence[tuple[SlotEdit, Bottleneck]], kind: ModelKind) -> dict[str, Any]:
    """The settings that all bottlenecks of an adapter have in common.

    Raises:
        CheckpointError: If two have others.
    """
    first, config = found[0][0], _form(*found[0], kind)
    for item, edit in found[1:]:
        other = _form(item, edit, kind)
        if differing := [key for key in config if config[key] != other[key]]:
            key = differing[0]
            raise CheckpointError(
                f"slot {first.slot!r} has {key}={config[key]!r} and slot {item.slot!r} has "
                f"{key}={other[key]!r}; an adapter of AdapterHub has one setting for all",
                hint="train them as two adapters, and stack these",
            )
    return config


def _form(item: SlotEdit, edit: Bottleneck, kind: ModelKind) -> dict[str, Any]:
    """The settings of one bottleneck."""
    extra = {part: value for part, value in edit.parts.items() if part not in _OURS}
    own = {
        "ln_before": "norm_weight" in edit.parts,
        "ln_after": bool(edit.norm_after),
        "adapter_residual_before_ln": edit.norm_after == "sum",
        "use_gating": "gate" in edit.parts,
        "non_linearity": _activation(item, edit.activation),
    }
    for flags in _PRESETS:
        config = _settings(*flags) | own
        try:
            place, reads, parts = bottleneck_place(
                config, edit.norm_after, post_ln=kind.post_ln
            )
        except CheckpointError:
            continue  # the library has no such adapter
        if (place, reads) == (edit.place, edit.reads) and _alike(extra, parts):
            return config
    raise refuse(item, "AdapterHub has no settings for where it sits and what it reads")


def _alike(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> bool:
    """Whether the parts for residuals have the values that the library's flags mean.

    Its `scale` of 1 stands for a target that is left out, which is 0 in a slot.
    """
    wanted = {part: 0 if part == "scale" else 1 for part in theirs}
    return ours.keys() == wanted.keys() and all(
        np.all(ours[part] == value) for part, value in wanted.items()
    )


def _activation(item: SlotEdit, name: str) -> str:
    if name not in _NAMES:
        raise refuse(item, f"AdapterHub has no activation {name!r}")
    return _NAMES[name]


def _factor(width: int, size: int) -> float:
    """The factor with which the library's `int(width // factor)` is the size."""
    factor = width / size
    while int(width // factor) < size:
        factor = float(np.nextafter(factor, 0))
    return int(factor) if factor == int(factor) else factor


def _factors(by_layer: Mapping[str, float]) -> dict[str, Any]:
    values = list(by_layer.values())
    if not values:
        return {"reduction_factor": 1}
    if len(set(values)) == 1:
        return {"reduction_factor": values[0]}
    return {"reduction_factor": {**by_layer, "default": values[0]}}


def _bottleneck(edit: Bottleneck, size: int) -> Iterator[tuple[str, Array]]:
    """The tensors of one bottleneck, with zeros for the units beyond its own."""
    parts = edit.parts
    more = size - parts["up"].shape[0]
    down = np.pad(parts["down"], [(0, 0), (0, more)])
    normed = "norm_weight" in parts
    if normed:  # the library lists the LayerNorm twice, as the first of adapter_down
        for place in ("adapter_norm_before", "adapter_down.0"):
            yield f"{place}.weight", parts["norm_weight"]
            yield f"{place}.bias", parts["norm_bias"]
    yield f"adapter_down.{int(normed)}.weight", down.T
    bias = np.pad(parts.get("down_bias", np.zeros(size - more)), (0, more))
    yield f"adapter_down.{int(normed)}.bias", bias
    yield "adapter_up.weight", np.pad(parts["up"], [(0, more), (0, 0)]).T
    yield "adapter_up.bias", parts.get("up_bias", np.zeros(parts["up"].shape[1]))
    if "gate" in parts:
        yield "gate.weight", parts["gate"].T
        yield "gate.bias", parts["gate_bias"]
    if edit.norm_after:
        yield "adapter_norm_after.weight", parts["after_weight"]
        yield "adapter_norm_after.bias", parts["after_bias"]


def _coupling(edit: Coupling) -> Iterator[tuple[str, Array]]:
    for part, key in (("f_down", "F.0"), ("f_up", "F.2"), ("g_down", "G.0"), ("g_up", "G.2")):
        yield f"{key}.weight", edit.parts[part].T
        yield f"{key}.bias", edit.parts[f"{part}_bias"]
