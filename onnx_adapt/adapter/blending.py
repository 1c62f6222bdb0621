"""Blend several adapters into one, exactly and without a change to the graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnx_adapt.adapter.data import Adapter, same_base
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.slot.parts import PARTS, Blend, Part

_Parts = Mapping[str, Array]


def blend(
    adapters: Sequence[AdapterLike],
    weights: Sequence[float],
    *,
    name: str = "",
    base: Mapping[str, Array] | None = None,
) -> Adapter:
    """Blend adapters: in every slot `target + sum_i weight_i * (target'_i - target)`.

    The projections are concatenated along the bottleneck, `(width, r_1 + r_2 + ...)`, so
    the blend is exact, and the graph stays as it is. An adapter without weights for some
    slot leaves it off.

    Args:
        adapters: The adapters, of one base model.
        weights: How much of each; any finite numbers.
        name: What to call the blend; by default its recipe.
        base: The base's own values of the weights that adapters replace (trained heads).
            Not needed where the weights sum to 1.

    Raises:
        AdapterError: If a slot computes what cannot be blended (a gate, a normalisation of
            the term, an invertible coupling), or the adapters do not belong together.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> down, up = np.ones((8, 2), "float32"), np.ones((2, 8), "float32")
        >>> fr = oa.Adapter("fr", {"fc": {"down": down, "up": up}})
        >>> both = oa.blend([fr, fr], [0.7, 0.3])
        >>> both.name, both.weights["fc"]["down"].shape
        ('0.7*fr + 0.3*fr', (8, 4))
    """
    given = [as_adapter(adapter) for adapter in adapters]
    frame = blend_frame(given, weights, name=name, base=base)
    if list(weights) == [1]:
        return replace(frame, weights=given[0].weights)
    shares = list(zip(given, map(float, weights), strict=True))
    slots = dict.fromkeys(slot for adapter in given for slot in adapter.weights)
    mixed = {
        slot: blend_slot(slot, [(a.weights[slot], w) for a, w in shares if slot in a.weights])
        for slot in slots
    }
    return replace(frame, weights=mixed)


def blend_frame(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    name: str = "",
    base: Mapping[str, Array] | None = None,
) -> Adapter:
    """Blend all of several adapters but their slots: the arguments are those of `blend`.

    Raises:
        AdapterError: If the adapters do not belong together.
    """
    _refuse_misuse(adapters, weights)
    recipe = name or " + ".join(
        f"{weight:g}*{adapter.name}" for adapter, weight in zip(adapters, weights, strict=True)
    )
    if list(weights) == [1]:
        return replace(adapters[0], name=recipe, weights={}, extra={})
    activations: dict[str, str] = {}
    silent = {s for a in adapters for s in a.weights if s not in a.activations}
    for adapter in adapters:
        for slot, activation in adapter.activations.items():
            if activations.setdefault(slot, activation) != activation:
                raise AdapterError(
                    f"slot {slot!r} has the activation {activation} in adapter "
                    f"{adapter.name!r}, {activations[slot]} in another",
                    hint="adapters of one activation can be blended",
                )
    return Adapter(
        recipe,
        {},
        _blend_replaced(list(zip(adapters, map(float, weights), strict=True)), base),
        # One ingredient that tells nothing cannot be vouched for by the others.
        {slot: value for slot, value in activations.items() if slot not in silent},
        min((adapter.fingerprint for adapter in adapters), key=bool),
        _common_bases(adapters),
        stacks={slot: size for a in adapters for slot, size in a.stacks.items()},
        invocation_tokens=adapters[0].invocation_tokens,
    )


def _common_bases(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """The further models that all adapters are for."""
    sets = [set(adapter.other_bases) for adapter in adapters]
    return tuple(base for base in adapters[0].other_bases if all(base in s for s in sets))


def _refuse_misuse(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(
            f"{len(adapters)} adapters and {len(weights)} weights make no blend",
            hint="give one weight for each adapter",
        )
    refuse_odd_weights(weights)
    for adapter in adapters if list(weights) != [1] else ():
        if adapter.initial_state:
            raise AdapterError(
                f"adapter {adapter.name!r} is the first past of a decoder, which cannot be "
                "blended: attention is no sum over its tokens",
                hint="run it alone",
            )
    for adapter in adapters[1:]:
        if adapter.invocation_tokens != adapters[0].invocation_tokens:
            raise AdapterError(
                f"adapters {adapters[0].name!r} and {adapter.name!r} are on for different "
                "tokens: they have other invocation tokens",
                hint="blend adapters that are always on, or of the same invocation tokens",
            )
    known = [adapter for adapter in adapters if adapter.fingerprint]
    for adapter in known[1:]:
        if not same_base(adapter.fingerprint, known[0].fingerprint):
            raise AdapterError(
                f"adapters {known[0].name!r} and {adapter.name!r} are for different bases",
                hint="blend adapters of one base",
            )


def refuse_odd_weights(weights: Iterable[object]) -> None:
    """Refuse weights of a blend that are not finite numbers.

    Raises:
        AdapterError: If one is not.
    """
    for weight in weights:
        number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
        try:
            finite = number and math.isfinite(weight)  # type: ignore[arg-type]
        except (OverflowError, TypeError):  # 10**400, a complex number
            finite = False
        if not finite:
            raise AdapterError(
                f"{weight!r} is no weight of a blend", hint="give a finite number, such as 0.7"
            )


def blend_slot(slot: str, shares: Sequence[tuple[_Parts, float]]) -> dict[str, Array]:
    """Blend several adapters' weights for one slot.

    Raises:
        AdapterError: If they cannot be blended.
    """
    first = shares[0][0]
    for parts, _ in shares:
        if set(parts) != set(first):
            raise AdapterError(
                f"slot {slot!r} has the parts {', '.join(first)} in one adapter and "
                f"{', '.join(parts)} in another",
                hint="run one at a time, or convert both for a model with the slots of both",
            )
    rows = {part: _row(slot, part) for part in first}
    if closed := [row.closed for row in rows.values() if row.closed]:
        raise AdapterError(
            f"slot {slot!r} cannot be blended: it has {closed[0]}, so its term is no sum over "
            "the bottleneck",
            hint="use one adapter at a time, with weight 1",
        )
    rules = {row.blend for row in rows.values()}
    as_they_are = set() if Blend.SHARED in rules else {Blend.BESIDE}
    if Blend.FOLDED not in rules and all(weight == 1 for _, weight in shares):
        as_they_are.add(Blend.SCALED_BESIDE)
    beside = {part for part, row in rows.items() if row.blend in as_they_are}
    wide = [
        (
            {p: v if p in beside else np.asarray(v, np.float64) for p, v in parts.items()},
            weight,
        )
        for parts, weight in shares
    ]
    if Blend.SHARED in rules:
        wide = _fold_norms(slot, wide)
    return {
        part: _narrowed(f"{part} of slot {slot!r}", blend_part(part, wide), value.dtype)
        for part, value in first.items()
    }


def _narrowed(label: str, value: Array, dtype: np.dtype[Any]) -> Array:
    """Round a part of a blend to the element type of the adapters."""
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(value, dtype)
    if not np.isfinite(result).all():
        raise AdapterError(
            f"{label} passes what {dtype} holds, or is NaN or infinity already",
            hint="blend with smaller weights",
        )
    return result


def _row(slot: str, part: str) -> Part:
    """Return the row of a part in the table.

    Raises:
        AdapterError: If the part is unknown, so that no rule tells how to blend it.
    """
    if part not in PARTS:
        raise AdapterError(
            f"slot {slot!r} cannot be blended: its part {part!r} is unknown",
            hint=f"known: {', '.join(PARTS)}",
        )
    return PARTS[part]


def blend_part(part: str, shares: Sequence[tuple[dict[str, Array], float]]) -> Array:
    """Blend one part by the rule in its row of the table.

    Values are in float64, except for parts that are only laid side by side.
    """
    first, rule = shares[0][0][part], PARTS[part].blend
    if rule is Blend.BESIDE:
        values = [share[part] for share, _ in shares]
        return np.concatenate(values, _bottleneck_axis(part, first))
    if rule is Blend.SCALED_BESIDE:
        values = [_scaled(share, part, weight) for share, weight in shares]
        return np.concatenate(values, _bottleneck_axis(part, first))
    if rule is Blend.FOLDED:
        return np.ones_like(first)
    if rule is Blend.SHARED:
        return first
    if rule is Blend.FACTOR:
        terms = [1 + 0 * first, *((share[part] - 1) * weight for share, weight in shares)]
    elif rule is Blend.SUM:
        terms = [share[part] * weight for share, weight in shares]
    else:
        assert rule is Blend.SCALED_SUM
        terms = [_scaled(share, part, weight) for share, weight in shares]
    return np.asarray(np.sum(terms, axis=0))


def _bottleneck_axis(part: str, value: Array) -> int:
    """The axis along which values of a part are laid side by side."""
    row = PARTS[part]
    axis = row.bottleneck_axis(channels=value.ndim > len(row.shape))
    assert axis is not None
    return axis


def _scaled(share: Mapping[str, Array], part: str, weight: float) -> Array:
    """Multiply a part by its adapter's gain and weight; it is not copied if both are 1."""
    gain = _gain(share, part)
    return (
        share[part]
        if gain is None and weight == 1
        else share[part] * (weight if gain is None else gain * weight)
    )


