"""`onnx-adapt pack`."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.show import print_json, say_next, tell_saved


@click.command("pack", short_help="Make a thin model whole.")
@click.argument("model", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="Default: MODEL.packed.onnx.")
@click.option("--keep-external", is_flag=True, help="Do not copy external data.")
@click.option("--force", is_flag=True, help="Let the output replace MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: str, output: str | None, keep_external: bool, force: bool, as_json: bool
) -> None:
    """Make a thin MODEL whole: what it would be without --thin, byte for byte.

    Data that the base itself keeps in files beside it stays in them.

    \b
      onnx-adapt insert model.onnx --after encoder.layer.0.output.dense --thin
      onnx-adapt pack model.adapted.onnx -o full.onnx
    """
    import onnx_adapt as oa
    from onnx_adapt.errors import SaveError

    thin = oa.open_model(model)
    if not thin.weights_in:
        raise SaveError(f"{thin.label} is not thin", hint="it can be used as it is")
    path = Path(model).with_suffix(".packed.onnx") if output is None else output
    with patience() as (progress, _):
        saved = oa.save_model(
            thin, path, overwrite=force, keep_external=keep_external, progress=progress
        )
    if as_json:
        data = [str(file) for file in saved.data]
        print_json({"output": str(saved.path), "size": saved.size, "data": data})
    tell_saved(saved)
    say_next("check", path)
