"""`onnx-adapt verify`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import emit, print_json, print_table, say, say_next
from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.report import check_page, saturates, verdict, write_page

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from onnx_adapt import Report


@click.command("verify", short_help="Prove that a model is its base plus slots.")
@click.argument("base", type=click.Path())
@click.argument("adapted", type=click.Path())
@options.inputs
@click.option(
    "--adapter",
    type=click.Path(),
    help="An adapter file: check that its values fit the quantised ranges.",
)
@click.option(
    "--gradients",
    is_flag=True,
    help="Check the gradients that `train` uses as well, against differences in float64.",
)
@options.strict
@options.seed
@options.provider
@click.option(
    "--html", type=click.Path(), help="Also write the HTML page of `report` to this file."
)
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    base: str,
    adapted: str,
    inputs: tuple[str, ...],
    adapter: str | None,
    gradients: bool,
    strict: bool,
    seed: int,
    provider: tuple[str, ...],
    html: str | None,
    as_json: bool,
) -> None:
    """Prove in ONNX Runtime that ADAPTED is BASE plus exactly its slots.

    The interface must be the same. The outputs with the slots off must be the same. With
    random weights, each slot must compute what the float64 formula gives, and must change
    the outputs. The ONNX checker must have no new complaint. For a quantised BASE and an
    adapter (--adapter, or one that ADAPTED is filled with), the values must also fit the
    ranges that BASE was calibrated for. With --gradients, the gradient of each weight of
    each slot must be what differences of the outputs in float64 say.

    \b
      onnx-adapt verify model.onnx model.adapted.onnx
      onnx-adapt verify model.onnx model.adapted.onnx --adapter fr.safetensors
    """
    import onnx_adapt as oa
    from onnx_adapt.model.file import protect_files
    from onnx_adapt.proof.result import CALIBRATE
    from onnx_adapt.report.overview import overview

    if html:
        check_page(Path(html), base, adapted, *inputs, *((adapter,) if adapter else ()))
    with patience(f"reading {adapted}") as (_, stage):
        given: dict[str, Any] = {"inputs": inputs or None, "strict": strict, "seed": seed}
        given["provider"] = provider
        if adapter:
            given["adapter"] = oa.load_adapter(adapter)
        if html:
            models = oa.open_model(base), oa.open_model(adapted)
            for model in models:
                protect_files(model, html)
            found = overview(*models, **given, stage=stage)
            report = found.report
        else:
            report = oa.verify(base, adapted, **given, stage=stage)
        if gradients:
            report = _with_gradients(report, adapted, given, stage)
    if html:
        write_page(replace(found, report=report), Path(html))
    if as_json:
        print_json(report.as_dict())
    else:
        _show(report)
    if not report.passed:
        if saturates(report):
            say(f"hint: {CALIBRATE}")
        say_next("check", adapted)
        ctx.exit(1)
    say_next("slots", adapted)


def _with_gradients(
    report: Report, adapted: str, given: Mapping[str, Any], stage: Callable[[str], None]
) -> Report:
    """The report with a check of the gradients."""
    import onnx_adapt as oa
    from onnx_adapt.training.gradient_proof import check_gradient_nodes

    check = check_gradient_nodes(
        oa.open_model(adapted), inputs=given["inputs"], seed=given["seed"], stage=stage
    )
    return replace(report, checks=(*report.checks, check))


def _show(report: Report) -> None:
    from onnx_adapt.proof.result import CHECK_COLUMNS, SLOT_COLUMNS

    print_table(CHECK_COLUMNS, report.check_rows())
    if report.slots:
        emit()
        print_table(SLOT_COLUMNS, report.slot_rows())
    for text in report.warnings:
        say(f"warning: {text}")
    shapes = "; ".join(
        ", ".join(f"{name} {list(shape)}" for name, shape in item.items())
        for item in report.shapes
        if item
    )
    where = f"ONNX Runtime {report.runtime}"
    where += f" on {', '.join(report.providers)}" if report.providers else ""
    say(where + (f", inputs {shapes}" if shapes else ""))
    say(verdict(report))
