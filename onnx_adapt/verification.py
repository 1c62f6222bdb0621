"""Prove an adapted model against its base, in ONNX Runtime and against the oracle."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from onnx_adapt import walk
from onnx_adapt.adapter import Adapter
from onnx_adapt.errors import RunError, SlotError
from onnx_adapt.fingerprint import fingerprint
from onnx_adapt.fitting import require_fit
from onnx_adapt.graph.index import read_type
from onnx_adapt.initializers import check_model_weights
from onnx_adapt.manifest import Manifest, Slot, read_manifest
from onnx_adapt.model_file import Model, open_model
from onnx_adapt.ort import runtime_version
from onnx_adapt.printable import count
from onnx_adapt.proof.checker import new_complaints
from onnx_adapt.proof.compare import distance, in_words
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.inputs import Inputs, base_runner, feeds_for
from onnx_adapt.proof.probe import Probe, neutral_model
from onnx_adapt.proof.reach import unreached_slots
from onnx_adapt.proof.row_proof import check_rows
from onnx_adapt.proof.saturation import check_ranges, check_saturation
from onnx_adapt.report import Check, Report, Saturation, SlotResult
from onnx_adapt.rewrite import inline_model, list_slots, remove
from onnx_adapt.rewriting.damage import foreign_readers
from onnx_adapt.rewriting.ranges import with_base_ranges
from onnx_adapt.runtime import Runner, Values

Stage = Callable[[str], None]
"""Told what is being done, before it is done."""

_TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_QUANTISED = 5e-2
_RANDOM_OPS = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Bernoulli", "Multinomial", "Dropout"),
}
_QUANTISED_OPS = {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "QLinearMatMul"}


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
    if checks[0].passed:
        tell("running the base")
        opened = any(weight.swappable for weight in manifest.weights)
        proof = _Proof(before, after, manifest.slots, inputs, seed, tell, opened)
        proof.run_base()
        shapes = tuple({k: _shape(v) for k, v in feeds.items()} for feeds in proof.feeds)
        checks.append(proof.off())
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
            fits, saturation = check_saturation(after, manifest.slots, adapter, proof.feeds)
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
    """The runs of one verification."""

    base: Model
    adapted: Model
    slots: tuple[Slot, ...]
    given: Inputs | Sequence[Inputs] | None
    seed: int
    tell: Stage
    opened: bool
    feeds: list[Feeds] = field(default_factory=list)
    expected: dict[bool, list[Values]] = field(default_factory=dict)

    def run_base(self) -> None:
        """Run the base at both levels; where no inputs are given, find some that run.

        Raises:
            UnprovableError: If the base does not run here at all.
        """
        runner = base_runner(self.base)
        self.feeds = feeds_for(self.base, runner, self.given, self.seed)
        self.expected[True] = [runner.run(feeds) for feeds in self.feeds]
        del runner
        plain = Runner(self.base, optimised=False)
        self.expected[False] = [plain.run(feeds) for feeds in self.feeds]

    def off(self) -> Check:
        """With the slots off the outputs are the base's."""
        kind = self._kind()
        model = with_base_ranges(neutral_model(self.adapted))
        worst, seen = {}, {}
        for optimised in (False, True):
            self.tell(f"running with slots off, optimised {'fully' if optimised else 'not'}")
            runner = Runner(model, optimised=optimised)
            got = [
                runner.run(feeds, list(self.expected[optimised][0])) for feeds in self.feeds
            ]
            worst[optimised] = distance(self.expected[optimised], got)
            seen[optimised] = in_words(self.expected[optimised], got)
            del runner  # before the next one, so that the weights are in memory once
        limit = self._limit()
        # A weight that became an input is no constant to ONNX Runtime: other kernels run.
        exact = kind in ("float32", "float64") and not self.opened
        passed = worst[False] == 0 if exact else worst[False] <= limit
        passed = passed and worst[True] <= limit
        detail = (
            f"{kind}: unoptimised {seen[False]}{'' if exact else f' (up to {limit:.0e})'}, "
            f"optimised {seen[True]} (up to {limit:.0e})"
        )
        if not passed and (self._operators() & _RANDOM_OPS or self._base_wavers()):
            detail += "; the base itself gives different outputs each time"
        return Check("off", passed, detail)

    def rows(self) -> Check:
        """Each row of a batch gets the adapter that is meant for it."""
        self.tell("running rows with adapters of their own")
        batched = [slot for slot in self.slots if slot.batched]
        model = neutral_model(self.adapted)
        return check_rows(model, batched, self.feeds, self._limit(), self.seed)

    def _limit(self) -> float:
        kind = self._kind()
        return _QUANTISED if kind == "quantised" else _TOLERANCE[kind]

    def _kind(self) -> str:
        """What decides the tolerance: quantised, or the least precise element type."""
        if self._operators() & _QUANTISED_OPS:
            return "quantised"
        used = {slot.dtype for slot in self.slots} or {"float32"}
        return next(k for k in ("bfloat16", "float16", "float32", "float64") if k in used)

    def _operators(self) -> set[str]:
        graphs = (scope.graph for scope in walk.scopes(self.base.proto.graph))
        return {node.op_type for graph in graphs for node in graph.node}

    def _base_wavers(self) -> bool:
        again = Runner(self.base, optimised=False)
        return distance(self.expected[False], [again.run(feeds) for feeds in self.feeds]) > 0

    def on(self) -> tuple[Check, Check, tuple[SlotResult, ...]]:
        """Every slot's output is the oracle's, and the model's outputs move."""
        outputs = list(self.expected[True][0])
        self.tell("running with slots on")
        effects = {}
        try:
            probe = Probe(self.adapted, self.slots, outputs, self.seed)
            measured = probe.measure(self.feeds)
            for number, slot in enumerate(self.slots, 1):
                self.tell(f"turning on slot {number} of {len(self.slots)}")
                effects[slot.name] = probe.effect(slot, self.feeds)
        except RunError as error:
            # The base ran with these inputs, so this is what the slots did.
            detail = self._with_slot(error.message)
            return Check("on", False, detail), Check("effect", False, "not measured"), ()
        results = tuple(
            SlotResult(
                slot.name,
                measured[slot.name].error,
                probe.tolerance(slot),
                tuple(sorted(measured[slot.name].bottlenecks)),
                effects[slot.name],
            )
            for slot in self.slots
        )
        return _on_check(results), _effect_check(results), results

    def _with_slot(self, message: str) -> str:
        """A message of ONNX Runtime with the slot whose node it names."""
        named = [s.name for s in self.slots if f"adapter.{s.name}/" in message]
        return f"slot {named[0]!r}: {message}" if named else message


def _on_check(results: Sequence[SlotResult]) -> Check:
    reached = [r for r in results if r.error is not None]
    # The negation lets a NaN fail.
    wrong = [r for r in reached if not (r.error or 0.0) <= r.tolerance]
    unseen = [r.name for r in results if r.error is None]
    warnings = tuple(f"slot {name!r} is not reached with these inputs" for name in unseen)
    if wrong:
        bad = wrong[0]
        detail = f"slot {bad.name!r} is {bad.error:.1e} away from the formula"
    elif reached:
        worst = max(reached, key=lambda r: r.error or 0.0)
        sizes = sorted({size for r in reached for size in r.bottlenecks})
        detail = f"{count(len(reached), 'slot')} within {worst.error:.1e} of the formula"
        detail += f"; bottlenecks {', '.join(map(str, sizes))}" if sizes else ""
    else:
        detail = "no slot is reached with these inputs"
    return Check("on", bool(reached) and not wrong, detail, warnings)


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
