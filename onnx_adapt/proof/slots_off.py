"""The proof that a model with its slots off computes what its base does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from onnx_adapt.dtypes import ELEM_TYPES
from onnx_adapt.errors import RunError
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.ort import Providers
from onnx_adapt.proof.compare import distance, in_words
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.result import Check
from onnx_adapt.proof.roundings import beyond, is_finite_where, kept_apart, perturbed
from onnx_adapt.proof.runner import Runner, Values
from onnx_adapt.slot.base_changes import ReplaceableWeight
from onnx_adapt.slot.manifest import Slot

_SHAKES = 3
_RANDOM_OPS = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Bernoulli", "Multinomial", "Dropout"),
}
_QUANTISED_OPS = {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "QLinearMatMul"}
_HALVES = {ELEM_TYPES[name]: name for name in ("float16", "bfloat16")}


@dataclass(slots=True)
class OffProof:
    """The runs of a base and of a model with its slots off, which must agree.

    Without optimisation both models run the same kernels, and those of the slots add zero,
    so the outputs must be the same bit for bit. With optimisation they are the same too,
    unless a slot prevents ONNX Runtime from fusing nodes. Then the outputs must be those of
    the base with the same tensors kept apart, or lie among the outputs that the base gives
    when it is rounded differently (`roundings.py`).

    Two kinds of models round differently even without optimisation. float16 and bfloat16
    nodes run between casts, some of which ONNX Runtime removes. A weight that became an
    input, or that a slot is on, is no longer a constant, so other kernels read it.

    Attributes:
        base: The base, with its functions inlined if the adapted model's are.
        slots: The slots.
        weights: The weights of the base that adapters may replace.
        feeds: Inputs that the base runs with.
        expected: The base's outputs for them, by whether ONNX Runtime may optimise.
        seed: The seed of the random changes of weights.
        tell: Called with what is being done.
        providers: Where the models run.
    """

    base: Model
    slots: Sequence[Slot]
    weights: Sequence[ReplaceableWeight]
    feeds: Sequence[Feeds]
    expected: dict[bool, list[Values]]
    seed: int
    tell: Callable[[str], None]
    providers: Providers

    def check(self, model: Model) -> Check:
        """Compare the outputs of a model with its slots off with the base's.

        Raises:
            RunError: If the model does not run, with inputs that the base runs with.
        """
        found = {False: "", True: ""}
        passed = True
        for optimised in found:
            self.tell(f"running with slots off, optimised {'fully' if optimised else 'not'}")
            got = self._run(model, optimised)
            found[optimised] = in_words(self.expected[optimised], got)
            if distance(self.expected[optimised], got) > 0:
                allowed, why = self._explain(got, optimised)
                passed = passed and allowed
                found[optimised] += why
        plain, full = found[False], found[True]
        same = f"{plain}, unoptimised and optimised"
        apart = f"unoptimised {plain}; optimised {full}"
        return Check("off", passed, f"{self._kind()}: {same if plain == full else apart}")

    def check_written_out(self, base: Model) -> Check:
        """Compare the base as it was with one whose fused nodes are written out.

        Args:
            base: The base with its fused nodes; this proof is of the one without them.
        """
        self.tell("running the base with its fused nodes")
        fused = OffProof(base, (), (), self.feeds, {}, self.seed, self.tell, self.providers)
        names = list(self.expected[True][0])
        for optimised in self.expected:
            runner = Runner(base, self.providers, optimised=optimised)
            fused.expected[optimised] = [runner.run(feeds, names) for feeds in self.feeds]
            del runner
        passed, details = True, []
        for optimised, got in self.expected.items():
            words = in_words(fused.expected[optimised], got)
            if distance(fused.expected[optimised], got) > 0:
                allowed, why = fused._explain(got, optimised, exact=False)
                passed, words = passed and allowed, words + why
            details.append(f"{'optimised' if optimised else 'unoptimised'} {words}")
        return Check("fused", passed, "; ".join(details))

    def spread(self) -> float:
        """How far the base's own outputs are apart, relative to their largest value."""
        return beyond([self.expected[False], self.expected[True]], self.expected[True]).allowed

    def _explain(
        self, got: Sequence[Values], optimised: bool, *, exact: bool = True
    ) -> tuple[bool, str]:
        """Whether rounding explains outputs that differ from the base's, and how."""
        wavers = False, "; the base itself gives different outputs each time"
        if exact and not optimised and self._is_exact():
            return wavers if self._base_wavers() else (False, ", where not one bit may differ")
        self.tell("running the base with the slots' tensors kept apart")
        known = [self.expected[optimised], self.expected[not optimised]]
        with suppress(RunError):  # a base that does not run with more outputs than its own
            known.append(self._run(kept_apart(self.base, self.slots, self.weights), optimised))
            if distance(known[-1], got) == 0:
                return True, ", as the base is that keeps the slots' tensors apart"
        if self._base_wavers():
            return wavers
        found = beyond(known, got)
        for number in range(_SHAKES):
            if found.within:
                break
            self.tell("running the base with weights moved by what rounding does")
            try:
                moved = self._run(perturbed(self.base, self.seed + number), True)
            except RunError:
                continue  # one of the weights must keep its value
            if is_finite_where(self.expected[optimised], moved):
                known.append(moved)
                found = beyond(known, got)
        if not found.far:
            return True, ", among the base's own roundings"
        only = "" if found.within else "only "
        words = (
            f", {found.far:.1e} outside of the base's own roundings, "
            f"which are {only}{found.allowed:.1e} apart"
        )
        return found.within, words

    def _run(self, model: Model, optimised: bool) -> list[Values]:
        """The outputs of a model. Its session is freed here, to hold weights only once."""
        runner = Runner(model, self.providers, optimised=optimised)
        names = list(self.expected[True][0])
        return [runner.run(feeds, names) for feeds in self.feeds]

    def _base_wavers(self) -> bool:
        if self._operators() & _RANDOM_OPS:
            return True
        return distance(self.expected[False], self._run(self.base, False)) > 0

    def _is_exact(self) -> bool:
        """Whether ONNX Runtime computes each node the same way without optimisation."""
        opened = any(weight.swappable for weight in self.weights)
        opened = opened or any(slot.on_weight for slot in self.slots)
        return not (opened or self._halves())

    def _halves(self) -> set[str]:
        stored = {tensor.data_type for tensor in walk.tensors(self.base.proto)}
        used = {slot.dtype for slot in self.slots} & set(_HALVES.values())
        return used | {name for elem_type, name in _HALVES.items() if elem_type in stored}

    def _kind(self) -> str:
        """What limits the precision: quantised nodes, or the least precise element type."""
        if self._operators() & _QUANTISED_OPS:
            return "quantised"
        used = {slot.dtype for slot in self.slots} | self._halves() or {"float32"}
        return next(k for k in ("bfloat16", "float16", "float32", "float64") if k in used)

    def _operators(self) -> set[str]:
        graphs = (scope.graph for scope in walk.scopes(self.base.proto.graph))
        return {node.op_type for graph in graphs for node in graph.node}
