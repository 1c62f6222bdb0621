"""`onnx-adapt train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, say, say_next, size_text
from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.training_data import read_samples, read_settings
from onnx_adapt.cli.training_model import prove, save_both, with_what_trains
from onnx_adapt.cli.training_paths import check_paths
from onnx_adapt.cli.training_watch import Watch
from onnx_adapt.words import count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx_adapt import Model
    from onnx_adapt.training.data import Dataset
    from onnx_adapt.training.progress import Epoch
    from onnx_adapt.training.settings import Settings
    from onnx_adapt.training.train import Trained


@click.command("train", short_help="Train an adapter on the model's file alone.")
@click.argument("model", type=click.Path())
@options.data
@options.loss
@options.adapter_output
@click.option(
    "--model-output",
    "model_path",
    type=click.Path(),
    help="Where the model goes if it gets slots, a head or norms; by default "
    "MODEL.adapted.onnx.",
)
@options.head
@click.option("--train-norms", is_flag=True, help="Train the base's normalisations too.")
@options.adapter_name
@options.labels
@options.tokenizer
@options.texts
@options.max_length
@options.on_output
@click.option(
    "--teacher",
    type=click.Path(),
    help="A model whose output for the same samples is what to learn, as with kl.",
)
@options.loss_settings
@click.option("--validation", type=click.Path(), help="Data of its own to choose the best by.")
@click.option(
    "--held-back",
    type=click.FloatRange(0, 0.9),
    default=0.1,
    show_default=True,
    help="The share of the data to choose the best by, without --validation.",
)
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--steps", type=click.IntRange(1), help="How many steps to take, in place of --epochs."
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--accumulate",
    type=click.IntRange(1),
    default=1,
    help="How many batches make one step; their gradients are averaged.",
)
@click.option("--lr", "rate", type=click.FloatRange(0, min_open=True), help="Learning rate.")
@options.optimiser
@click.option("--schedule", default="cosine", show_default=True, help="Also linear, constant.")
@options.decay
@click.option(
    "--average",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Keep a moving average of the weights; the share of the old, such as 0.999.",
)
@click.option(
    "--metric",
    default="loss",
    show_default=True,
    help="What to choose the best weights by: loss, accuracy, f1 or recall@K.",
)
@click.option(
    "--patience",
    "patience_",
    type=click.IntRange(0),
    default=0,
    help="Stop after so many epochs that are no better.",
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
    "--checkpoint",
    type=click.Path(),
    help="A file that keeps how far the training is.",
)
@click.option("--resume", is_flag=True, help="Go on with the training in --checkpoint.")
@click.option(
    "--log",
    type=click.Path(),
    help="Write each step to this .csv or .jsonl, or to this folder for TensorBoard.",
)
@click.option(
    "--forward-only",
    is_flag=True,
    help="Train without gradients, for models that have none; slow.",
)
@click.option(
    "--frozen-memory",
    type=click.IntRange(0),
    metavar="MB",
    default=1024,
    show_default=True,
    help="What may be taken to keep, for each sample, what the layers before the first slot "
    "give. It is computed in every step if that is too little, or 0.",
)
@click.option(
    "--recompute",
    is_flag=True,
    help="Compute activations a second time on the way back: less memory, more time.",
)
@click.option("--no-check", is_flag=True, help="Do not compare the gradients first.")
@options.seed
@options.provider
@options.as_json
def command(model: str, output: str, as_json: bool, **given: Any) -> None:
    """Train an adapter for MODEL, without PyTorch.

    The gradients are computed by ONNX Runtime. MODEL stays as it is. If it has no slots yet,
    they are inserted where they have something to learn from, which is said, and the adapted
    model is written as well.

    \b
      onnx-adapt train base.onnx --data train.npz --loss cross_entropy -o mine.safetensors
      onnx-adapt train adapted.onnx --data train.npz --loss cross_entropy -o mine.safetensors
    """
    import onnx_adapt as oa
    from onnx_adapt.errors import TrainingError

    source = click.get_current_context().get_parameter_source("epochs")
    if given["steps"] and source is ParameterSource.COMMANDLINE:
        raise click.UsageError("give --epochs or --steps, not both")
    check_paths(model, output, given)
    opened = oa.open_model(model)
    samples = read_samples(opened, given)
    ready = with_what_trains(opened, samples[0], given)
    if given["model_path"] and ready is opened:
        raise click.UsageError("--model-output has no effect: MODEL stays as it is")
    failure = None
    try:
        trained = _train(opened, ready, samples, given["name"] or Path(output).stem, given)
    except TrainingError as error:
        if error.trained is None:
            raise
        trained, failure = cast("Trained", error.trained), error
    if ready is opened:
        oa.save_adapter(trained.adapter, output)
    else:
        with patience() as (progress, _):
            to = given["model_path"]
            model = save_both(model, to, ready, trained.adapter, Path(output), progress)
    _tell(model, output, trained, as_json=as_json)
    if failure is not None:
        say(f"error: {failure.message}; {output} has the best weights before that")
        say(f"hint: {failure.hint}")
        click.get_current_context().exit(1)
    if not trained.finished:
        kept = given["checkpoint"]
        say("stopped; it has the best weights until now")
        say(
            f"--resume goes on from {kept}" if kept else "--checkpoint FILE makes it resumable"
        )
        click.get_current_context().exit(130)
    say_next("run", model, "--inputs", "x.npz", "--adapter", output, "--compare", "base")


def _tell(model: str, output: str, trained: Trained, *, as_json: bool) -> None:
    """Print what was written."""
    slots = count(len(trained.adapter.weights), "slot")
    if not trained.checks:
        say("the gradients were not compared with differences of the loss")
    say(f"wrote {output} ({size_text(Path(output).stat().st_size)}, {slots})")
    if not as_json:
        return
    print_json(
        {
            "output": output,
            "model": model,
            "name": trained.adapter.name,
            "classes": list(trained.classes),
            "finished": trained.finished,
            "epochs": [_epoch_fields(epoch) for epoch in trained.epochs],
        }
    )


def _epoch_fields(epoch: Epoch) -> dict[str, Any]:
    fields = asdict(epoch)
    return {"epoch": fields.pop("number"), **fields}


def _settings(given: Mapping[str, Any]) -> Settings:
    """The settings that the options say."""
    from onnx_adapt.training.optimisers import Optimiser
    from onnx_adapt.training.settings import Settings

    return Settings(
        epochs=given["epochs"],
        steps=given["steps"] or 0,
        batch_size=given["batch_size"],
        accumulate=given["accumulate"],
        rate=given["rate"] or 0.0,
        optimiser=Optimiser(given["optimiser"], decay=given["decay"]),
        schedule=given["schedule"],
        average=given["average"],
        metric=given["metric"],
        patience=given["patience_"],
        seed=given["seed"],
        forward_only=given["forward_only"],
        frozen_memory=given["frozen_memory"],
        recompute=given["recompute"],
    )


def _train(
    base: Model,
    model: Model,
    samples: tuple[Dataset, Dataset | float],
    name: str,
    given: Mapping[str, Any],
) -> Trained:
    """Train, and tell of each epoch; a model that was made of the base is verified first."""
    import onnx_adapt as oa
    from onnx_adapt.training.open_log import open_log

    settings = _settings(given)
    begin = oa.load_adapter(given["start_from"]) if given["start_from"] else None
    log = open_log(given["log"], resume=given["resume"]) if given["log"] else None
    with patience("verifying") as (_, stage), Watch(settings, log, stage) as watch:
        if model is not base:
            prove(base, model, samples[0], given["provider"], stage)
        stage("checking gradients")
        return oa.train(
            model,
            samples[0],
            loss=given["loss"],
            name=name,
            output="" if given["head"] else given["model_output"],
            loss_settings=read_settings(given["loss_settings"]),
            bottleneck=given["bottleneck"],
            start_from=begin,
            validation=samples[1],
            settings=settings,
            check=not given["no_check"],
            provider=given["provider"],
            on_step=watch.tell,
            notice=say,
            stop=watch.is_stopped,
            checkpoint=given["checkpoint"],
            resume=given["resume"],
        )
