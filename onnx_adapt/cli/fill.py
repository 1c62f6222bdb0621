"""`onnx-adapt fill`."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.show import print_json, say, say_next, tell_saved, tell_thin
from onnx_adapt.words import count


@click.command("fill", short_help="Make an adapter the default of a model.")
@click.argument("model", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="Default: MODEL.filled.onnx.")
@click.option("--baked", is_flag=True, help="Freeze the weights: no inputs any more.")
@click.option("--allow-partial", is_flag=True, help="Leave slots without weights as they are.")
@click.option("--keep-external", is_flag=True, help="Do not copy external data.")
@click.option("--thin", is_flag=True, help="Leave the weights where they are; see insert.")
@click.option("--force", is_flag=True, help="Let the output replace MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
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
    from onnx_adapt.errors import SaveError

    adapter = oa.load_adapter(file)
    opened = oa.open_model(model)
    path = Path(model).with_suffix(".filled.onnx") if output is None else output
    if Path(path).exists() and Path(path).samefile(file):
        raise SaveError(
            f"the output would replace the adapter {file}", hint="choose another path with -o"
        )
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
    tell_saved(saved)
    if thin:
        tell_thin(opened, saved)
    say_next("run", path, "--inputs", "x.npz")
