"""`onnx-adapt train-graph`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, say, tell_saved, tell_thin
from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.training_data import read_settings

if TYPE_CHECKING:
    from onnx_adapt.training.step_file import StepFile


@click.command("train-graph", short_help="Write a model that trains, for other programs.")
@click.argument("model", type=click.Path())
@options.loss
@click.option(
    "-o", "--output", required=True, type=click.Path(), help="The model file to write."
)
@options.on_output
@options.loss_settings
@options.optimiser
@options.decay
@click.option(
    "--clip",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="The largest norm of all gradients together; 0 for no limit.",
)
@click.option(
    "--bottleneck",
    type=click.IntRange(1, options.MAX_BOTTLENECK),
    default=16,
    show_default=True,
    help="The bottleneck of slots that have none of their own.",
)
@click.option("--start-from", type=click.Path(), help="An adapter file to go on from.")
@click.option(
    "--thin", is_flag=True, help="Refer to the weights in MODEL; see `insert --help`."
)
@options.seed
@options.force
@options.as_json
def command(
    model: str, output: str, thin: bool, force: bool, as_json: bool, **given: Any
) -> None:
    """Write a model of which each run takes one step of training the slots of MODEL.

    Any ONNX Runtime runs it: from C++ or JavaScript, in a browser, on a phone. Its inputs
    are those of the base, `labels`, `rate`, and the weights and the memory of the optimiser;
    its outputs the loss, and next:NAME for each input NAME that the following step takes.
    Beside it, OUTPUT.start.onnx is a model without inputs that gives the first values.

    \b
      onnx-adapt train-graph adapted.onnx --loss cross_entropy -o step.onnx
    """
    import onnx_adapt as oa
    from onnx_adapt.model.file import protect_files
    from onnx_adapt.training.optimisers import Optimiser
    from onnx_adapt.training.step_file import train_graph

    opened = oa.open_model(model)
    begin = given["start_from"]
    step = train_graph(
        opened,
        loss=given["loss"],
        output=given["model_output"],
        loss_settings=read_settings(given["loss_settings"]),
        optimiser=Optimiser(given["optimiser"], given["decay"], given["clip"]),
        bottleneck=given["bottleneck"],
        start_from=oa.load_adapter(begin) if begin else None,
        seed=given["seed"],
    )
    start = Path(output).absolute().with_suffix(".start.onnx")
    protect_files(opened, start)
    data = step.start.SerializeToString()
    with patience() as (progress, _):
        saved = oa.save_model(
            *(step.model, output),
            overwrite=force,
            thin=thin,
            beside=[(start, [data])],
            progress=progress,
        )
    if as_json:
        print_json(_fields(step, str(saved.path), str(start)))
    tell_saved(saved)
    say(f"wrote {start.name}: run it once for the first values of what is carried")
    if thin:
        tell_thin(opened, saved)


def _fields(step: StepFile, output: str, start: str) -> dict[str, Any]:
    """What a program has to know, by stable keys."""
    from onnx_adapt.training.step_file import NEXT, RATE

    return {
        "output": output,
        "start": start,
        "inputs": list(step.inputs),
        "labels": "labels",
        "rate": RATE,
        "loss": "loss",
        "model_output": step.output,
        "carried": {name: f"{NEXT}{name}" for name in step.carried},
    }
