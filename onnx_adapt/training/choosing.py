"""Choose where slots go if nobody says where, by what they would get to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx_adapt.errors import GradientError
from onnx_adapt.model.file import Model
from onnx_adapt.proof.runner import ProviderArgument
from onnx_adapt.training.places import LAST, block_places
from onnx_adapt.training.reading import DataArgument
from onnx_adapt.training.step_model import LossFunction
from onnx_adapt.training.suggest import suggest

# The gradient of a slot says how fast the loss falls at first, and not how far in the end. It
# is large after a LayerNorm because the output there is large. Of MiniLM-L3, three slots at
# the largest gradients reached what three at the ends of blocks did (78.0 and 78.0 % right on
# the task mood of examples/two-tasks, 83.2 and 84.4 % on source; 2000 sentences). So ends of
# blocks are taken, as Pfeiffer et al. (2020) do, and the gradient tells which of them learn.
# Where there are no blocks, as in a CNN, it is the best that is known of the layers.


@dataclass(frozen=True, slots=True)
class Choice:
    """Where slots go.

    Attributes:
        places: The addresses, of blocks in the order of the graph; else the largest gradient
            is first.
        reason: Why these, in a few words.
    """

    places: tuple[str, ...]
    reason: str


def choose_places(
    model: Model,
    data: DataArgument,
    *,
    loss: str | LossFunction,
    output: str = "",
    labels: str = "labels",
    loss_settings: Mapping[str, object] | None = None,
    head: Mapping[str, Any] | None = None,
    seed: int = 0,
    provider: ProviderArgument = None,
) -> Choice:
    """Choose where the slots of a base go: places where a slot has something to learn from.

    These are the layers that end a block and have a gradient; or in a model without blocks
    the four layers with the largest gradients.

    Args:
        model: A base.
        data: What `read_dataset` takes.
        loss: The loss, as for `suggest`.
        output: The output that the loss is on.
        labels: What the labels are called in the data.
        loss_settings: Settings of the loss.
        head: What `add_head` takes, if the loss is on a head.
        seed: Seed of the slots that are tried.
        provider: Where to run.

    Raises:
        SiteError: If no layer can take a slot.
        TrainingError: If the data or the loss does not fit.
        GradientError: If no site has a gradient.
    """
    found = suggest(
        *(model, data),
        loss=loss,
        output=output,
        labels=labels,
        loss_settings=loss_settings,
        head=head,
        seed=seed,
        provider=provider,
    )
    learning = [item.address for item in found if item.norm > 0]
    if not learning:
        raise GradientError(
            f"the gradient is zero at every site of {model.label}",
            hint="try another loss or output, or other samples",
        )
    ends = block_places(model)
    if places := tuple(place for place in ends if place in learning):
        left = len(ends) - len(places)
        without = f", without {left} that no gradient reaches" if left else ""
        return Choice(places, f"the output layer of each block{without}")
    return Choice(tuple(learning[:LAST]), "those with the largest gradients")
