"""`onnx-adapt insert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli.complete import activation_names, site_names
from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.show import (
    file_label,
    print_json,
    print_table,
    say,
    say_next,
    tell_saved,
    tell_thin,
)
from onnx_adapt.cli.slots import SLOT_COLUMNS, slot_dict, slot_row
from onnx_adapt.formats import format_names, suffix_of
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt import Adapter, Model, Report
    from onnx_adapt.model.file import Saved

MAX_BOTTLENECK = 1 << 16
"""No adapter is as wide; its weights would not fit into memory."""

_MOST_WARNINGS = 3
"""About ranges: a quantised model has one for each slot, and they say the same."""


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
    help="Address, node, tensor, module path or glob (`*` within a part of a path, `**` "
    "across). Repeatable.",
)
@click.option("--adapter", type=click.Path(), help="A PEFT or AdapterHub folder, instead.")
@click.option(
    "--calibrate",
    multiple=True,
    type=click.Path(),
    help="An .npz to run a quantised MODEL with: its ranges are widened for the adapter "
    "(with --after, of the adapter file that --adapter names).",
)
@click.option("--name", default="", help="What to call that adapter.")
@click.option("--base-weights", type=click.Path(), help="For a graph that lost its names.")
@click.option(
    "--format",
    "file_format",
    default=format_names()[0],
    type=click.Choice(format_names()),
    help="Of the adapter's file.",
)
@click.option("-o", "--output", type=click.Path(), help="Default: MODEL.adapted.onnx.")
@click.option("--swappable/--baked", default=True, help="Weights fed per run, or constants.")
@click.option(
    "--batched", is_flag=True, help="Let one run give each row of a batch another adapter."
)
@click.option(
    "--bottleneck",
    type=click.IntRange(max=MAX_BOTTLENECK),
    help="Fix the inner size; it starts as the identity.",
)
@click.option(
    "--activation",
    default="relu",
    show_default=True,
    help="Between projections.",
    shell_complete=activation_names,
)
@click.option("--bias", is_flag=True, help="Give both projections a bias.")
@click.option("--source", default="", help="A tensor for the adapter to read instead.")
@click.option(
    "--axis",
    metavar="[-1|last|1]",
    callback=_axis,
    help="The feature axis, where you know it: the last one, or 1 for channels.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the random down-projection.",
)
@click.option("--inline-functions", is_flag=True, help="Inline model-local functions first.")
@click.option("--inputs", multiple=True, type=click.Path(), help="An .npz to verify with.")
@click.option("--no-verify", is_flag=True, help="Do not run the result in ONNX Runtime.")
@click.option("--keep-external", is_flag=True, help="Do not copy external data.")
@click.option(
    "--thin",
    is_flag=True,
    help="Leave the weights in MODEL's file and refer to it: a few kB, beside MODEL.",
)
@click.option("--force", is_flag=True, help="Let the output replace MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: str,
    after: tuple[str, ...],
    adapter: str | None,
    calibrate: tuple[str, ...],
    name: str,
    base_weights: str | None,
    file_format: str,
    output: str | None,
    swappable: bool,
    batched: bool,
    bottleneck: int | None,
    activation: str,
    bias: bool,
    source: str,
    axis: int | None,
    seed: int,
    inline_functions: bool,
    inputs: tuple[str, ...],
    no_verify: bool,
    keep_external: bool,
    thin: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Insert an adapter slot into MODEL after each named place.

    \b
      onnx-adapt insert model.onnx --after encoder.layer.0.output.dense
      onnx-adapt insert model.onnx --after 'encoder.layer.*.output.dense' --bias
      onnx-adapt insert model.onnx --adapter trained/ -o adapted.onnx
      onnx-adapt insert model.onnx --adapter trained/ --baked --thin
      onnx-adapt insert model.onnx --adapter trained/ --batched
      onnx-adapt insert qdq.onnx --adapter trained/ --calibrate inputs.npz

    With --adapter, the slots that a trained checkpoint needs, and its weights beside the
    output as OUTPUT.NAME.safetensors (with --baked inside it). With --thin, the output needs
    MODEL beside it; `onnx-adapt pack` makes it whole. A result that cannot be proven in ONNX
    Runtime is not written: give --inputs that MODEL runs with, or --no-verify.
    """
    import onnx_adapt as oa
    from onnx_adapt.adapter.files import encode_adapter
    from onnx_adapt.edit.ranges import widened_ranges
    from onnx_adapt.model.destination import resolve_destination
    from onnx_adapt.proof.saturation import range_warnings

    base = oa.open_model(model)
    path = Path(model).with_suffix(".adapted.onnx") if output is None else output
    before = {slot.name for slot in oa.list_slots(base)}
    trained = oa.load_adapter(adapter) if adapter and after and calibrate else None
    if bool(after) == bool(adapter) and trained is None:
        raise click.UsageError(
            "give either --after, a place that `onnx-adapt sites` lists, or --adapter"
        )
    _refuse_idle(
        "--after" if after else "--adapter",
        {"bias": bias, "activation": activation != "relu", "bottleneck": bottleneck}
        | {
            "source": source,
            "axis": axis is not None,
            "seed": seed,
            "inline-functions": inline_functions,
        }
        if not after
        else {
            "name": name,
            "base-weights": base_weights,
            "format": file_format != format_names()[0],
        },
    )
    if batched:
        _refuse_idle("--batched", {"baked": not swappable, "bottleneck": bool(bottleneck)})
    with patience(f"reading {adapter or model}"):
        checkpoint = None
        if adapter and not after:
            checkpoint = oa.load_checkpoint(
                adapter, base, name=name, base_weights=base_weights
            )
            adapted = oa.insert_checkpoint(
                base, checkpoint, baked=not swappable, batched=batched
            )
        else:
            adapted = oa.insert(
                base,
                after=after,
                activation=activation,
                bias=bias,
                source=source,
                axis=axis,
                bottleneck=bottleneck,
                baked=not swappable,
                batched=batched,
                seed=seed,
                inline_functions=inline_functions,
            )
    trained = trained or (checkpoint.adapter if checkpoint else None)
    if calibrate and trained is None:
        raise click.UsageError(
            "--calibrate widens ranges for an adapter; give it with --adapter as well"
        )
    if calibrate and trained is not None:
        with patience("measuring what the adapter brings"):
            adapted = oa.calibrate(adapted, trained, calibrate)
    slots = [slot for slot in oa.list_slots(adapted) if slot.name not in before]
    resolve_destination(path)  # before a proof that may take long
    warnings = [] if calibrate else range_warnings(adapted, slots)
    with patience() as (progress, stage):
        used = trained if calibrate or not swappable else None
        given = inputs or calibrate
        proof = None if no_verify else _prove(base, adapted, given, used, stage)
        weights = None
        if checkpoint is not None and swappable:
            place = Path(path).absolute()
            label = file_label(checkpoint.adapter)
            weights = place.parent / f"{place.stem}.{label}{suffix_of(file_format)}"
        saved = oa.save_model(
            adapted,
            path,
            overwrite=force,
            keep_external=keep_external,
            thin=thin,
            beside=[(weights, [encode_adapter(checkpoint.adapter, weights)])]
            if checkpoint and weights
            else [],
            progress=progress,
        )
    widened = widened_ranges(adapted)
    if as_json:
        print_json(
            {
                "output": str(saved.path),
                "adapter": str(weights) if weights else None,
                "size": saved.size,
                "data": [str(file) for file in saved.data],
                "weights_in": [str(file) for file in saved.weights_in],
                "verified": proof is not None,
                "warnings": warnings,
                "widened": widened,
                "slots": [slot_dict(slot) for slot in slots],
            }
        )
    else:
        print_table(SLOT_COLUMNS, [slot_row(slot) for slot in slots])
    _tell(base, saved, proof)
    _tell_ranges(warnings, widened)
    if thin:
        tell_thin(base, saved)
    if weights is not None:
        say(f"wrote {weights}; feed its tensors by name, or `onnx-adapt fill` them in")
    say_next("verify", model, path, *(word for file in inputs for word in ("--inputs", file)))


