"""`onnx-adapt check`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.show import emit, print_json, say, say_next
from onnx_adapt.words import count, plain

if TYPE_CHECKING:
    from onnx_adapt import Adapter


@click.command("check", short_help="Check that slots are whole and adapters fit.")
@click.argument("model", type=click.Path())
@click.argument("files", nargs=-1, type=click.Path())
@click.option("--inputs", multiple=True, type=click.Path(), help="An .npz by input name.")
@click.option("--allow-partial", is_flag=True, help="Do not mind slots without weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    files: tuple[str, ...],
    inputs: tuple[str, ...],
    allow_partial: bool,
    as_json: bool,
) -> None:
    """Check that MODEL's slots are whole and that the adapters in FILES fit them.

    Names, shapes, element types, coverage, overlap, fingerprint, NaN; slots that are still
    swappable; symbols and recorded shapes; whether the files that MODEL's weights are in
    are there and the same. A quantised MODEL is run: do the adapters' values fit the ranges
    that it was calibrated for? Exit status 1 if anything is wrong. A file that does not tell
    its base or activations is ok, with a line that says what was not checked.

    \b
      onnx-adapt check adapted.onnx fr.safetensors de.onnx_adapter
    """
    import onnx_adapt as oa
    from onnx_adapt.adapter.fitting import overlaps

    with patience(f"checking {model}"):
        adapters = [oa.load_adapter(file) for file in files]
        named = dict(zip(files, adapters, strict=True))
        problems = _problems(model, named, allow_partial)
        notes = {} if any(problems.values()) else _saturation(model, named, inputs, problems)
        silent = _unchecked(model, named) if any(f in problems for f in files) else {}
    together = overlaps(adapters)
    wrong = any(problems.values())
    if as_json:
        print_json(
            {
                "passed": not wrong,
                "problems": problems,
                "unchecked": silent,
                "overlaps": together,
                "notes": notes,
            }
        )
    else:
        for place, found in problems.items():
            emit(f"{plain(place)}: {'ok' if not found else count(len(found), 'problem')}")
            for text in (*found, *silent.get(place, ())):
                emit(f"  {plain(text)}")
    for place, found in notes.items():
        for text in found[:3]:
            say(f"note: {place}: {text}")
        if len(found) > 3:
            say(f"note: {place}: {len(found) - 3} slots more; --json has all")
    if problems[model]:
        say(
            "hint: tools that rewrite a graph come before `insert`; docs/after-other-tools.md "
            "says which keep slots, and the order for each"
        )
    for text in together[:3] if len(adapters) > 1 else ():
        say(f"note: feed only one at a time: {text}")
    good = [file for file in files if not problems.get(file)]
    if good and not problems[model]:
        if all(slot.swappable for slot in oa.list_slots(oa.open_model(model))):
            again = "--adapter", good[0], "--compare", "base"
            say_next("run", model, "--inputs", "x.npz", *again)
        else:
            say_next("fill", model, good[0])
    else:
        say_next("slots", model)
    if wrong:
        ctx.exit(1)


def _unchecked(model: str, adapters: Mapping[str, Adapter]) -> dict[str, list[str]]:
    """What could not be checked about each file, for the file does not tell."""
    import onnx_adapt as oa
    from onnx_adapt.adapter.fitting import required_manifest, unchecked

    manifest = required_manifest(oa.open_model(model))
    found = {file: unchecked(manifest, adapter) for file, adapter in adapters.items()}
    return {file: texts for file, texts in found.items() if texts}


def _problems(
    model: str, adapters: Mapping[str, Adapter], allow_partial: bool
) -> dict[str, list[str]]:
    """What is wrong with each file."""
    import onnx_adapt as oa
    from onnx_adapt.adapter.fitting import misfits
    from onnx_adapt.edit.damage import damages
    from onnx_adapt.errors import ExternalDataError

    try:
        opened = oa.open_model(model)
    except ExternalDataError as error:
        return {model: [f"{error.message} ({error.hint})"]}
    problems = {model: damages(opened)}
    readable = bool(oa.list_slots(opened)) or not problems[model]
    for file, adapter in adapters.items() if readable else ():
        found = misfits(opened, adapter, allow_partial=allow_partial)
        problems.setdefault(file, []).extend(found)
    return problems


def _saturation(
    model: str,
    adapters: Mapping[str, Adapter],
    inputs: tuple[str, ...],
    problems: dict[str, list[str]],
) -> dict[str, list[str]]:
    """Add what adapters drive out of the ranges of a quantised model to its problems.

    Returns:
        Notes about it, by the adapter's file.
    """
    import onnx_adapt as oa
    from onnx_adapt.errors import UnprovableError
    from onnx_adapt.graph.index import index_model
    from onnx_adapt.graph.quantizers import quantizers_behind
    from onnx_adapt.proof.inputs import inputs_for
    from onnx_adapt.proof.result import CALIBRATE
    from onnx_adapt.proof.saturation import check_saturation

    opened = oa.open_model(model)
    slots = oa.list_slots(opened)
    if not adapters or not quantizers_behind(index_model(opened), slots):
        return {}
    try:
        feeds = inputs_for(oa.remove(opened), inputs or None)
    except UnprovableError as error:
        return {model: [f"what saturates was not counted: {error.message} ({error.hint})"]}
    notes: dict[str, list[str]] = {}
    for file, adapter in adapters.items():
        found, _ = check_saturation(opened, slots, adapter, feeds)
        if found is not None and not found.passed:
            problems.setdefault(file, []).append(f"{found.detail} ({CALIBRATE})")
        if found is not None and found.warnings:
            notes[file] = list(found.warnings)
    return notes
