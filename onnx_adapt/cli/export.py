"""`onnx-adapt export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import output_path, print_json, say, say_next, tell_saved
from onnx_adapt.cli.progress import patience

if TYPE_CHECKING:
    from onnx_adapt import Adapter, Model


@click.command("export", short_help="Make the weights of slots required inputs.")
@click.argument("model", type=click.Path())
@click.option(
    "--required",
    is_flag=True,
    required=True,
    help="Make the weights of the slots inputs that must be fed.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="The file to write; by default MODEL.required.onnx.",
)
@options.keep_external
@options.force
@options.as_json
def command(
    model: str,
    required: bool,
    output: str | None,
    keep_external: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write MODEL for runtimes that cannot replace an initializer.

    onnxruntime-node, onnxruntime-web and OpenVINO are such runtimes. In the result the
    weights of slots have no default, so each run feeds an adapter. Beside it, with the
    suffix .safetensors, is the adapter that turns the slots off. Every other command takes
    the result as it takes MODEL.

    \b
      onnx-adapt export adapted.onnx --required -o required.onnx
      onnx-adapt run required.onnx --inputs x.npz --adapter fr.safetensors
    """
    import onnx_adapt as oa

    opened = oa.open_model(model)
    path = output_path(model, output, "required")
    result, neutral = oa.export(opened, name=path.stem)
    file, data = _neutral_file(opened, path, neutral)
    with patience() as (progress, _):
        saved = oa.save_model(
            result,
            path,
            overwrite=force,
            keep_external=keep_external,
            beside=[(file, [data])],
            progress=progress,
        )
    if as_json:
        inputs = list(neutral.feeds())
        print_json({"output": str(saved.path), "neutral": str(file), "inputs": inputs})
    tell_saved(saved)
    say(f"wrote {file}: feed it where no other adapter is chosen")
    say_next("verify", "BASE.onnx", path)


def _neutral_file(model: Model, path: Path, neutral: Adapter) -> tuple[Path, bytes]:
    """The file of the neutral adapter beside an output, with its bytes.

    Raises:
        SaveError: If another file is there, which may be a trained adapter.
    """
    from onnx_adapt.adapter.files import encode_adapter
    from onnx_adapt.errors import SaveError
    from onnx_adapt.model.file import protect_files

    file = path.absolute().with_suffix(".safetensors")
    hint = "choose another name for the output, or move that file away"
    if file == path.absolute():
        raise SaveError(f"{path} is no name for a model", hint="end it in .onnx")
    protect_files(model, file)
    data = encode_adapter(neutral, file)
    if os.path.lexists(file) and not (file.is_file() and file.read_bytes() == data):
        raise SaveError(f"{file} exists, and is not what would be written there", hint=hint)
    return file, data
