"""`onnx-adapt build`."""

from __future__ import annotations

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.complete import activation_names
from onnx_adapt.cli.outputs import print_json, say, say_next, tell_saved


@click.command("build", short_help="Build an adapter as a model of its own.")
@click.argument("hidden_size", type=int)
@click.option(
    "--bottleneck", default=64, show_default=True, help="The inner size of the adapter."
)
@click.option(
    "--activation",
    default="relu",
    show_default=True,
    help="The activation between the two projections.",
    shell_complete=activation_names,
)
@click.option(
    "--name", default="adapter", show_default=True, help="The prefix of layer names."
)
@click.option("--bias/--no-bias", default=True, help="Give both projections a bias.")
@options.seed
@click.option(
    "-o", "--output", type=click.Path(), help="The file to write; by default NAME.onnx."
)
@options.as_json
def command(
    hidden_size: int,
    bottleneck: int,
    activation: str,
    name: str,
    bias: bool,
    seed: int,
    output: str | None,
    as_json: bool,
) -> None:
    """Build an adapter as a model of its own.

    Its input and its output have the shape (batch, HIDDEN_SIZE).

    \b
      onnx-adapt build 384 --bottleneck 64 -o adapter.onnx
    """
    import onnx_adapt as oa

    model = oa.build_adapter(
        hidden_size, bottleneck, activation=activation, name=name, bias=bias, seed=seed
    )
    saved = oa.save_model(model, output or f"{name}.onnx")
    nodes = [node.name for node in model.proto.graph.node]
    if as_json:
        print_json({"output": str(saved.path), "size": saved.size, "nodes": nodes})
    tell_saved(saved)
    say(f"layers: {', '.join(nodes)}")
    say_next("sites", saved.path.name if output is None else output)
