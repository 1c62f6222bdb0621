"""`onnx-adapt convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.checkpoints.writers.table import WRITERS
from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, refuse_to_replace, say, say_next, size_text
from onnx_adapt.cli.progress import patience
from onnx_adapt.formats import suffix_list
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt import Adapter


@click.command(
    "convert", short_help="Turn a trained checkpoint into an adapter file, and back."
)
@click.argument("source", type=click.Path())
@click.option(
    "--for",
    "model",
    required=True,
    type=click.Path(),
    help="The model with the slots.",
)
@click.option(
    "--to",
    "library",
    type=click.Choice(list(WRITERS)),
    help="Turn an adapter file into what this library loads.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help=f"The adapter file to write. Its suffix tells the format: {suffix_list()}. With "
    "--to, a new folder; for kohya a .safetensors file.",
)
@options.adapter_name
@options.base_weights
@options.part
@options.module_map
@options.allow_missing
@options.allow_partial
@options.as_json
def command(
    source: str,
    model: str,
    library: str | None,
    output: str,
    name: str,
    base_weights: str | None,
    part: str,
    module_map: dict[str, str],
    allow_missing: tuple[str, ...],
    allow_partial: bool,
    as_json: bool,
) -> None:
    """Turn a trained checkpoint into an adapter file for the slots of a model, and back.

    SOURCE is what a library saved, or an adapter file with --to. Then --map renames the
    modules of the graph, and the adapter may leave slots off.

    \b
      onnx-adapt convert trained/ --for adapted.onnx -o fr.onnx_adapter
      onnx-adapt convert fr.onnx_adapter --for adapted.onnx --to peft -o back/
    """
    import onnx_adapt as oa
    from onnx_adapt.model.file import protect_files

    if library and (part or allow_partial):
        option = "--part" if part else "--allow-partial"
        raise click.UsageError(f"{option} is not for --to, which writes the whole adapter")
    read = [Path(model), Path(source), *Path(source).glob("*")]
    read += [Path(base_weights)] if base_weights else []
    refuse_to_replace(output, *read)
    names: dict[str, Any] = {"base_weights": base_weights, "module_map": module_map}
    with patience(f"reading {source}"):
        opened = oa.open_model(model)
        protect_files(opened, output)
        if library:
            adapter = _named(oa.load_adapter(source), name)
            path = oa.save_checkpoint(adapter, output, model=opened, library=library, **names)
        else:
            names |= {"name": name, "part": part, "allow_missing": allow_missing}
            adapter = oa.convert(source, opened, allow_partial=allow_partial, **names)
            path = oa.save_adapter(adapter, output)
    if as_json:
        filled, replaced = sorted(adapter.weights), sorted(adapter.replaced)
        print_json(
            {"output": str(path), "name": adapter.name, "slots": filled, "replaced": replaced}
        )
    size = sum(f.stat().st_size for f in (path.iterdir() if path.is_dir() else [path]))
    held = "a first past" if adapter.initial_state else count(len(adapter.weights), "slot")
    say(f"wrote {path} ({size_text(size)}, {held})")
    if library:
        say(f"load it with {WRITERS[library].loads.format(path=output)}")
    else:
        say_next("run", model, "--inputs", "x.npz", "--adapter", output, "--compare", "base")


def _named(adapter: Adapter, name: str) -> Adapter:
    """The adapter under another name, if one is given."""
    from dataclasses import replace

    return replace(adapter, name=name) if name else adapter
