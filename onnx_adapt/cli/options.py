"""The options that several commands share, each written once."""

from __future__ import annotations

import click

from onnx_adapt.formats import format_names, suffix_list

MAX_BOTTLENECK = 1 << 16
"""The largest bottleneck that commands accept; weights beyond it would not fit into memory."""

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

force = click.option("--force", is_flag=True, help="Allow the output to replace MODEL.")

adapter_output = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help=f"The adapter file to write. Its suffix tells the format: {suffix_list()}.",
)

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

part = click.option(
    "--part",
    default="",
    metavar="PATH",
    help="Take only the checkpoint's modules under PATH, such as model.encoder; the graph is "
    "that part of the model.",
)


def _module_map(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> dict[str, str]:
    """The beginnings of module paths, and what replaces each."""
    found: dict[str, str] = {}
    for item in value:
        old, equals, new = (word.strip(" .") for word in item.partition("="))
        if not equals or old in found or old == new:
            raise click.BadParameter(f"{item!r}: give OLD=NEW, each OLD once")
        found[old] = new
    return found


module_map = click.option(
    "--map",
    "module_map",
    multiple=True,
    metavar="OLD=NEW",
    callback=_module_map,
    help="Rename the modules of the checkpoint whose paths begin with OLD, before --part. "
    "Repeatable.",
)

allow_missing = click.option(
    "--allow-missing",
    multiple=True,
    metavar="GLOB",
    help="Leave out the checkpoint's modules that match GLOB and that the graph lacks. "
    "Repeatable.",
)

adapter_name = click.option("--name", default="", help="The name to give the adapter.")

data = click.option(
    "--data",
    required=True,
    type=click.Path(),
    help="An .npz, .csv, .jsonl or .parquet with each input and the labels, or a folder of "
    ".npy files.",
)

loss = click.option(
    "--loss",
    required=True,
    help="cross_entropy, mse, mae, huber, bce, cosine, contrastive, triplet or kl.",
)

labels = click.option(
    "--labels", default="labels", show_default=True, help="What the labels are called."
)

tokenizer = click.option(
    "--tokenizer", type=click.Path(), help="A tokenizer.json that turns texts into inputs."
)

max_length = click.option(
    "--max-length",
    type=click.IntRange(1),
    help="The most tokens of a text; longer ones are cut, and it is said how many.",
)

texts = click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="COLUMN",
    help="The column with the texts; twice for pairs. By default the only one with texts.",
)

on_output = click.option(
    "--on", "model_output", default="", help="The model's output that the loss is on."
)

head = click.option(
    "--head",
    metavar="classes=N[,pooling=mean|cls]",
    help="Add a linear layer on the output, which trains too.",
)

loss_settings = click.option(
    "--set",
    "loss_settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the loss, such as label_smoothing=0.1. Repeatable.",
)

file_format = click.option(
    "--format",
    "file_format",
    default=format_names()[0],
    show_default=True,
    type=click.Choice(format_names()),
    help="The format of the adapter file that is written.",
)

optimiser = click.option(
    "--optimiser", default="adamw", show_default=True, help="Also sgd, momentum, lion."
)

decay = click.option("--decay", type=click.FloatRange(0), default=0.0, help="Weight decay.")
