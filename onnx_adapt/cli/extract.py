"""`onnx-adapt extract`."""

from __future__ import annotations

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, say, say_next, size_text
from onnx_adapt.cli.progress import patience
from onnx_adapt.words import count


@click.command("extract", short_help="Write the adapter inside a model to a file.")
@click.argument("model", type=click.Path())
@options.adapter_output
@options.adapter_name
@options.as_json
def command(model: str, output: str, name: str, as_json: bool) -> None:
    """Write the adapter that MODEL's slots are filled with to a file.

    \b
      onnx-adapt extract french.onnx -o fr.safetensors
    """
    import onnx_adapt as oa
    from onnx_adapt.model.file import protect_files

    with patience(f"reading {model}"):
        opened = oa.open_model(model)
        protect_files(opened, output)
        adapter = oa.extract(opened, name=name)
    path = oa.save_adapter(adapter, output)
    if as_json:
        filled = sorted(adapter.weights)
        print_json({"output": str(path), "name": adapter.name, "slots": filled})
    slots = count(len(adapter.weights), "slot")
    say(f"wrote {path} ({size_text(path.stat().st_size)}, {slots})")
    say_next("check", model, output)
