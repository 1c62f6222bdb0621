"""Prove an adapted model against its base, in ONNX Runtime and against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import for_file, require_fit, required_manifest
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.edit.insert import inline_model, list_slots
from onnx_adapt.edit.ranges import with_base_ranges
from onnx_adapt.edit.remove import remove, written_out_base
from onnx_adapt.edit.weights import check_model_weights
from onnx_adapt.errors import RunError, SlotError
from onnx_adapt.model.file import Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.ort import Providers, runtime_version
from onnx_adapt.proof.batched_rows import check_rows
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.inputs import Inputs, base_runner, runs_of_base
from onnx_adapt.proof.probe import Measurement, Probe, neutral_model
from onnx_adapt.proof.processor import processor_warning
from onnx_adapt.proof.reached_slots import feeds_with_rows, unreached_slots
from onnx_adapt.proof.result import Check, Report, Saturation, SlotResult
from onnx_adapt.proof.runner import ProviderArgument, Runner, Values, proof_providers
from onnx_adapt.proof.same_graph import check_checker, check_graph, check_interface
from onnx_adapt.proof.saturation import check_ranges, check_saturation
from onnx_adapt.proof.slots_off import OffProof
from onnx_adapt.slot.manifest import Manifest, Slot
from onnx_adapt.slot.names import node_name
from onnx_adapt.words import count

Stage = Callable[[str], None]
"""Told what is being done, before it is done."""


def verify(
    base: ModelLike,
    adapted: ModelLike,
    *,
    inputs: Inputs | Sequence[Inputs] | None = None,
    strict: bool = False,
    seed: int = 0,
    weights: bool = True,
    adapter: AdapterLike | None = None,
    provider: ProviderArgument = None,
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
        seed: The seed of the made-up inputs and weights.
        weights: Run the checks that turn slots on; without them only interface, graph, off
            and checker are checked.
        adapter: Check as well that this adapter's values fit the ranges that a quantised
            base was calibrated for. Without one, that of a filled or baked model is.
        provider: The execution provider to run both models on, such as `"cuda"` or
            `("cuda", {"device_id": 1})`, or several in order of preference; by default the
            CPU. On CUDA, TF32 is off unless an option `use_tf32` is given.
        stage: Called with what is being done, before it is done.

    Raises:
        AdapterError: If the adapter does not fit.
        AdaptError: If a model or input cannot be used at all; a mismatch is no error.
        RunError: If a provider is not there, or does not start.
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
    providers = proof_providers(provider)
    before, after = as_model(base), as_model(adapted)
    tell = stage or (lambda _: None)
    manifest = required_manifest(after)
    check_model_weights(after.proto, manifest)
    if list_slots(before):
        before = remove(before)
    own: Adapter | None = None
    if adapter is not None:
        adapter = as_adapter(adapter)
        require_fit(after, adapter)
        own = for_file(manifest, adapter)
    tell("comparing the interfaces")
    checks = [
        check_interface(before.proto, after.proto, manifest),
        check_graph(before, after, manifest),
    ]
    proof = _Proof(before, after, manifest, inputs, seed, tell, providers)
    if checks[0].passed:
        checks += proof.checks(own, weights=weights)
    tell("asking the ONNX checker")
    checks.append(check_checker(before, after, manifest))
    return Report(
        before.label,
        "the result" if after.path == before.path else after.label,
        tuple(checks),
        proof.results,
        tuple({k: _shape(v) for k, v in feeds.items()} for feeds in proof.feeds),
        runtime_version(),
        strict,
        proof.saturation,
        tuple(item.name for item in providers if proof.feeds),
    )


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an input; of a sequence or map how many items it has."""
    return (len(value),) if isinstance(value, list | dict) else np.shape(value)


