"""Which places of a model are worth a slot, from the gradients of one pass over samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.edit.heads import add_head
from onnx_adapt.edit.insert import insert, list_slots
from onnx_adapt.edit.remove import remove
from onnx_adapt.errors import GradientError, SiteError, TrainingError
from onnx_adapt.graph.gradients.reverse import weights_on_way
from onnx_adapt.graph.index import index_model
from onnx_adapt.graph.resolve import find_sites
from onnx_adapt.model.file import Model
from onnx_adapt.ort import read_providers
from onnx_adapt.proof.runner import ProviderArgument
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.training.data import in_order
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.fitting_data import for_step
from onnx_adapt.training.reading import DataArgument, read_dataset
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_model import LossFunction, StepModel, choose_output, make_step

# Every site gets a linear slot that is off: `down` is random and `up` is zero. All of them are
# in the model at once and change nothing, so one pass back gives the gradient of every `up`.
# A step of length e along a gradient lowers the loss by e times the norm of the gradient, so
# the norm says how fast a slot there would begin to learn. For a site with the values x and
# the gradient g it is the norm of (x @ down).T @ g. A head starts as zero, and nothing would
# come back through it; so its weights are random here.

RANK = 16
"""The bottleneck of the slots that are tried."""

SAMPLES = 64
"""How many samples are looked at."""

BATCH = 16

_HEAD = "head.weight"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """How much a slot at one site would get to learn from.

    Attributes:
        address: The site, as `insert --after` takes it.
        node: Its node.
        module: Its PyTorch module, or ''.
        norm: The norm of the gradient of a slot there; 0 if the loss does not depend on it.
        per_parameter: The norm divided by the root of the number of the slot's parameters.
        parameters: How many those are, with a bottleneck of 16.
        taken: Whether the model has a slot there.
        refused: Why it has no gradient, or ''.
    """

    address: str
    node: str
    module: str
    norm: float
    per_parameter: float
    parameters: int
    taken: bool
    refused: str = ""


def suggest(
    model: Model,
    data: DataArgument,
    *,
    loss: str | LossFunction,
    output: str = "",
    labels: str = "labels",
    loss_settings: Mapping[str, object] | None = None,
    head: Mapping[str, Any] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    provider: ProviderArgument = None,
) -> list[Suggestion]:
    """Rank the sites of a model by how much a slot there would get to learn from.

    Args:
        model: A base, or a model with slots, whose base is looked at.
        data: What `read_dataset` takes, with the model's inputs by name and the labels.
        loss: A name in `onnx_adapt.training.losses.LOSSES`, or a function that adds its nodes.
        output: The output that the loss is on; by default the only float output.
        labels: What the labels are called in the data.
        loss_settings: Settings of the loss.
        head: What `add_head` takes for a head that the loss is on, such as `{"classes": 3}`.
        samples: How many samples to look at, from the beginning of the data.
        seed: Seed of the slots that are tried.
        provider: Where to run; by default the CPU.

    Returns:
        The sites, those with the largest gradient first.

    Raises:
        SiteError: If no layer can take a slot.
        TrainingError: If the data or the loss does not fit.
        GradientError: If no site has a gradient.

    Example:
        >>> import numpy as np, onnx_adapt as oa
        >>> base = oa.open_model("tests/cases/peft_bert_lora_default_ts/base.onnx")
        >>> ids = np.random.default_rng(0).integers(1, 60, (16, 6))
        >>> data = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": ids[:, 0] % 2}
        >>> best = suggest(base, data, loss="cross_entropy")[0]
        >>> best.norm > 0
        True
    """
    if samples < 1:
        raise TrainingError("no samples are to be looked at", hint="give 1 or more")
    taken = {_address(slot) for slot in list_slots(model)}
    base = remove(model) if taken else model
    sites = [site for site in find_sites(base) if site.layer and site.reason is None]
    if not sites:
        raise SiteError(f"no layer of {base.label} can take a slot")
    chosen = "head" if head else choose_output(base, output)
    trial = _Trial(base, loss, chosen, loss_settings or {}, seed, head)
    moving = trial.moving([site.address for site in sites])
    first, why = trial.first_with_gradient(moving)
    norms = trial.norms(moving[first:], data, labels, samples, provider)
    found = []
    for site in sites:
        norm, number = norms.get(site.address, (0.0, 0))
        refused = why if site.address in moving[:first] else ""
        found.append(
            Suggestion(
                *(site.address, site.node, site.module or "", norm),
                *(norm / max(number, 1) ** 0.5, number, site.address in taken, refused),
            )
        )
    return sorted(found, key=lambda item: -item.norm)


def _address(slot: Slot) -> str:
    return f"{slot.graph}:{slot.tensor}"


@dataclass(frozen=True, slots=True)
class _Trial:
    """A base that gets slots at some of its sites, and the loss on an output or a head."""

    base: Model
    loss: str | LossFunction
    output: str
    settings: Mapping[str, object]
    seed: int
    head: Mapping[str, Any] | None

    def moving(self, addresses: Sequence[str]) -> list[str]:
        """The sites that the output depends on, in the order of the graph.

        Raises:
            GradientError: If there is none.
        """
        adapted = self._insert(addresses)
        slots = list_slots(adapted)
        inputs = [name for slot in slots for name in slot.inputs]
        on_way = set(weights_on_way(index_model(adapted).main, self.output, inputs))
        found = {_address(slot) for slot in slots if on_way.intersection(slot.inputs)}
        if not found:
            raise GradientError(f"output {self.output!r} depends on no site")
        return [address for address in addresses if address in found]

    def first_with_gradient(self, addresses: Sequence[str]) -> tuple[int, str]:
        """The first site behind all operators without a gradient, and why not an earlier one.

        Such an operator stands between the output and the sites before it, and sites are in
        the order of the graph. So the first one is found by halving.

        Raises:
            GradientError: If no site has a gradient.
        """
        low, high, why = 0, len(addresses), None
        first = 0
        while low < high:
            try:
                self._step(addresses[first:])
                high = first
            except GradientError as error:
                why, low = error, first + 1
            first = (low + high) // 2
        if why is not None and high == len(addresses):
            raise why
        return high, why.message if why is not None else ""

    def norms(
        self,
        addresses: Sequence[str],
        data: DataArgument,
        labels: str,
        samples: int,
        provider: ProviderArgument,
    ) -> dict[str, tuple[float, int]]:
        """The norm of the gradient at each site, and the number of a slot's parameters."""
        adapted, weights, step = self._step(addresses)
        read = for_step(step, read_dataset(data, labels))
        few = read.take(np.arange(min(samples, read.size)))
        engine = Engine(step, read_providers(provider))
        total = {name: np.zeros_like(value) for name, value in weights.items()}
        for batch in in_order(few, max(BATCH, step.rows)):
            for name, grad in engine.run(weights, batch).grads.items():
                total[name] += grad * np.float32(batch.size / few.size)
        return {
            _address(slot): (
                float(np.sqrt(sum(np.vdot(total[n], total[n]) for n in slot.inputs))),
                sum(weights[name].size for name in slot.inputs),
            )
            for slot in list_slots(adapted)
        }

    def _insert(self, addresses: Sequence[str]) -> Model:
        model = insert(self.base, after=addresses, activation="identity", seed=self.seed)
        return add_head(model, **self.head) if self.head else model

    def _step(self, addresses: Sequence[str]) -> tuple[Model, dict[str, Array], StepModel]:
        adapted = self._insert(addresses)
        weights = weights_to_train(adapted, RANK, None, self.seed)
        if self.head:
            zeros = weights[_HEAD]
            drawn = np.random.default_rng(self.seed).standard_normal(zeros.shape)
            weights[_HEAD] = (drawn / len(zeros) ** 0.5).astype(zeros.dtype)
        step = make_step(
            *(adapted, list(weights)),
            loss=self.loss,
            output=self.output,
            settings=self.settings,
        )
        return adapted, weights, step
