"""`onnx-adapt insert`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onnx_adapt.cli import options
from onnx_adapt.cli.complete import activation_names, site_names
from onnx_adapt.cli.insert_folder import insert_into_folder
from onnx_adapt.cli.inserted import (
    Shown,
    show_inserted,
    show_planned,
    tell_growth,
    tell_update_cost,
)
from onnx_adapt.cli.outputs import adapter_beside, output_path, say, say_next, tell_thin
from onnx_adapt.cli.progress import patience

if TYPE_CHECKING:
    from onnx_adapt import Adapter, Checkpoint, Model, Report
    from onnx_adapt.report.costs import UpdateCost

_ONLY_WITH_AFTER = (
    *("bias", "activation", "bottleneck", "source", "axis", "seed", "inline_functions"),
)
_READING = ("name", "base_weights", "part", "module_map", "allow_missing")
_ONLY_WITH_CHECKPOINT = (*_READING, "file_format")
_NOT_WITH_BATCHED = ("swappable", "bottleneck")
"""The options that have no effect without another one, or with it."""


def _axis(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """An axis as a number; `last` is -1."""
    try:
        return None if value is None else -1 if value == "last" else int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no axis; give -1, last or 1") from None


@click.command("insert", short_help="Insert adapter slots into a model.")
@click.argument("model", type=click.Path())
@click.option(
    "--after",
    multiple=True,
    shell_complete=site_names,
    help="Where to insert a slot: an address, node, tensor, module path or glob (`*` matches "
    "within a part of a path, `**` across parts). Repeatable.",
)
@click.option(
    "--adapter",
    type=click.Path(),
    help="A trained adapter as its library saved it, a folder or a file: insert the slots "
    "that it needs.",
)
@click.option(
    "--calibrate",
    multiple=True,
    type=click.Path(),
    help="An .npz to run a quantised MODEL with. Its ranges are widened so that they hold the "
    "values of --adapter, which with --after is an adapter file. Repeatable.",
)
@options.adapter_name
@options.base_weights
@options.part
@options.module_map
@options.allow_missing
@options.file_format
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="The file to write; by default MODEL.adapted.onnx.",
)
@click.option(
    "--swappable/--baked",
    default=True,
    help="Whether the weights can be fed at each run or are constants.",
)
@click.option(
    "--batched", is_flag=True, help="Let each row of a batch have an adapter of its own."
)
@click.option(
    "--bottleneck",
    type=click.IntRange(max=options.MAX_BOTTLENECK),
    help="Fix the inner size; the slot then starts with random weights that change nothing.",
)
@click.option(
    "--activation",
    default="relu",
    show_default=True,
    help="The activation between the two projections.",
    shell_complete=activation_names,
)
@click.option("--bias", is_flag=True, help="Give both projections a bias.")
@click.option("--source", default="", help="The tensor that the adapter reads instead.")
@click.option(
    "--axis",
    metavar="[-1|last|1]",
    callback=_axis,
    help="The feature axis, if it cannot be found: the last one, or 1 for channels.",
)
@options.seed
@click.option(
    "--inline-functions", is_flag=True, help="Inline the model's own functions first."
)
@options.inputs
@click.option("--stack", is_flag=True, help="Insert behind slots that are at a place already.")
@click.option("--no-verify", is_flag=True, help="Do not prove the result in ONNX Runtime.")
@options.provider
@options.keep_external
@click.option(
    "--thin",
    is_flag=True,
    help="Refer to the weights in MODEL's file instead of copying them; the result is a few "
    "kB and needs MODEL beside it.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show what would be inserted; prove and write nothing."
)
@click.option("--long", is_flag=True, help="Show a line for each slot, however many.")
@options.force
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    after: tuple[str, ...],
    adapter: str | None,
    calibrate: tuple[str, ...],
    file_format: str,
    output: str | None,
    swappable: bool,
    batched: bool,
    inputs: tuple[str, ...],
    no_verify: bool,
    provider: tuple[str, ...],
    keep_external: bool,
    thin: bool,
    dry_run: bool,
    long: bool,
    force: bool,
    as_json: bool,
    **slot: Any,
) -> None:
    """Insert an adapter slot into MODEL after each named place.

    \b
      onnx-adapt insert model.onnx --after encoder.layer.0.output.dense
      onnx-adapt insert model.onnx --after 'encoder.layer.*.output.dense' --dry-run
      onnx-adapt insert model.onnx --adapter trained/ -o adapted.onnx
      onnx-adapt insert model.onnx --adapter trained/ --baked --thin
      onnx-adapt insert model.onnx --adapter trained/ --batched
      onnx-adapt insert qdq.onnx --adapter trained/ --calibrate inputs.npz
      onnx-adapt insert whisper/ --adapter trained/ -o whisper-adapted/

    MODEL can be a folder with a model in several files, such as an encoder and decoders:
    with --adapter, each file gets the slots for its modules, OUTPUT is a folder, and one
    adapter file is for all of them.

    With --adapter, the slots that a trained checkpoint needs are inserted. Its weights are
    written beside the output as OUTPUT.NAME.safetensors, or into it with --baked. A --thin
    output needs MODEL beside it; `onnx-adapt pack` makes it independent. A result that
    cannot be proven in ONNX Runtime is not written: give --inputs that MODEL runs with, or
    --no-verify.
    """
    import onnx_adapt as oa
    from onnx_adapt.model.destination import resolve_destination

    if Path(model).is_dir():
        insert_into_folder(ctx)
        return
    _refuse_conflicts(ctx)
    base = oa.open_model(model)
    path = output_path(model, output, "adapted")
    with patience(f"reading {adapter or model}"):
        checkpoint, trained = _read_adapter(base, adapter, after, ctx.params)
        form = {"baked": not swappable, "batched": batched}
        adapted = _with_slots(base, checkpoint, after, {**form, **slot})
    if calibrate and trained is not None:
        with patience("measuring what the adapter brings"):
            adapted = oa.calibrate(adapted, trained, calibrate, provider=provider)
    if dry_run:
        show_planned(base, adapted, long=long, as_json=as_json)
        return
    resolve_destination(path)  # before a proof that may take long
    with patience() as (progress, stage):
        used = trained if calibrate or not swappable else None
        given = base, adapted, inputs or calibrate or None, used, provider
        proof = None if no_verify else _prove(*given, stage)
        cost = _cost(*given[:2], trained, given[2], provider) if proof else None
        weights = adapter_beside(path, checkpoint, file_format) if swappable else []
        form = {"overwrite": force, "keep_external": keep_external, "thin": thin}
        saved = oa.save_model(adapted, path, beside=weights, progress=progress, **form)
    shown = Shown(calibrated=bool(calibrate), long=long, as_json=as_json)
    show_inserted(base, adapted, saved, proof, [file for file, _ in weights], shown)
    tell_update_cost(cost)
    if thin:
        tell_thin(base, saved)
    say_next("verify", model, path, *(word for item in inputs for word in ("--inputs", item)))


def _refuse_conflicts(ctx: click.Context) -> None:
    """Refuse options that contradict each other or would have no effect.

    Raises:
        UsageError: If there are some.
    """
    after, adapter, calibrate = (ctx.params[key] for key in ("after", "adapter", "calibrate"))
    if bool(after) == bool(adapter) and not (after and calibrate):
        raise click.UsageError(
            "give either --after, a place that `onnx-adapt sites` lists, or --adapter"
        )
    if calibrate and not adapter:
        raise click.UsageError(
            "--calibrate widens ranges for an adapter; give it with --adapter as well"
        )
    if after:
        _refuse_idle(ctx, "--after", _ONLY_WITH_CHECKPOINT)
    else:
        _refuse_idle(ctx, "--adapter", _ONLY_WITH_AFTER)
    if ctx.params["batched"]:
        _refuse_idle(ctx, "--batched", _NOT_WITH_BATCHED)
    if ctx.params["no_verify"]:
        _refuse_idle(ctx, "--no-verify", ("inputs", *(() if calibrate else ("provider",))))


def _refuse_idle(ctx: click.Context, given: str, names: Sequence[str]) -> None:
    """Refuse options that were given but have no effect."""
    params = {param.name: param for param in ctx.command.params}
    idle = []
    for name in names:
        param, value = params[name], ctx.params[name]
        written = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if written and value != param.get_default(ctx):
            idle.append((param.secondary_opts if value is False else param.opts)[0])
    if idle:
        raise click.UsageError(f"{', '.join(idle)} has no effect with {given}")


def _read_adapter(
    base: Model, adapter: str | None, after: Sequence[str], params: dict[str, Any]
) -> tuple[Checkpoint | None, Adapter | None]:
    """The checkpoint to insert, if no place is given, and the adapter that is meant."""
    import onnx_adapt as oa

    if not adapter:
        return None, None
    if after:
        return None, oa.load_adapter(adapter)
    reading = {key: params[key] for key in _READING}
    checkpoint = oa.load_checkpoint(adapter, base, **reading)
    tell_growth(checkpoint.adapter, checkpoint.read)
    return checkpoint, checkpoint.adapter


def _with_slots(
    base: Model, checkpoint: Checkpoint | None, after: Sequence[str], options: dict[str, Any]
) -> Model:
    """The model with the slots of a checkpoint, or with slots at the places that are named."""
    import onnx_adapt as oa

    if checkpoint is None:
        given = {key: value for key, value in options.items() if key not in _READING}
        return oa.insert(base, after=after, **given)
    form = {name: options[name] for name in ("baked", "batched", "stack")}
    return oa.insert_checkpoint(base, checkpoint, **form)


def _cost(
    base: Model,
    adapted: Model,
    trained: Adapter | None,
    inputs: Sequence[str] | None,
    provider: Sequence[str],
) -> UpdateCost | None:
    """What slots on weights cost in each run."""
    from onnx_adapt.report.costs import update_cost

    return update_cost(base, adapted, trained, inputs, provider)


def _prove(
    base: Model,
    adapted: Model,
    inputs: Sequence[str] | None,
    adapter: Adapter | None,
    provider: Sequence[str],
    stage: Callable[[str], None],
) -> Report:
    """Verify the result before it is written.

    Raises:
        MismatchError: If a check fails.
    """
    import onnx_adapt as oa

    report = oa.verify(
        base,
        adapted,
        inputs=inputs,
        weights=False,
        adapter=adapter,
        provider=provider,
        stage=stage,
    )
    for text in report.warnings:
        say(f"warning: {text}")
    return report.raise_for_mismatch()
