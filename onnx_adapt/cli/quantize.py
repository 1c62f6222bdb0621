"""`onnx-adapt quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.losses import losses_for_json, percent
from onnx_adapt.cli.outputs import (
    print_json,
    print_table,
    refuse_to_replace,
    say,
    say_next,
    size_text,
)
from onnx_adapt.cli.progress import patience


@click.command("quantize", short_help="Write an adapter with 8 or 4 bits a number.")
@click.argument("adapter", type=click.Path())
@click.option(
    "--bits",
    type=int,
    default=8,
    show_default=True,
    help="The bits of a number in the file: 8 or 4.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help="The .safetensors file to write.",
)
@options.as_json
def command(adapter: str, bits: int, output: str, as_json: bool) -> None:
    """Write ADAPTER with 8 or 4 bits for each number of its projections.

    The file is smaller, on disk and on the way to a server. It is loaded as floats, so a run
    takes the time and memory that it did. The table tells how far each slot is off, relative
    to what it adds. Heads and other replaced weights stay as they are.

    \b
      onnx-adapt quantize fr.safetensors --bits 4 -o fr4.safetensors
    """
    import onnx_adapt as oa

    refuse_to_replace(output, adapter)
    with patience(f"reading {adapter}"):
        given = oa.load_adapter(adapter)
        quantised = oa.quantize(given, bits=bits)
        losses = oa.measure_loss(given, quantised.adapter)
    path = oa.save_adapter(quantised, output)
    if as_json:
        found = {"bits": bits, "losses": losses_for_json(losses)}
        print_json({"output": str(path), "name": given.name, **found})
    else:
        print_table(("slot", "off"), [(slot, percent(loss)) for slot, loss in losses.items()])
    sizes = [size_text(Path(file).stat().st_size) for file in (adapter, path)]
    say(f"quantised {sizes[0]} to {bits} bits: wrote {path} ({sizes[1]})")
    say_next("inspect", output)
