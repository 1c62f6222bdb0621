"""`onnx-adapt pack`."""

from __future__ import annotations

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import output_path, print_json, say_next, tell_saved
from onnx_adapt.cli.progress import patience


@click.command("pack", short_help="Copy the weights of a thin model into it.")
@click.argument("model", type=click.Path())
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="The file to write; by default MODEL.packed.onnx.",
)
@options.keep_external
@options.force
@options.as_json
def command(
    model: str, output: str | None, keep_external: bool, force: bool, as_json: bool
) -> None:
    """Copy the weights that a thin MODEL refers to into one file.

    The result is the same, byte for byte, as without --thin. Weights that the base itself
    stores as external data stay in the files beside it.

    \b
      onnx-adapt insert model.onnx --after encoder.layer.0.output.dense --thin
      onnx-adapt pack model.adapted.onnx -o full.onnx
    """
    import onnx_adapt as oa
    from onnx_adapt.errors import SaveError

    thin = oa.open_model(model)
    if not thin.weights_in:
        raise SaveError(f"{thin.label} is not thin", hint="it can be used as it is")
    path = output_path(model, output, "packed")
    with patience() as (progress, _):
        saved = oa.save_model(
            thin, path, overwrite=force, keep_external=keep_external, progress=progress
        )
    if as_json:
        data = [str(file) for file in saved.data]
        print_json({"output": str(saved.path), "size": saved.size, "data": data})
    tell_saved(saved)
    say_next("check", path)
