"""Prove an adapted model against its base, in ONNX Runtime and against the oracle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import require_fit
from onnx_adapt.edit.damage import foreign_readers
from onnx_adapt.edit.insert import inline_model, list_slots
from onnx_adapt.edit.ranges import with_base_ranges
from onnx_adapt.edit.remove import remove
from onnx_adapt.edit.weights import check_model_weights
from onnx_adapt.errors import RunError, SlotError
from onnx_adapt.graph.index import read_type
from onnx_adapt.model.file import Model, open_model
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.ort import runtime_version
from onnx_adapt.proof.checker import new_complaints
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.inputs import Inputs, base_runner, feeds_for
from onnx_adapt.proof.off_proof import OffProof
from onnx_adapt.proof.probe import Measurement, Probe, neutral_model
from onnx_adapt.proof.reach import feeds_with_rows, unreached_slots
from onnx_adapt.proof.result import Check, Report, Saturation, SlotResult
from onnx_adapt.proof.row_proof import check_rows
from onnx_adapt.proof.runner import Runner, Values
from onnx_adapt.proof.saturation import check_ranges, check_saturation
from onnx_adapt.slot.manifest import Manifest, Slot, read_manifest
from onnx_adapt.slot.names import node_name
from onnx_adapt.words import count

Stage = Callable[[str], None]
"""Told what is being done, before it is done."""


def verify(
    base: str | os.PathLike[str] | Model,
    adapted: str | os.PathLike[str] | Model,
    *,
    inputs: Inputs | Sequence[Inputs] | None = None,
    strict: bool = False,
    seed: int = 0,
    weights: bool = True,
    adapter: Adapter | None = None,
    stage: Stage | None = None,
) -> Report:
    """Prove that an adapted model is its base plus exactly its slots.

    Checked are the interface; the graph and weights but for the slots; the outputs with
    the slots off; every slot's output with random weights against the float64 formula; that
    the outputs move when a slot is on; of batched slots that each row of a batch gets its
    adapter; and that the ONNX checker has nothing new to say.

    Args:
        base: The base model or its path; slots that it has itself are taken out.
        adapted: The model with slots, or its path.
        inputs: An `.npz` file or arrays by name, or several; made up if not given.
        strict: Let a slot that moves nothing for these inputs fail the report.
        seed: Of the made-up inputs and weights.
        weights: Run the checks that turn slots on; without them only interface, graph, off
            and checker are checked.
        adapter: Check as well that this adapter's values fit the ranges that a quantised
            base was calibrated for. Without one, that of a filled or baked model is.
        stage: Told what is being done.

    Raises:
        AdapterError: If the adapter does not fit.
        AdaptError: If a model or input cannot be used at all; a mismatch is no error.
        UnprovableError: If the base does not run here, or without `weights` no slot is
            reached: then nothing is proven.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> adapted = oa.insert(base, after="mos_estimator_small_1/dense_4/MatMul_add")
        >>> oa.verify(base, adapted).passed
        True
    """
    if seed < 0:
        raise SlotError(f"a seed of {seed} is not possible", hint="give 0 or more")
    before = base if isinstance(base, Model) else open_model(base)
    after = adapted if isinstance(adapted, Model) else open_model(adapted)
    tell = stage or (lambda _: None)
    manifest = read_manifest(after.proto)
    if manifest is None:
        raise SlotError(f"{after.label} has no slots", hint="`onnx-adapt insert` adds some")
    check_model_weights(after.proto, manifest)
    if list_slots(before):
        before = remove(before)
    tell("comparing the interfaces")
    checks = [_interface(before.proto, after.proto, manifest), _graph(before, after, manifest)]
    shapes: tuple[dict[str, tuple[int, ...]], ...] = ()
    results: tuple[SlotResult, ...] = ()
    saturation: tuple[Saturation, ...] = ()
    if adapter is not None:
        require_fit(after, adapter)
    proof = _Proof(before, after, manifest, inputs, seed, tell)
    if checks[0].passed:
        tell("running the base")
        proof.run_base()
        shapes = tuple({k: _shape(v) for k, v in feeds.items()} for feeds in proof.feeds)
        checks.append(proof.off())
    if checks[0].passed and proof.runs:
        if not weights:
            left = unreached_slots(after, manifest.slots, proof.feeds)
            unseen = tuple(f"slot {name!r} is not reached with these inputs" for name in left)
            checks[-1] = replace(checks[-1], warnings=unseen)
        if manifest.widened:
            off, expected = neutral_model(after), (proof.expected[False], proof.expected[True])
            checks.append(check_ranges(off, manifest.slots, proof.feeds, expected))
        if any(slot.batched for slot in manifest.slots):
            checks.append(proof.rows())
        if weights and manifest.slots:
            on, effect, results = proof.on()
            checks += [on, effect]
        if weights or adapter is not None:
            tell("counting what saturates with the adapter on")
            fits, saturation = check_saturation(after, manifest.slots, adapter, proof.filled)
            checks += [fits] if fits else []
    tell("asking the ONNX checker")
    checks.append(_checker(before, after, manifest))
    label = "the result" if after.path == before.path else after.label
    return Report(
        before.label,
        label,
        tuple(checks),
        results,
        shapes,
        runtime_version(),
        strict,
        saturation,
    )


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an input; of a sequence or map how many items it has."""
    return (len(value),) if isinstance(value, list | dict) else np.shape(value)


