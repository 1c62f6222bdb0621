"""`onnx-adapt fill`."""

from __future__ import annotations

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import (
    output_path,
    print_json,
    refuse_to_replace,
    say,
    say_next,
    tell_saved,
    tell_thin,
)
from onnx_adapt.cli.progress import patience
from onnx_adapt.words import count


@click.command("fill", short_help="Make an adapter the default of a model.")
@click.argument("model", type=click.Path())
@click.argument("file", type=click.Path())
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="The file to write; by default MODEL.filled.onnx.",
)
@click.option(
    "--baked", is_flag=True, help="Turn the weights into constants, which cannot be fed."
)
@options.allow_partial
@options.keep_external
@click.option(
    "--thin", is_flag=True, help="Refer to the weights in MODEL; see `insert --help`."
)
@options.force
@options.as_json
def command(
    model: str,
    file: str,
    output: str | None,
    baked: bool,
    allow_partial: bool,
    keep_external: bool,
    thin: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make the adapter in FILE the default of MODEL's slots.

    \b
      onnx-adapt fill adapted.onnx fr.safetensors -o french.onnx --baked
    """
    import onnx_adapt as oa
    from onnx_adapt.slot.weights import is_off

    adapter = oa.load_adapter(file)
    opened = oa.open_model(model)
    path = output_path(model, output, "filled")
    refuse_to_replace(path, file)
    result = oa.fill(opened, adapter, allow_partial=allow_partial)
    if baked:
        result = oa.bake(result)
    with patience() as (progress, _):
        saved = oa.save_model(
            result,
            path,
            overwrite=force,
            keep_external=keep_external,
            thin=thin,
            progress=progress,
        )
    if as_json:
        slots = sorted(adapter.weights)
        print_json({"output": str(saved.path), "adapter": adapter.name, "slots": slots})
    say(f"filled {count(len(adapter.weights), 'slot')} with {adapter.name!r}")
    if adapter.weights and all(map(is_off, adapter.weights.values())):
        say(f"note: {adapter.name!r} turns all of its slots off: they change nothing")
    tell_saved(saved)
    if thin:
        tell_thin(opened, saved)
    say_next("run", path, "--inputs", "x.npz")
