"""`onnx-adapt subtract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.losses import losses_for_json, percent
from onnx_adapt.cli.outputs import (
    adapter_beside,
    output_path,
    print_json,
    print_table,
    refuse_to_replace,
    say,
    say_next,
    tell_saved,
)
from onnx_adapt.cli.progress import patience
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt import Checkpoint, Model


@click.command("subtract", short_help="Make an adapter of a full fine-tune.")
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option(
    "--for",
    "model",
    type=click.Path(),
    help="The export of BASE, if BASE and TUNED are files of weights.",
)
@click.option("--rank", type=int, help="The rank of each LoRA.")
@click.option(
    "--energy",
    type=float,
    help="Instead of a rank, the share of each difference's energy to keep, such as 0.99.",
)
@options.adapter_name
@options.file_format
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="The model with slots to write; by default BASE.adapted.onnx.",
)
@options.inputs
@click.option("--no-verify", is_flag=True, help="Do not prove the result in ONNX Runtime.")
@options.as_json
def command(
    base: str,
    tuned: str,
    model: str | None,
    rank: int | None,
    energy: float | None,
    name: str,
    file_format: str,
    output: str | None,
    inputs: tuple[str, ...],
    no_verify: bool,
    as_json: bool,
) -> None:
    """Make an adapter of the difference between TUNED, a full fine-tune, and its BASE.

    Both are .onnx files of one graph, or files of weights (.safetensors, .bin) with --for.
    Matrices become LoRA of the rank; the table tells what each loses. Biases, norms and what
    LoRA would not make smaller are replaced, which is exact. BASE with the slots is written
    to OUTPUT, and the adapter beside it as OUTPUT.NAME.safetensors.

    \b
      onnx-adapt subtract base.onnx tuned.onnx --rank 16 -o adapted.onnx
      onnx-adapt subtract base.safetensors tuned.safetensors --for base.onnx --energy 0.99
    """
    import onnx_adapt as oa

    if no_verify and inputs:
        raise click.UsageError("--inputs has no effect with --no-verify")
    path = output_path(model or base, output, "adapted")
    refuse_to_replace(path, base, tuned, *([model] if model else []))
    with patience(f"reading {tuned}"):
        opened = _graph(base, tuned, model)
        weights = {"base_weights": base} if model else {}
        found = oa.subtract(
            opened,
            tuned if model else oa.open_model(tuned),
            rank=rank,
            energy=energy,
            name=name or Path(tuned).stem,
            **weights,
        )
        adapted = oa.insert_checkpoint(opened, found)
    with patience() as (progress, stage):
        if not no_verify:
            proof = oa.verify(
                opened, adapted, inputs=inputs or None, weights=False, stage=stage
            )
            proof.raise_for_mismatch()
        beside = adapter_beside(path, found, file_format)
        saved = oa.save_model(adapted, path, beside=beside, progress=progress)
    if as_json:
        _print_document(found, str(saved.path), str(beside[0][0]), verified=not no_verify)
    elif found.losses:
        losses = [(module, percent(loss)) for module, loss in found.losses.items()]
        print_table(("module", "loss"), losses)
    replaced = len(found.adapter.replaced)
    say(f"{count(len(found.losses), 'LoRA')}, and {count(replaced, 'weight')} replaced whole")
    tell_saved(saved)
    say(f"wrote {beside[0][0]}")
    say_next("run", path, "--inputs", "x.npz", "--adapter", beside[0][0].name)


def _graph(base: str, tuned: str, model: str | None) -> Model:
    """The graph that the difference is placed in.

    Raises:
        UsageError: If files of weights are given without one, or a model with one.
    """
    import onnx_adapt as oa

    graphs = [file for file in (base, tuned) if Path(file).suffix == ".onnx"]
    if model and graphs:
        raise click.UsageError(f"--for is for files of weights, and {graphs[0]} is a model")
    if not model and len(graphs) < 2:
        raise click.UsageError(
            f"{base if base not in graphs else tuned} is no .onnx file; with files of weights "
            "give --for MODEL, the export of BASE"
        )
    return oa.open_model(model or base)


def _print_document(found: Checkpoint, output: str, adapter: str, *, verified: bool) -> None:
    losses = losses_for_json(found.losses)
    replaced = sorted(found.adapter.replaced)
    print_json(
        {
            "output": output,
            "adapter": adapter,
            "name": found.adapter.name,
            "verified": verified,
            "losses": losses,
            "replaced": replaced,
        }
    )
