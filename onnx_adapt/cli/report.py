"""`onnx-adapt report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli.insert import MAX_BOTTLENECK
from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.show import print_json, say, size_text
from onnx_adapt.errors import SaveError

if TYPE_CHECKING:
    from onnx_adapt import Report
    from onnx_adapt.report.overview import Overview


@click.command("report")
@click.argument("base", type=click.Path())
@click.argument("adapted", type=click.Path())
@click.option("--adapter", type=click.Path(), help="A file to turn the slots on with.")
@click.option("-o", "--output", type=click.Path(), help="Default: ADAPTED.report.html.")
@click.option("--inputs", multiple=True, type=click.Path(), help="An .npz by input name.")
@click.option(
    "--bottleneck",
    type=click.IntRange(min=1, max=MAX_BOTTLENECK),
    default=8,
    show_default=True,
    help="Measured where slots are empty.",
)
@click.option("--strict", is_flag=True, help="A slot that moves nothing is a failure.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of made-up inputs and weights.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the data instead.")
@click.pass_context
def command(
    ctx: click.Context,
    base: str,
    adapted: str,
    adapter: str | None,
    output: str | None,
    inputs: tuple[str, ...],
    bottleneck: int,
    strict: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Verify ADAPTED against BASE and show it all on one HTML page.

    A verdict, a map, the graph around each slot before and after, its error and effect,
    what the slots cost. With --json, what the page shows as one JSON document.

    \b
      onnx-adapt report model.onnx model.adapted.onnx -o report.html
    """
    import onnx_adapt as oa
    from onnx_adapt.model.file import protect_files
    from onnx_adapt.proof.result import CALIBRATE
    from onnx_adapt.report.overview import overview

    path = Path(output or f"{Path(adapted).with_suffix('')}.report.html")
    if as_json and output:
        raise click.UsageError("--json prints the data; -o is for the page")
    if not as_json:
        check_page(path, base, adapted, *inputs, *((adapter,) if adapter else ()))
    with patience() as (_, stage):
        models = oa.open_model(base), oa.open_model(adapted)
        for model in () if as_json else models:
            protect_files(model, path)
        found = overview(
            *models,
            adapter=oa.load_adapter(adapter) if adapter else None,
            inputs=inputs or None,
            bottleneck=bottleneck,
            strict=strict,
            seed=seed,
            stage=stage,
        )
    if as_json:
        print_json(found.as_dict())
    else:
        write_page(found, path)
    for check in found.report.checks:
        if not check.passed:
            say(f"{check.name} FAILED: {check.detail}")
    say(verdict(found.report))
    if saturates(found.report):
        say(f"hint: {CALIBRATE}")
    if not found.report.passed:
        ctx.exit(1)


def saturates(report: Report) -> bool:
    """Whether all is right with a model but that the adapter's values do not fit."""
    return [check.name for check in report.checks if not check.passed] == ["saturation"]


def verdict(report: Report) -> str:
    """What a report comes to, in one sentence."""
    if saturates(report):
        return (
            f"{report.adapted} is {report.base} plus its slots, but this adapter's values do "
            "not fit its ranges: the answer is NOT the trained adapter's"
        )
    word = "is" if report.passed else "is NOT"
    return f"{report.adapted} {word} {report.base} plus its slots"


def check_page(path: Path, *given: str) -> None:
    """Refuse a page that cannot be made, before the work is done.

    Raises:
        AdaptError: If libraries are missing, or it would replace what it is about.
    """
    from onnx_adapt.model.destination import resolve_destination
    from onnx_adapt.report.page import require_libraries

    require_libraries()
    resolve_destination(path)
    for item in given:
        if path.exists() and Path(item).exists() and path.samefile(item):
            raise SaveError(f"the page would replace {path}", hint="choose another name")


def write_page(found: Overview, path: Path) -> None:
    """Write the page and say so."""
    from onnx_adapt.model.whole_files import write_files
    from onnx_adapt.report.page import render

    data = render(found).encode()
    write_files([(path.absolute(), [data])])
    say(f"wrote {path} ({size_text(len(data))})")
