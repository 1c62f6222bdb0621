"""`onnx-adapt convert`."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, refuse_to_replace, say, say_next, size_text
from onnx_adapt.cli.progress import patience
from onnx_adapt.formats import suffix_list
from onnx_adapt.words import count


@click.command("convert", short_help="Turn a trained checkpoint into an adapter file.")
@click.argument("checkpoint", type=click.Path())
@click.option(
    "--for",
    "model",
    required=True,
    type=click.Path(),
    help="The model with the slots to fill.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help=f"The adapter file to write. Its suffix tells the format: {suffix_list()}.",
)
@options.adapter_name
@options.base_weights
@options.part
@options.module_map
@options.allow_missing
@options.allow_partial
@options.as_json
def command(
    checkpoint: str,
    model: str,
    output: str,
    name: str,
    base_weights: str | None,
    part: str,
    module_map: dict[str, str],
    allow_missing: tuple[str, ...],
    allow_partial: bool,
    as_json: bool,
) -> None:
    """Turn a trained CHECKPOINT into an adapter file for the slots of a model.

    It is a folder of PEFT or AdapterHub, or a file or folder of another library.

    \b
      onnx-adapt convert trained/ --for adapted.onnx -o fr.onnx_adapter
    """
    import onnx_adapt as oa
    from onnx_adapt.model.file import protect_files

    read = [Path(model), Path(checkpoint), *Path(checkpoint).glob("*")]
    read += [Path(base_weights)] if base_weights else []
    refuse_to_replace(output, *read)
    with patience(f"reading {checkpoint}"):
        opened = oa.open_model(model)
        protect_files(opened, output)
        adapter = oa.convert(
            checkpoint,
            opened,
            name=name,
            base_weights=base_weights,
            part=part,
            module_map=module_map,
            allow_missing=allow_missing,
            allow_partial=allow_partial,
        )
    path = oa.save_adapter(adapter, output)
    if as_json:
        filled, replaced = sorted(adapter.weights), sorted(adapter.replaced)
        print_json(
            {"output": str(path), "name": adapter.name, "slots": filled, "replaced": replaced}
        )
    slots = count(len(adapter.weights), "slot")
    say(f"wrote {path} ({size_text(path.stat().st_size)}, {slots})")
    say_next("run", model, "--inputs", "x.npz", "--adapter", output, "--compare", "base")
