"""`onnx-adapt compress`."""

from __future__ import annotations

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.losses import losses_for_json, rank_of, show_losses
from onnx_adapt.cli.outputs import print_json, refuse_to_replace, say, say_next, size_text
from onnx_adapt.cli.progress import patience


@click.command("compress", short_help="Reduce the rank of an adapter.")
@click.argument("adapter", type=click.Path())
@click.option("--rank", type=int, help="The largest rank that a slot keeps.")
@click.option(
    "--energy",
    type=float,
    help="The share of the squared singular values that each slot keeps, such as 0.99.",
)
@options.adapter_name
@options.adapter_output
@options.as_json
def command(
    adapter: str,
    rank: int | None,
    energy: float | None,
    name: str,
    output: str,
    as_json: bool,
) -> None:
    """Reduce the rank of the slots of ADAPTER, with as little loss as there can be.

    Each update down @ up gets the nearest one of the smaller rank. The table tells what each
    slot lost, relative to its update. Slots with an activation are refused.

    \b
      onnx-adapt compress fr.safetensors --rank 4 -o fr4.safetensors
      onnx-adapt compress fr.safetensors --energy 0.99 -o small.safetensors
    """
    import onnx_adapt as oa

    refuse_to_replace(output, adapter)
    with patience(f"reading {adapter}"):
        given = oa.load_adapter(adapter)
        small = oa.compress(given, rank=rank, energy=energy, name=name)
        losses = oa.measure_loss(given, small)
    path = oa.save_adapter(small, output)
    if as_json:
        ranks = {s: {"before": rank_of(given, s), "after": rank_of(small, s)} for s in losses}
        found = {"ranks": ranks, "losses": losses_for_json(losses)}
        print_json({"output": str(path), "name": small.name, **found})
    else:
        show_losses(given, small, losses, ("rank before", "rank after", "loss"))
    sizes = f"{size_text(given.size)} of weights to {size_text(small.size)}"
    say(f"compressed {sizes}: wrote {path} ({size_text(path.stat().st_size)})")
    say_next("inspect", output)
