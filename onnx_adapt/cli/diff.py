"""`onnx-adapt diff`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.grouped import natural
from onnx_adapt.cli.outputs import print_json, print_table, say
from onnx_adapt.cli.progress import patience
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt.proof.differences import Differences


@click.command("diff", short_help="Compare two models, or two adapters, slot by slot.")
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@click.option("--for", "model", type=click.Path(), help="A model to run two adapters in.")
@options.inputs
@options.as_json
def command(
    first: str, second: str, model: str | None, inputs: tuple[str, ...], as_json: bool
) -> None:
    """Compare FIRST and SECOND: two models (.onnx), or two adapter files.

    Of models it tells which slots each has, how far their weights are apart where both are
    filled, and how far the outputs are apart while nothing is fed. Of adapters it tells how
    far the weights of each slot are apart, relative to those of FIRST, and with --for how far
    each moves the outputs of that model.

    \b
      onnx-adapt diff model.onnx model.adapted.onnx
      onnx-adapt diff fr.safetensors fr-old.safetensors --for model.adapted.onnx
    """
    import onnx_adapt as oa
    from onnx_adapt.proof.differences import diff_adapters, diff_models

    models = [Path(file).suffix == ".onnx" for file in (first, second)]
    if models[0] != models[1]:
        raise click.UsageError("give two models (.onnx), or two adapter files")
    if inputs and not (models[0] or model):
        raise click.UsageError("--inputs has no effect on two adapters without --for")
    if models[0] and model:
        raise click.UsageError("--for has no effect on two models")
    with patience(f"comparing {first} and {second}"):
        if models[0]:
            found = diff_models(oa.open_model(first), oa.open_model(second), inputs or None)
        else:
            files = [oa.load_adapter(file) for file in (first, second)]
            opened = oa.open_model(model) if model else None
            found = diff_adapters(files[0], files[1], opened, inputs or None)
    if as_json:
        print_json(asdict(found))
        return
    _show(found)


def _show(found: Differences) -> None:
    rows = []
    for slot in sorted(found.slots, key=lambda slot: natural(slot.slot)):
        far = [slot.apart, slot.first_moves, slot.second_moves]
        shown = ["" if value is None else f"{value:.1e}" for value in far]
        rows.append((slot.slot, slot.first or "-", slot.second or "-", *shown))
    columns = ("slot", "first", "second", "weights apart", "first moves", "second moves")
    kept = [i for i in range(len(columns)) if i < 3 or any(row[i] for row in rows)]
    if rows:
        print_table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
    differing = [slot for slot in found.slots if not slot.same]
    say(f"{count(len(differing), 'slot')} of {len(found.slots)} differ")
    if found.same_base is None:
        say("whether both are for one base is not known: an adapter does not say")
    elif not found.same_base:
        say("the two are of different bases")
    if found.outputs is not None:
        say(f"the outputs are {found.outputs:.1e} apart, relative to the largest")