@dataclass(slots=True)
class _Proof:
    """The runs of one verification.

    Attributes:
        filled: The inputs without those that are an empty batch, which slots see nothing of.
        runs: Whether the adapted model runs at all; known once `off` has been checked.
        warnings: What is to be said of the base on this processor.
    """

    base: Model
    adapted: Model
    manifest: Manifest
    given: Inputs | Sequence[Inputs] | None
    seed: int
    tell: Stage
    providers: Providers
    feeds: list[Feeds] = field(default_factory=list)
    expected: dict[bool, list[Values]] = field(default_factory=dict)
    filled: list[Feeds] = field(default_factory=list)
    runs: bool = True
    warnings: tuple[str, ...] = ()
    results: tuple[SlotResult, ...] = ()
    saturation: tuple[Saturation, ...] = ()

    def checks(self, adapter: Adapter | None, *, weights: bool) -> list[Check]:
        """Run both models, and keep what was measured of each slot.

        Args:
            adapter: The adapter that the ranges of a quantised base must hold, or None.
            weights: Whether to run the checks that turn slots on.

        Raises:
            UnprovableError: If the base does not run here, or nothing would be proven.
        """
        self._run_base()
        found = [self._written_out()] if self.manifest.unfused else []
        found.append(self._off(reached=weights))
        if not self.runs:
            return found
        if self.manifest.widened:
            off, expected = (
                neutral_model(self.adapted),
                (self.expected[False], self.expected[True]),
            )
            found.append(check_ranges(off, self.slots, self.feeds, expected, self.providers))
        if any(slot.batched for slot in self.slots):
            found.append(self._rows())
        if weights and self.slots:
            on, effect, self.results = self._on()
            found += [on, effect]
        if weights or adapter is not None:
            self.tell("counting what saturates with the adapter on")
            fits, self.saturation = check_saturation(
                self.adapted, self.slots, adapter, self.filled, self.providers
            )
            found += [fits] if fits else []
        return found

    def _run_base(self) -> None:
        """Run the base with and without optimisation, with inputs given or made up.

        Raises:
            UnprovableError: If the base does not run here at all, or all inputs are empty.
        """
        self.tell("running the base")
        runner = base_runner(self.base, self.providers)
        runs = runs_of_base(self.base, runner, self.given, self.seed)
        self.feeds = [feeds for feeds, _ in runs]
        self.filled = feeds_with_rows(self.base, self.feeds)
        self.expected[True] = [outputs for _, outputs in runs]
        exact = self.expected[True] if runner.exact else None
        del runner
        self.warnings = processor_warning(self.base, self.feeds, exact, self.providers)
        plain = Runner(self.base, self.providers, optimised=False)
        self.expected[False] = [plain.run(feeds) for feeds in self.feeds]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of the adapted model."""
        return self.manifest.slots

    def _off(self, *, reached: bool) -> Check:
        """With the slots off the outputs are the base's.

        Args:
            reached: Whether another check tells which slots are reached.
        """
        model = with_base_ranges(neutral_model(self.adapted))
        try:
            check = self._off_proof().check(model)
        except RunError as error:
            # The base ran with these inputs, so this is what the slots did.
            self.runs = False
            return Check("off", False, self._with_slot(error.message))
        check = replace(check, warnings=self.warnings)
        if reached:
            return check
        left = unreached_slots(self.adapted, self.slots, self.feeds, self.providers)
        unseen = tuple(f"slot {name!r} is not reached with these inputs" for name in left)
        return replace(check, warnings=(*self.warnings, *unseen))

    def _written_out(self) -> Check:
        """The base computes the same with its fused nodes written out.

        The slots are proven against the base that is written out from here on.
        """
        fused = self.base
        self.base = written_out_base(self.adapted)
        for optimised in self.expected:
            runner = Runner(self.base, self.providers, optimised=optimised)
            self.expected[optimised] = [runner.run(feeds) for feeds in self.feeds]
            del runner
        return self._off_proof().check_written_out(fused)

    def _rows(self) -> Check:
        """Each row of a batch gets the adapter that is meant for it."""
        self.tell("running rows with adapters of their own")
        batched = [slot for slot in self.slots if slot.batched]
        model = neutral_model(self.adapted)
        spread = self._off_proof().spread()
        return check_rows(model, batched, self.filled, spread, self.seed, self.providers)

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
            self.providers,
        )

    def _on(self) -> tuple[Check, Check, tuple[SlotResult, ...]]:
        """Every slot's output is the oracle's, and the model's outputs move."""
        outputs = list(self.expected[True][0])
        self.tell("running with slots on")
        try:
            probe = Probe(self.adapted, self.slots, outputs, self.seed, self.providers)
            measured = probe.measure(self.filled)
            effects = probe.effects(self.filled, measured, self.tell)
        except RunError as error:
            # The base ran with these inputs, so this is what the slots did.
            detail = self._with_slot(error.message)
            return Check("on", False, detail), Check("effect", False, "not measured"), ()
        results = tuple(
            _slot_result(slot, measured[slot.name], effects[slot.owner]) for slot in self.slots
        )
        return _on_check(results, measured), _effect_check(effects), results

    def _with_slot(self, message: str) -> str:
        """A message of ONNX Runtime with the slot whose node it names."""
        named = [s.name for s in self.slots if node_name(s.name, "") in message]
        return f"slot {named[0]!r}: {message}" if named else message


def _slot_result(slot: Slot, seen: Measurement, effect: float) -> SlotResult:
    """The result of one place, given the effect of its slot at all places."""
    found = seen.deviation
    return SlotResult(
        slot.name,
        found.error if found.judged else None,
        found.bound if found.judged else None,
        tuple(sorted(seen.bottlenecks)),
        effect if found.judged or found.unjudged else 0.0,
        found.ratio if found.judged else None,
        slot.shares,
    )


def _on_check(results: Sequence[SlotResult], measured: Mapping[str, Measurement]) -> Check:
    warnings, proven = [], []
    for result in results:
        seen = measured[result.name].deviation
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
            f"{_counted(proven)} within {worst.error:.1e} of the formula, "
            f"{worst.ratio:.0%} of what rounding explains"
        )
        detail += f"; bottlenecks {', '.join(map(str, sizes))}" if sizes else ""
    else:
        detail = "no slot is reached with these inputs"
    return Check("on", bool(proven) and not wrong, detail, tuple(warnings))


def _counted(results: Sequence[SlotResult]) -> str:
    """How many slots these are, and at how many places if that is more."""
    slots = {result.shares or result.name for result in results}
    where = f" at {len(results)} places" if len(results) > len(slots) else ""
    return f"{count(len(slots), 'slot')}{where}"


def _effect_check(effects: Mapping[str, float]) -> Check:
    moving = [name for name, effect in effects.items() if effect]
    still = [name for name, effect in effects.items() if not effect]
    warnings = tuple(f"slot {name!r} moves no output for these inputs" for name in still)
    detail = f"{len(moving)} of {len(effects)} slots move the outputs"
    return Check("effect", bool(moving), detail, warnings)
