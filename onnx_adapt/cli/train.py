"""`onnx-adapt train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, refuse_to_replace, say, say_next, size_text
from onnx_adapt.cli.progress import patience
from onnx_adapt.formats import suffix_list
from onnx_adapt.words import count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx_adapt.training.fit import Epoch, Report
    from onnx_adapt.training.train import Trained


@click.command("train", short_help="Train an adapter on the model's file alone.")
@click.argument("model", type=click.Path())
@click.option(
    "--data",
    required=True,
    type=click.Path(),
    help="An .npz with an array for each input and the labels, or a folder of .npy files.",
)
@click.option(
    "--loss",
    required=True,
    help="cross_entropy, mse, mae, huber, bce, cosine, contrastive or kl.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help=f"The adapter file to write. Its suffix tells the format: {suffix_list()}.",
)
@options.adapter_name
@click.option(
    "--labels", default="labels", show_default=True, help="What the labels are called."
)
@click.option(
    "--on", "model_output", default="", help="The model's output that the loss is on."
)
@click.option(
    "--set",
    "loss_settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the loss, such as label_smoothing=0.1. Repeatable.",
)
@click.option("--validation", type=click.Path(), help="Data of its own to choose the best by.")
@click.option(
    "--held-back",
    type=click.FloatRange(0, 0.9),
    default=0.1,
    show_default=True,
    help="The share of the data to choose the best by, without --validation.",
)
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--lr", "rate", type=click.FloatRange(0, min_open=True), help="Learning rate.")
@click.option(
    "--optimiser", default="adamw", show_default=True, help="Also sgd, momentum, lion."
)
@click.option("--schedule", default="cosine", show_default=True, help="Also linear, constant.")
@click.option("--decay", type=click.FloatRange(0), default=0.0, help="Weight decay.")
@click.option(
    "--metric",
    default="loss",
    show_default=True,
    help="What to choose the best weights by: loss, accuracy, f1 or recall.",
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
@click.option("--no-check", is_flag=True, help="Do not compare the gradients first.")
@options.seed
@options.provider
@options.as_json
def command(model: str, output: str, as_json: bool, **given: Any) -> None:
    """Train an adapter for the slots of MODEL, without PyTorch.

    The gradients are computed by ONNX Runtime. The base and MODEL stay as they are.

    \b
      onnx-adapt insert base.onnx --after 'encoder.layer.*.output.dense' -o adapted.onnx
      onnx-adapt train adapted.onnx --data train.npz --loss cross_entropy -o mine.safetensors
    """
    import onnx_adapt as oa

    read = [Path(model), Path(given["data"])]
    read += [Path(given[key]) for key in ("validation", "start_from") if given[key]]
    refuse_to_replace(output, *read)
    trained = _train(model, given["name"] or Path(output).stem, given)
    path = oa.save_adapter(trained.adapter, output)
    if as_json:
        epochs = [_epoch_fields(epoch) for epoch in trained.epochs]
        print_json({"output": str(path), "name": trained.adapter.name, "epochs": epochs})
    slots = count(len(trained.adapter.weights), "slot")
    say(f"wrote {path} ({size_text(path.stat().st_size)}, {slots})")
    say_next("run", model, "--inputs", "x.npz", "--adapter", output, "--compare", "base")


def _train(model: str, name: str, given: Mapping[str, Any]) -> Trained:
    """Train, and tell of each epoch."""
    import onnx_adapt as oa
    from onnx_adapt.training.fit import Settings
    from onnx_adapt.training.optimisers import Optimiser

    settings = Settings(
        epochs=given["epochs"],
        batch_size=given["batch_size"],
        rate=given["rate"] or 0.0,
        optimiser=Optimiser(given["optimiser"], decay=given["decay"]),
        schedule=given["schedule"],
        metric=given["metric"],
        patience=given["patience_"],
        seed=given["seed"],
    )
    begin = given["start_from"]
    with patience("checking gradients") as (_, stage):

        def watch(report: Report) -> None:
            stage(f"step {report.step} of {report.steps}, loss {report.loss:.4f}")
            if report.epoch is not None:
                say(_epoch_text(report.epoch, settings.epochs, settings.metric))

        return oa.train(
            oa.open_model(model),
            given["data"],
            loss=given["loss"],
            name=name,
            output=given["model_output"],
            labels=given["labels"],
            loss_settings=_settings(given["loss_settings"]),
            bottleneck=given["bottleneck"],
            start_from=oa.load_adapter(begin) if begin else None,
            validation=given["validation"] or given["held_back"],
            settings=settings,
            check=not given["no_check"],
            provider=given["provider"],
            on_step=watch,
        )


def _settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a loss: numbers, lists of numbers, true or false."""
    import json

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            found[key] = json.loads(value)
        except ValueError as error:
            raise click.BadParameter(
                f"{pair!r}: give KEY=VALUE with a number, [1, 2, ...], true or false"
            ) from error
        if not equals:
            raise click.BadParameter(f"{pair!r}: give KEY=VALUE")
    return found


def _epoch_text(epoch: Epoch, epochs: int, metric: str) -> str:
    text = f"epoch {epoch.number} of {epochs}: loss {epoch.loss:.4f}"
    if epoch.validation_loss is not None:
        text += f", held back {epoch.validation_loss:.4f}"
    if epoch.score is not None and metric != "loss":
        text += f", {metric} {epoch.score:.4f}"
    return f"{text}, best so far" if epoch.best and epoch.score is not None else text


def _epoch_fields(epoch: Epoch) -> dict[str, Any]:
    return {
        "epoch": epoch.number,
        "loss": epoch.loss,
        "validation_loss": epoch.validation_loss,
        "score": epoch.score,
        "best": epoch.best,
    }