def _gain(share: Mapping[str, Array], part: str) -> Array | None:
    """Return the gain in a shape that multiplies a part along its width, or None."""
    gains = [share[name] for name in share if PARTS[name].blend is Blend.FOLDED]
    if not gains:
        return None
    gain, value = np.asarray(math.prod(gains)).reshape(-1), share[part]
    return gain.reshape(-1, *(1,) * (value.ndim - 1)) if value.ndim > 2 else gain


def _fold_norms(
    slot: str, shares: Sequence[tuple[dict[str, Array], float]]
) -> list[tuple[dict[str, Array], float]]:
    """Give all adapters the same normalisation by moving their own into `down`.

    `(x * weight + bias) @ down = x @ (weight * down) + bias @ down`; the last term goes into
    `down_bias`, so a slot without one cannot be blended.
    """
    first = shares[0][0]
    shared = [part for part in first if PARTS[part].blend is Blend.SHARED]
    if all(np.array_equal(parts[p], first[p]) for parts, _ in shares for p in shared):
        return list(shares)
    others = set(shared) - {"norm_weight", "norm_bias"}
    if others or ("norm_bias" in first and "down_bias" not in first):
        raise AdapterError(
            f"slot {slot!r} cannot be blended: each adapter has a normalisation of its own",
            hint="use one adapter at a time",
        )
    folded = []
    for parts, weight in shares:
        plain = dict(parts)
        plain["down"] = parts["norm_weight"][:, None] * parts["down"]
        plain["norm_weight"] = np.ones_like(parts["norm_weight"])
        if "norm_bias" in parts:
            plain["down_bias"] = parts["down_bias"] + parts["norm_bias"] @ parts["down"]
            plain["norm_bias"] = np.zeros_like(parts["norm_bias"])
        folded.append((plain, weight))
    return folded


def _blend_replaced(
    shares: Sequence[tuple[Adapter, float]], base: Mapping[str, Array] | None
) -> dict[str, Array]:
    """Blend replaced weights of the base: `base + sum_i weight_i * (value_i - base)`."""
    blended: dict[str, Array] = {}
    for key in dict.fromkeys(key for adapter, _ in shares for key in adapter.replaced):
        given = [(a.replaced[key], weight) for a, weight in shares if key in a.replaced]
        value = np.sum([np.asarray(array, np.float64) * w for array, w in given], axis=0)
        rest = 1 - math.fsum(weight for _, weight in given)
        if abs(rest) > 1e-9:
            if base is None or key not in base:
                raise AdapterError(
                    f"adapters replace {key!r} of the base, and their weights do not sum to 1",
                    hint="give the base's own value: `merge --for MODEL`",
                )
            value = value + np.asarray(base[key], np.float64) * rest
        blended[key] = _narrowed(repr(key), value, given[0][0].dtype)
    return blended
