"""`onnx-adapt report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import print_json, refuse_to_replace, say, size_text
from onnx_adapt.cli.progress import patience

if TYPE_CHECKING:
    from onnx_adapt import Report
    from onnx_adapt.report.overview import Overview


MOST_ADAPTERS = 2


@click.command("report", short_help="Show a verified model on an HTML page.")
@click.argument("base", type=click.Path())
@click.argument("adapted", type=click.Path())
@click.option(
    "--adapter",
    "adapters",
    type=click.Path(),
    multiple=True,
    help="An adapter file to turn the slots on with; a second one is compared with it.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="The page to write; by default ADAPTED.report.html.",
)
@options.inputs
@click.option(
    "--bottleneck",
    type=click.IntRange(min=1, max=options.MAX_BOTTLENECK),
    default=8,
    show_default=True,
    help="The bottleneck to measure in slots without weights.",
)
@options.strict
@options.seed
@options.provider
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    base: str,
    adapted: str,
    adapters: tuple[str, ...],
    output: str | None,
    inputs: tuple[str, ...],
    bottleneck: int,
    strict: bool,
    seed: int,
    provider: tuple[str, ...],
    as_json: bool,
) -> None:
    """Verify ADAPTED against BASE and show the result on one HTML page.

    The page shows the verdict, a map of the model, the graph around each slot before and
    after, the error and the effect of each slot, and what the slots cost. With --json the
    same data is printed as one JSON document instead.

    \b
      onnx-adapt report model.onnx model.adapted.onnx -o report.html
    """
    import onnx_adapt as oa
    from onnx_adapt.model.file import protect_files
    from onnx_adapt.report.overview import overview

    path = Path(output or f"{Path(adapted).with_suffix('')}.report.html")
    if as_json and output:
        raise click.UsageError("--json prints the data; -o is for the page")
    if len(adapters) > MOST_ADAPTERS:
        raise click.UsageError("--adapter is given at most twice: two adapters are compared")
    if not as_json:
        check_page(path, base, adapted, *inputs, *adapters)
    with patience() as (_, stage):
        models = oa.open_model(base), oa.open_model(adapted)
        for model in () if as_json else models:
            protect_files(model, path)
        first, second = [*map(oa.load_adapter, adapters), None, None][:MOST_ADAPTERS]
        found = overview(
            *models,
            adapter=first,
            other=second,
            inputs=inputs or None,
            bottleneck=bottleneck,
            strict=strict,
            seed=seed,
            provider=provider,
            stage=stage,
            command=shlex.join(["onnx-adapt", *sys.argv[1:]]),
        )
    if as_json:
        print_json(found.as_dict())
    else:
        write_page(found, path)
    _say_verdict(found.report)
    if not found.report.passed:
        ctx.exit(1)


def _say_verdict(report: Report) -> None:
    """Say which checks failed, and the verdict."""
    from onnx_adapt.proof.result import CALIBRATE

    for check in report.checks:
        if not check.passed:
            say(f"{check.name} FAILED: {check.detail}")
    say(verdict(report))
    if saturates(report):
        say(f"hint: {CALIBRATE}")


def saturates(report: Report) -> bool:
    """Whether the saturation check is the only one that failed."""
    return [check.name for check in report.checks if not check.passed] == ["saturation"]


def verdict(report: Report) -> str:
    """The verdict of a report in one sentence."""
    if saturates(report):
        return (
            f"{report.adapted} is {report.base} plus its slots, but this adapter's values do "
            "not fit its ranges: the answer is NOT the trained adapter's"
        )
    word = "is" if report.passed else "is NOT"
    return f"{report.adapted} {word} {report.base} plus its slots"


def check_page(path: Path, *given: str) -> None:
    """Refuse a page that cannot be written, before the work is done.

    Raises:
        AdaptError: If libraries are missing, or the page would replace a file that is read.
    """
    from onnx_adapt.model.destination import resolve_destination
    from onnx_adapt.report.page import require_libraries

    require_libraries()
    resolve_destination(path)
    refuse_to_replace(path, *given)


def write_page(found: Overview, path: Path) -> None:
    """Write the page and print its path."""
    from onnx_adapt.model.whole_files import write_files
    from onnx_adapt.report.page import render

    data = render(found).encode()
    write_files([(path.absolute(), [data])])
    say(f"wrote {path} ({size_text(len(data))})")
