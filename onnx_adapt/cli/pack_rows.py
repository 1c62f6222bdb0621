"""`onnx-adapt pack-rows`."""

from __future__ import annotations

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, refuse_to_replace, say, say_next, size_text
from onnx_adapt.cli.progress import patience
from onnx_adapt.words import count

_BASE = "-"


@click.command("pack-rows", short_help="Pack an adapter for each row of a batch.")
@click.argument("model", type=click.Path())
@click.argument("files", nargs=-1, required=True, type=click.Path())
@options.adapter_output
@options.as_json
def command(model: str, files: tuple[str, ...], output: str, as_json: bool) -> None:
    """Pack the adapters in FILES, one for each row of a batch, into one adapter file.

    A row whose file is - is the base. MODEL's slots must be batched. The result is for
    runtimes that feed one adapter file at a time, such as onnxruntime-genai, and for batches
    of exactly these rows. `run --rows` needs no pack.

    \b
      onnx-adapt pack-rows adapted.onnx fr.safetensors de.npz - -o rows.onnx_adapter
    """
    import onnx_adapt as oa
    from onnx_adapt.model.file import protect_files

    read = {file: None for file in files if file != _BASE}
    refuse_to_replace(output, model, *read)
    with patience(f"packing {count(len(files), 'row')}"):
        opened = oa.open_model(model)
        protect_files(opened, output)
        adapters = {file: oa.load_adapter(file) for file in read}
        packed = oa.pack_rows(opened, [adapters.get(file) for file in files])
    path = oa.save_adapter(packed, output)
    if as_json:
        names = [adapters[file].name if file in adapters else None for file in files]
        print_json({"output": str(path), "rows": names, "slots": sorted(packed.weights)})
    held = f"{count(len(files), 'row')}, {count(len(packed.weights), 'slot')}"
    say(f"wrote {path} ({size_text(path.stat().st_size)}, {held})")
    say_next("check", model, output)
