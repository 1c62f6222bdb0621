"""The options that several commands share, each written once."""

from __future__ import annotations

import click

MAX_BOTTLENECK = 1 << 16
"""The largest bottleneck that commands accept; weights beyond it would not fit into memory."""

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

force = click.option("--force", is_flag=True, help="Allow the output to replace MODEL.")

keep_external = click.option(
    "--keep-external",
    is_flag=True,
    help="Leave external data where it is instead of copying it.",
)

inputs = click.option(
    "--inputs",
    multiple=True,
    type=click.Path(),
    help="An .npz with an array for each input of the model. Repeatable.",
)

strict = click.option(
    "--strict", is_flag=True, help="Fail if a slot does not change any output."
)

seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The seed for all random numbers.",
)

provider = click.option(
    "--provider",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="Where ONNX Runtime runs the model, such as cuda or cuda:device_id=1; by default "
    "the CPU. Repeatable, in order of preference.",
)

allow_partial = click.option(
    "--allow-partial",
    is_flag=True,
    help="Accept an adapter that has no weights for some slots.",
)

base_weights = click.option(
    "--base-weights",
    type=click.Path(),
    help="The base's own checkpoint, for a graph that has lost its module names.",
)

adapter_name = click.option("--name", default="", help="The name to give the adapter.")