def _interface(base: onnx.ModelProto, adapted: onnx.ModelProto, manifest: Manifest) -> Check:
    """The same inputs and outputs by name, type and shape, but for the slots' weights."""
    own = {name for slot in manifest.slots for name in slot.inputs}
    own |= {weight.name for weight in manifest.weights}
    sides = []
    for proto in (base, adapted):
        stored = {tensor.name for tensor in proto.graph.initializer} if own else set()
        ins = [v for v in proto.graph.input if v.name not in own | stored]
        sides.append({"input": ins, "output": list(proto.graph.output)})
    wrong = []
    for kind in ("input", "output"):
        theirs, ours = (
            {v.name: (read_type(v), v.type.SerializeToString()) for v in side[kind]}
            for side in sides
        )
        wrong += [f"{kind} {name!r} is gone" for name in theirs if name not in ours]
        wrong += [f"{kind} {name!r} is new" for name in ours if name not in theirs]
        wrong += [
            f"{kind} {name!r} was {theirs[name][0]} and is {ours[name][0]}"
            for name in theirs
            if name in ours and theirs[name][1] != ours[name][1]
        ]
    both = " and ".join(count(len(sides[0][kind]), kind) for kind in sides[0])
    return Check("interface", not wrong, "; ".join(wrong) or f"the same: {both}")


def _graph(base: Model, adapted: Model, manifest: Manifest) -> Check:
    """Without its slots the adapted model is the base, wherever these inputs may lead."""
    if manifest.inlined and base.proto.functions:
        base = inline_model(base)
    if foreign := foreign_readers(adapted.proto, manifest.slots):
        return Check("graph", False, foreign[0])
    same = fingerprint(remove(adapted)) == fingerprint(base)
    what = "the base" if same else "another model"
    return Check("graph", same, f"without its slots it is {what}")


