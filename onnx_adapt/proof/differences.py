"""What differs between two models, or between two adapters, slot by slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_adapt.adapter.data import Adapter, same_base
from onnx_adapt.adapter.fitting import require_fit
from onnx_adapt.adapter.updates import measure_loss
from onnx_adapt.edit.fill import extract
from onnx_adapt.edit.insert import list_slots
from onnx_adapt.edit.remove import remove
from onnx_adapt.errors import AdapterError
from onnx_adapt.model.file import Model
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.ort import CPU
from onnx_adapt.proof.compare import distance
from onnx_adapt.proof.compared import compare, movements, one_by_one, require_comparable
from onnx_adapt.proof.inputs import Inputs, inputs_for
from onnx_adapt.proof.runner import Runner
from onnx_adapt.slot.manifest import Slot


@dataclass(frozen=True, slots=True)
class SlotDifference:
    """One slot, in the first and in the second.

    Attributes:
        slot: Its name.
        first: What it is like in the first: bottleneck, activation, parts; '' if it lacks it.
        second: The same of the second.
        apart: How far the second's weights are from the first's, relative to these: of LoRA
            how far the products are apart; None if that cannot be told.
        first_moves: How far the first's weights alone move the outputs; None if not measured.
        second_moves: The same of the second's.
    """

    slot: str
    first: str
    second: str
    apart: float | None = None
    first_moves: float | None = None
    second_moves: float | None = None

    @property
    def same(self) -> bool:
        """Whether nothing is known to differ."""
        return self.first == self.second and not self.apart


@dataclass(frozen=True, slots=True)
class Differences:
    """What differs between two models or two adapters.

    Attributes:
        same_base: Whether both are for one base; None if an adapter does not say.
        slots: The slots of either.
        outputs: How far the outputs are apart, relative to the largest; None if not measured.
    """

    same_base: bool | None
    slots: tuple[SlotDifference, ...]
    outputs: float | None = None


def diff_models(
    one: Model, other: Model, inputs: Inputs | Sequence[Inputs] | None = None
) -> Differences:
    """Compare the slots of two models, the weights in them, and their outputs.

    Raises:
        AdaptError: If inputs do not fit, or a base does not run here.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> found = diff_models(base, oa.insert(base, after="conv2d_5"))
        >>> found.same_base, found.outputs, [slot.second for slot in found.slots]
        (True, 0.0, ['any relu down up'])
    """
    slots = [{slot.name: slot for slot in list_slots(model)} for model in (one, other)]
    bases = [remove(m) if own else m for m, own in zip((one, other), slots, strict=True)]
    same = fingerprint(bases[0]) == fingerprint(bases[1])
    first, second = _kept(one), _kept(other)
    apart = _apart(first, second) if first and second else {}
    rows = [
        SlotDifference(
            name,
            _form(slots[0].get(name), first),
            _form(slots[1].get(name), second),
            apart.get(name),
        )
        for name in dict.fromkeys((*slots[0], *slots[1]))
    ]
    outputs = None
    if same:
        feeds = inputs_for(bases[0], inputs)
        runs = [[Runner(m, CPU, optimised=True).run(f) for f in feeds] for m in (one, other)]
        outputs = distance(*runs)
    return Differences(same, tuple(rows), outputs)


def diff_adapters(
    one: Adapter,
    other: Adapter,
    model: Model | None = None,
    inputs: Inputs | Sequence[Inputs] | None = None,
) -> Differences:
    """Compare the weights of two adapters, and with a model what they do to its outputs.

    Raises:
        AdapterError: If an adapter does not fit the model, or holds NaN.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> def adapter(value):
        ...     fc = {"down": np.ones((8, 2)), "up": np.full((2, 8), value)}
        ...     return oa.Adapter("fr", {"fc": fc}, activations={"fc": "identity"})
        >>> round(diff_adapters(adapter(1.0), adapter(1.5)).slots[0].apart, 6)
        0.5
    """
    known = [[a.fingerprint, *a.other_bases] for a in (one, other)]
    pairs = [(a, b) for a in known[0] for b in known[1] if a and b]
    same = any(same_base(*pair) for pair in pairs) if pairs else None
    moved: list[dict[str, float]] = [{}, {}]
    outputs = None
    if model is not None:
        require_fit(model, one)
        require_comparable(model, other)
        feeds = inputs_for(remove(model), inputs)
        measured = compare(model, one, other, feeds, CPU, made_up=inputs is None)
        few = one_by_one(feeds, made_up=inputs is None)
        moved = [movements(model, one.weights, few, CPU), measured.moved]
        outputs = measured.apart
    apart = _apart(one, other)
    rows = [
        SlotDifference(
            name,
            _shapes(one.weights.get(name, {})),
            _shapes(other.weights.get(name, {})),
            apart.get(name),
            *(found.get(name) for found in moved),
        )
        for name in dict.fromkeys((*one.weights, *other.weights))
    ]
    return Differences(same, tuple(rows), outputs)


def _form(slot: Slot | None, kept: Adapter | None) -> str:
    """What a slot of a model is like, in words."""
    if slot is None:
        return ""
    words = slot.bottleneck or "any", slot.activation, *slot.parts
    return " ".join(map(str, (*words, *(["(filled)"] if kept else []))))


def _kept(model: Model) -> Adapter | None:
    """The adapter that is in a model, if its slots are not empty."""
    try:
        return extract(model) if list_slots(model) else None
    except AdapterError:
        return None


def _apart(one: Adapter, other: Adapter) -> dict[str, float | None]:
    """How far the weights of each common slot are apart; None where that cannot be told.

    Raises:
        AdapterError: If one holds NaN or infinity: nothing is apart from that.
    """
    for adapter in (one, other):
        for name, value in adapter.feeds().items():
            if not np.isfinite(np.asarray(value, np.float64)).all():
                raise AdapterError(
                    f"{name!r} of adapter {adapter.name!r} holds NaN or infinity",
                    hint="the training diverged; use an earlier checkpoint",
                )
    found: dict[str, float | None] = {}
    for slot in one.weights.keys() & other.weights.keys():
        try:
            found[slot] = measure_loss(_only(one, slot), _only(other, slot))[slot]
        except AdapterError:
            found[slot] = None
    return found


def _only(adapter: Adapter, slot: str) -> Adapter:
    stacks = {name: size for name, size in adapter.stacks.items() if name == slot}
    own = {slot: adapter.weights[slot]}
    return Adapter(adapter.name, own, activations=adapter.activations, stacks=stacks)


def _shapes(parts: Any) -> str:
    return " ".join(f"{part}{list(value.shape)}" for part, value in parts.items())
