"""Insert slots at the places that the user names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner

from onnx_adapt.edit.graft import insert_slots, manifest_of
from onnx_adapt.edit.plan import Recipe, plan_slot
from onnx_adapt.errors import AmbiguousSiteError, ArgumentError, RunError, SiteError, SlotError
from onnx_adapt.graph.choice import Choice
from onnx_adapt.graph.finite import require_finite
from onnx_adapt.graph.fused_bias import bias_behind
from onnx_adapt.graph.names import free_name, reserved_names
from onnx_adapt.graph.resolve import fused_places, resolve
from onnx_adapt.graph.site import Site
from onnx_adapt.graph.sites import Survey, survey_model
from onnx_adapt.graph.written_out import unfuse
from onnx_adapt.model.file import Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.slot.form import Form
from onnx_adapt.slot.listing import Slots
from onnx_adapt.slot.manifest import Slot, read_manifest
from onnx_adapt.slot.parts import in_order
from onnx_adapt.slot.places import can_share, further_place, owners, refuse_stacking
from onnx_adapt.slot.weights import fresh_weights, neutral_weights

BAKED_BOTTLENECK = 64
"""Bottleneck of a baked slot when none is given (Houlsby et al., 2019)."""

_log = logging.getLogger(__name__)


def insert(
    model: ModelLike,
    after: str | Site | Sequence[str | Site] = (),
    *,
    activation: str = "relu",
    bias: bool = False,
    parts: Sequence[str] = ("down", "up"),
    source: str = "",
    axis: int | None = None,
    norm: str = "",
    norm_after: str = "",
    bottleneck: int | None = None,
    baked: bool = False,
    batched: bool = False,
    seed: int = 0,
    inline_functions: bool = False,
    stack: bool = True,
) -> Model:
    """Insert an adapter slot after each named place.

    A swappable slot computes nothing until weights are fed: the model gives the base's
    outputs. A slot with a fixed bottleneck starts as the identity as well, with random
    `down` and zero `up`. The formula is in `onnx_adapt.slot.formula`.

    Args:
        model: The model; it is left as it was.
        after: Addresses, node names, tensors, module paths, globs, or sites of `find_sites`.
            A module that runs several times gets one slot, with one set of weights, after
            each of its calls. A site is the tensor at its address.
        activation: One of `onnx_adapt.slot.activations.ACTIVATIONS`.
        bias: Add `down_bias` and `up_bias` to the parts.
        parts: The weights each slot has; see `onnx_adapt.slot.parts.PARTS`.
        source: A tensor for the adapter to read in place of the target.
        axis: The feature axis of every place, and of the source: -1 for the last one, or
            1 for channels. By default the one that the operators around a place tell.
        norm: A normalisation of the base, by name, re-applied to the source.
        norm_after: Let the slot's own normalisation wrap the `term` or the `sum`.
        bottleneck: Inner size; by default each adapter brings its own, and a baked slot
            has 64.
        baked: Make the weights constants.
        batched: Let one run give each row of a batch another adapter.
        seed: Seed of the random `down`.
        inline_functions: Inline the model's functions first, to reach inside them.
        stack: Insert behind slots that are at a place already; if not, that is refused.

    Raises:
        SiteError: If a name means nothing, several places, or a place that cannot take
            an adapter or has a slot.
        SlotError: If the slot itself makes no sense.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> adapted = oa.insert(base, after="mos_estimator_small_1/dense_3/MatMul_add")
        >>> [slot.width for slot in oa.list_slots(adapted)]
        [64]
    """
    if bottleneck is not None and bottleneck < 1:
        raise SlotError(
            f"a bottleneck of {bottleneck} is not possible", hint="give 1 or more, e.g. 64"
        )
    if seed < 0:
        raise SlotError(f"a seed of {seed} is not possible", hint="give 0 or more")
    if isinstance(parts, str):
        parts = (parts,)
    extra = ("down_bias", "up_bias") if bias else ()
    form = Form(
        parts=in_order({*parts, *extra}),
        activation=activation,
        norm_after=norm_after,
        swappable=not baked,
        bottleneck=bottleneck or (BAKED_BOTTLENECK if baked else 0),
        batched=batched,
    )
    recipe = Recipe(form, source=source, axis=axis, norm=norm, seed=seed)
    names = _names(after)
    return _insert(as_model(model), names, recipe, inline=inline_functions, stack=stack)


def _names(after: object) -> list[str]:
    """The places that a caller means, by name.

    Raises:
        SiteError: If there are none.
        ArgumentError: If one is neither a name nor a site.
    """
    given = [after] if isinstance(after, str | Site) else after
    if not isinstance(given, Iterable):
        raise _no_place(given)
    names: list[str] = []
    for item in given:
        if not isinstance(item, str | Site):
            raise _no_place(item)
        names.append(item.address if isinstance(item, Site) else item)
    if not names:
        raise SiteError(
            "no place was named", hint="give --after PLACE; `onnx-adapt sites` lists them"
        )
    return names


def _no_place(given: object) -> ArgumentError:
    return ArgumentError(
        f"{type(given).__name__} is no place in a model",
        hint="give names or sites after the model, such as insert(model, after='*.dense')",
    )


def _insert(
    model: Model, names: list[str], recipe: Recipe, *, inline: bool, stack: bool
) -> Model:
    known = manifest_of(model, inlined=inline and bool(model.proto.functions))
    result = inline_model(model) if inline else model.copy()
    survey = survey_model(result)
    if known.inlined:
        names = [_inlined_name(survey, name) for name in names]
    if places := fused_places(survey, names):
        result, unfused = unfuse(result, places, known.slots, known.unfused)
        known = replace(known, unfused=unfused)
        survey = survey_model(result)
    resolution = resolve(survey, names, axis=recipe.axis)
    _tell_skipped(resolution.skipped)
    taken = reserved_names(survey.index)
    slots: list[Slot] = []
    for choice in resolution.choices:
        _tell_bias(survey, choice)
        slots += _plan_places(survey, choice, recipe, taken)
    if not stack:
        refuse_stacking(known.slots, slots)
    rng = np.random.default_rng(recipe.seed)
    weights = {
        slot.name: fresh_weights(slot, slot.bottleneck, rng)
        if slot.bottleneck
        else neutral_weights(slot)
        for slot in owners(slots)
    }
    return insert_slots(result, survey.index, known, slots, weights)


def _tell_skipped(skipped: Sequence[Site]) -> None:
    """Say what was left out, once for each reason."""
    reasons: dict[str, list[str]] = {}
    for site in skipped:
        reasons.setdefault(str(site.reason), []).append(site.address)
    for reason, addresses in reasons.items():
        more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
        _log.warning("left out %s%s: %s", addresses[0], more, reason)


def _tell_bias(survey: Survey, choice: Choice) -> None:
    """Say so if a tensor that the user names is a layer's product before its bias."""
    site = choice.site
    view = survey.index.views[site.graph]
    behind = bias_behind(survey.index, view, site.tensor, site.width)
    if choice.literal and behind is not None:
        _log.warning("%s: the slot is on the product; %s", site.address, behind)


