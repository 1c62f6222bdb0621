"""`onnx-adapt suggest`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, print_table, say, say_next
from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.training_data import read_settings, read_texts
from onnx_adapt.cli.training_model import read_head
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt.training.suggest import Suggestion


@click.command("suggest", short_help="Rank the places that are worth a slot.")
@click.argument("model", type=click.Path())
@options.data
@options.loss
@options.labels
@options.tokenizer
@options.texts
@options.max_length
@options.on_output
@options.head
@options.loss_settings
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="How many samples to look at.",
)
@options.seed
@options.provider
@options.as_json
def command(model: str, as_json: bool, **given: Any) -> None:
    """Rank the sites of MODEL by how much a slot there would get to learn from.

    One pass over some samples gives the gradient of a slot at every site. Its norm says how
    fast the loss falls when a slot there begins to learn; what it can reach in the end is
    for `train` to show. Slots that MODEL has are taken out first.

    \b
      onnx-adapt suggest base.onnx --data train.npz --loss cross_entropy
    """
    import onnx_adapt as oa
    from onnx_adapt.training.reading import read_dataset
    from onnx_adapt.training.suggest import suggest

    opened = oa.open_model(model)
    with patience("looking at gradients"):
        found = suggest(
            opened,
            read_dataset(given["data"], given["labels"], text=read_texts(opened, given)),
            loss=given["loss"],
            output=given["model_output"],
            labels=given["labels"],
            loss_settings=read_settings(given["loss_settings"]),
            head=read_head(given),
            samples=given["samples"],
            seed=given["seed"],
            provider=given["provider"],
        )
    if as_json:
        print_json({"sites": [asdict(item) for item in found]})
        return
    _show(model, found)


def _show(model: str, found: Sequence[Suggestion]) -> None:
    largest = max(item.norm for item in found) or 1.0
    print_table(
        ("address", "module", "gradient", "of largest", "per parameter", "slot"),
        [
            (
                item.address,
                item.module or item.node,
                f"{item.norm:.2e}",
                f"{item.norm / largest:.0%}",
                f"{item.per_parameter:.1e}",
                "yes" if item.taken else "",
            )
            for item in found
            if not item.refused
        ],
    )
    refused = [item for item in found if item.refused]
    if refused:
        say(f"{count(len(refused), 'site')} have no gradient: {refused[0].refused}")
    say_next("insert", model, "--after", found[0].module or found[0].address)