def _refuse_idle(given: str, options: dict[str, object]) -> None:
    """Refuse options that would have no effect."""
    idle = [f"--{name}" for name, value in options.items() if value]
    if idle:
        raise click.UsageError(f"{', '.join(idle)} has no effect with {given}")


def _tell_ranges(warnings: list[str], widened: list[str]) -> None:
    """What became of the ranges of a quantised model, or may."""
    from onnx_adapt.proof.result import CALIBRATE

    for text in warnings[:_MOST_WARNINGS]:
        say(f"warning: {text}")
    if len(warnings) > _MOST_WARNINGS:
        say(
            f"warning: the same of {len(warnings) - _MOST_WARNINGS} more slots; --json has all"
        )
    if warnings:
        say(f"hint: `onnx-adapt verify --adapter` measures it; {CALIBRATE}")
    if widened:
        say(f"widened the ranges of {count(len(widened), 'QuantizeLinear node')}")


def _prove(
    base: Model,
    adapted: Model,
    inputs: tuple[str, ...],
    adapter: Adapter | None,
    stage: Callable[[str], None],
) -> Report:
    """Check the result before anything is written; what cannot be proven is not written."""
    import onnx_adapt as oa

    report = oa.verify(
        base, adapted, inputs=inputs or None, weights=False, adapter=adapter, stage=stage
    )
    for text in report.warnings:
        say(f"warning: {text}")
    return report.raise_for_mismatch()


def _tell(base: Model, saved: Saved, proof: Report | None) -> None:
    if proof is not None:
        detail = next(check.detail for check in proof.checks if check.name == "off")
        say(f"verified against {base.label}: {detail}")
    tell_saved(saved)
    if not base.canonical:
        say(
            f"note: {base.label} is not encoded as protobuf encodes it; removing the slots "
            "gives the same model, but not the same bytes"
        )
