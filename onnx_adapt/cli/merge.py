"""`onnx-adapt merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.losses import losses_for_json, show_losses
from onnx_adapt.cli.outputs import print_json, refuse_to_replace, say, say_next, size_text
from onnx_adapt.cli.progress import patience
from onnx_adapt.errors import AdaptError
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt import Adapter
    from onnx_adapt.dtypes import Array


def _weights(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(word) for word in str(value).split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: give numbers such as 0.7,0.3") from None


def _off_exact(
    given: Sequence[Adapter],
    weights: Sequence[float],
    base: Mapping[str, Array] | None,
    merged: Adapter,
) -> tuple[Adapter, dict[str, float | None]]:
    """The exact sum of adapters, and how far the slots of a merge are from it.

    There are no distances if a slot has no exact sum (a gate, a coupling).
    """
    import onnx_adapt as oa

    try:
        exact = oa.blend(given, weights, base=base)
    except AdaptError:
        return merged, {}
    return exact, oa.measure_loss(exact, merged)


@click.command("merge", short_help="Merge adapters into one.")
@click.argument("adapters", nargs=-1, required=True, type=click.Path())
@click.option(
    "--weights",
    required=True,
    metavar="W,W,...",
    callback=_weights,
    help="How much of each adapter, in their order: 0.7,0.3.",
)
@click.option(
    "--method",
    default="cat",
    show_default=True,
    help="cat (exact), linear, svd, ties, dare_linear, dare_ties, magnitude_prune, or one of "
    "the last four with _svd behind.",
)
@click.option(
    "--density", type=float, help="The share of entries that ties, dare and prune keep."
)
@click.option("--majority", help="How ties elects signs: total (the default) or frequency.")
@click.option(
    "--rank", type=int, help="The rank that an svd method gives; by default the largest."
)
@click.option("--seed", type=int, help="The seed for dare's random numbers; by default 0.")
@click.option(
    "--for",
    "model",
    type=click.Path(),
    help="A model with slots for the result: checked, and asked for the base's own head.",
)
@options.adapter_name
@options.adapter_output
@options.as_json
def command(
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    method: str,
    density: float | None,
    majority: str | None,
    rank: int | None,
    seed: int | None,
    model: str | None,
    name: str,
    output: str,
    as_json: bool,
) -> None:
    """Merge ADAPTERS of one base into one file, as PEFT's add_weighted_adapter does.

    cat lays them side by side, which is exact. The other methods keep the rank, and are for
    LoRA; linear also averages bottlenecks of one size, and IA3. The table tells how far each
    slot is from the exact sum.

    \b
      onnx-adapt merge fr.safetensors de.safetensors --weights 0.7,0.3 -o mix.safetensors
      onnx-adapt merge fr.npz de.npz --weights 1,1 --method ties --density 0.5 -o mix.npz
    """
    import onnx_adapt as oa
    from onnx_adapt.adapter.fitting import require_fit
    from onnx_adapt.edit.base_weights import base_values

    refuse_to_replace(output, *adapters, *([model] if model else []))
    with patience(f"reading {adapters[0]}"):
        given = [oa.load_adapter(file) for file in adapters]
        opened = oa.open_model(model) if model else None
        base = base_values(opened) if opened else None
    with patience("merging"):
        merged = oa.merge(
            given,
            weights,
            method=method,
            density=density,
            majority=majority,
            rank=rank,
            seed=seed,
            name=name,
            base=base,
        )
        exact, losses = _off_exact(given, weights, base, merged)
    if opened is not None:
        require_fit(opened, merged, allow_partial=True)
    path = oa.save_adapter(merged, output)
    if as_json:
        found = {"method": method, "losses": losses_for_json(losses)}
        slots, replaced = sorted(merged.weights), sorted(merged.replaced)
        where = {"output": str(path), "name": merged.name}
        print_json({**where, "slots": slots, "replaced": replaced, **found})
    elif losses and method != "cat":
        show_losses(exact, merged, losses, ("exact rank", "rank", "off the exact sum"))
    merged_from = count(len(given), "adapter")
    say(f"merged {merged_from} by {method}: wrote {path} ({size_text(path.stat().st_size)})")
    say_next("inspect", output, *(("--for", model) if model else ()))