@dataclass(slots=True)
class _Proof:
    """The runs of one verification.

    Attributes:
        filled: The inputs without those that are an empty batch, which slots see nothing of.
        runs: Whether the adapted model runs at all; known once `off` has been checked.
    """

    base: Model
    adapted: Model
    manifest: Manifest
    given: Inputs | Sequence[Inputs] | None
    seed: int
    tell: Stage
    feeds: list[Feeds] = field(default_factory=list)
    expected: dict[bool, list[Values]] = field(default_factory=dict)
    filled: list[Feeds] = field(default_factory=list)
    runs: bool = True

    def run_base(self) -> None:
        """Run the base at both levels; where no inputs are given, find some that run.

        Raises:
            UnprovableError: If the base does not run here at all, or all inputs are empty.
        """
        runner = base_runner(self.base)
        self.feeds = feeds_for(self.base, runner, self.given, self.seed)
        self.filled = feeds_with_rows(self.base, self.feeds)
        self.expected[True] = [runner.run(feeds) for feeds in self.feeds]
        del runner
        plain = Runner(self.base, optimised=False)
        self.expected[False] = [plain.run(feeds) for feeds in self.feeds]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of the adapted model."""
        return self.manifest.slots

    def off(self) -> Check:
        """With the slots off the outputs are the base's."""
        model = with_base_ranges(neutral_model(self.adapted))
        try:
            return self._off_proof().check(model)
        except RunError as error:
            # The base ran with these inputs, so this is what the slots did.
            self.runs = False
            return Check("off", False, self._with_slot(error.message))

    def rows(self) -> Check:
        """Each row of a batch gets the adapter that is meant for it."""
        self.tell("running rows with adapters of their own")
        batched = [slot for slot in self.slots if slot.batched]
        model = neutral_model(self.adapted)
        return check_rows(model, batched, self.filled, self._off_proof().spread(), self.seed)

    def _off_proof(self) -> OffProof:
        inlined = self.manifest.inlined and self.base.proto.functions
        return OffProof(
            inline_model(self.base) if inlined else self.base,
            self.slots,
            self.manifest.weights,
            self.feeds,
            self.expected,
            self.seed,
            self.tell,
        )

    def on(self) -> tuple[Check, Check, tuple[SlotResult, ...]]:
        """Every slot's output is the oracle's, and the model's outputs move."""
        outputs = list(self.expected[True][0])
        self.tell("running with slots on")
        effects = {}
        try:
            probe = Probe(self.adapted, self.slots, outputs, self.seed)
            measured = probe.measure(self.filled)
            for number, slot in enumerate(self.slots, 1):
                self.tell(f"turning on slot {number} of {len(self.slots)}")
                effects[slot.name] = probe.effect(slot, self.filled)
        except RunError as error:
            # The base ran with these inputs, so this is what the slots did.
            detail = self._with_slot(error.message)
            return Check("on", False, detail), Check("effect", False, "not measured"), ()
        results = tuple(
            SlotResult(
                slot.name,
                seen.nearness.error if seen.nearness.judged else None,
                seen.nearness.bound if seen.nearness.judged else None,
                tuple(sorted(seen.bottlenecks)),
                effects[slot.name],
                seen.nearness.ratio if seen.nearness.judged else None,
            )
            for slot in self.slots
            for seen in (measured[slot.name],)
        )
        return _on_check(results, measured), _effect_check(results), results

    def _with_slot(self, message: str) -> str:
        """A message of ONNX Runtime with the slot whose node it names."""
        named = [s.name for s in self.slots if node_name(s.name, "") in message]
        return f"slot {named[0]!r}: {message}" if named else message


def _on_check(results: Sequence[SlotResult], measured: Mapping[str, Measurement]) -> Check:
    warnings, proven = [], []
    for result in results:
        seen = measured[result.name].nearness
        if not seen.judged:
            what = "reads no finite number" if seen.unjudged else "is not reached"
            warnings.append(f"slot {result.name!r} {what} with these inputs")
        elif seen.ratio <= 1 and not seen.shown:
            warnings.append(f"slot {result.name!r} changes nothing beyond rounding here")
        else:
            proven.append(result)
    # The negation lets a NaN fail.
    wrong = [r for r in proven if r.ratio is None or not r.ratio <= 1]
    if wrong:
        bad = wrong[0]
        detail = (
            f"slot {bad.name!r} is {bad.error:.1e} away from the formula, where rounding "
            f"explains {bad.tolerance:.1e}"
        )
    elif proven:
        worst = max(proven, key=lambda r: r.ratio or 0.0)
        sizes = sorted({size for r in proven for size in r.bottlenecks})
        detail = (
            f"{count(len(proven), 'slot')} within {worst.error:.1e} of the formula, "
            f"{worst.ratio:.0%} of what rounding explains"
        )
        detail += f"; bottlenecks {', '.join(map(str, sizes))}" if sizes else ""
    else:
        detail = "no slot is reached with these inputs"
    return Check("on", bool(proven) and not wrong, detail, tuple(warnings))


def _effect_check(results: Sequence[SlotResult]) -> Check:
    moving = [r for r in results if r.effect]
    still = [r.name for r in results if not r.effect]
    warnings = tuple(f"slot {name!r} moves no output for these inputs" for name in still)
    detail = f"{len(moving)} of {len(results)} slots move the outputs"
    return Check("effect", bool(moving), detail, warnings)


def _checker(base: Model, adapted: Model, manifest: Manifest) -> Check:
    """The checker and strict shape inference say nothing new."""
    if manifest.inlined and base.proto.functions:
        base = inline_model(base)
    new = new_complaints(base, adapted, manifest.slots)
    return Check("checker", not new, "; ".join(new[:4]) or "nothing new to report")