def _plan_places(
    survey: Survey, choice: Choice, recipe: Recipe, taken: set[str]
) -> Iterator[Slot]:
    """Plan the slot of a choice at each of its places, with names that are not taken yet."""
    name = free_name(choice.name, taken)
    owner: Slot | None = None
    for site in (choice.site, *choice.further):
        _tell_axis(survey, site)
        slot = plan_slot(survey, replace(choice, site=site), name, recipe)
        if owner is None:
            owner = slot
        elif can_share(owner, slot):
            slot = further_place(slot, owner, taken)
        else:
            raise SiteError(
                f"one slot cannot be after all calls of module {choice.name!r}: it is "
                f"{owner.width} wide at {owner.tensor!r} and {slot.width} at {slot.tensor!r}",
                hint="name each call by its address, with one --after each",
            )
        taken.add(slot.name)
        yield slot


def _tell_axis(survey: Survey, site: Site) -> None:
    """Warn if the operators around a site suggest another axis than the user named."""
    told = survey.at(site.address) or site
    if told.axis not in (None, site.axis):
        _log.warning(
            "%s: the slot is on axis %s as you say; the operators around it say %s",
            *(site.address, site.axis, told.axis),
        )


def _inlined_name(survey: Survey, name: str) -> str:
    """Find what a name inside a function has become: ONNX's inliner adds `__1`, `__2`, ..."""
    nodes = [node.name for view in survey.index.views.values() for node in view.nodes]
    tensors = [tensor for view in survey.index.views.values() for tensor in view.producers]
    for names in (nodes, tensors):
        if name in names:
            return name
        found = [n for n in names if re.fullmatch(re.escape(name) + r"(__\d+)+", n)]
        if len(found) > 1:
            raise AmbiguousSiteError(
                f"after inlining {name!r} is in the model {len(found)} times: "
                f"{', '.join(found[:8])}",
                hint="name each of them, or use a glob",
            )
        if found:
            return found[0]
    return name


def inline_model(model: Model) -> Model:
    """Inline the model-local functions of a model.

    Raises:
        RunError: If ONNX cannot inline them.
        ModelFileError: If inlining would never end, or give too many nodes.
    """
    require_finite(model)
    try:
        proto = onnx.inliner.inline_local_functions(model.proto)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the functions of {model.label} cannot be inlined: {error}",
            hint="export it without functions: torch.onnx.export(..., dynamo=False)",
        ) from error
    return replace(model, proto=proto)


def list_slots(model: ModelLike) -> Slots:
    """List the slots of a model, in order of insertion.

    A slot that sits at several places with one set of weights is listed once, as it is at its
    first place.

    Raises:
        ManifestError: If the manifest is damaged or too new.

    Example:
        >>> import onnx_adapt as oa
        >>> oa.list_slots(oa.open_model("models/dnsmos-p808.onnx"))
        ()
    """
    model = as_model(model)
    everywhere = all_places(model)
    return Slots(owners(everywhere), everywhere)


def all_places(model: Model) -> tuple[Slot, ...]:
    """List the slots of a model, each once for each of its places.

    Raises:
        ManifestError: If the manifest is damaged or too new.
    """
    manifest = read_manifest(model.proto)
    return manifest.slots if manifest else ()
