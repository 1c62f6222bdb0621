"""`onnx-adapt check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import emit, print_json, say, say_next
from onnx_adapt.cli.progress import patience
from onnx_adapt.words import count, plain

if TYPE_CHECKING:
    from onnx_adapt import Adapter


@click.command("check", short_help="Check that slots are whole and adapters fit.")
@click.argument("model", type=click.Path())
@click.argument("files", nargs=-1, type=click.Path())
@options.inputs
@options.allow_partial
@options.provider
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    files: tuple[str, ...],
    inputs: tuple[str, ...],
    allow_partial: bool,
    provider: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check that MODEL's slots are whole and that the adapters in FILES fit them.

    For MODEL this checks that its slots are still swappable, that its symbols and recorded
    shapes are consistent, and that the files with its weights are there and unchanged. For
    each adapter it checks names, shapes, element types, coverage, overlap, the base's
    fingerprint and NaN. A quantised MODEL is also run, to see whether the values of the
    adapters fit the ranges that it was calibrated for. The exit status is 1 if anything is
    wrong. If a file does not record its base or activations, a line says so.

    \b
      onnx-adapt check adapted.onnx fr.safetensors de.onnx_adapter
    """
    import onnx_adapt as oa
    from onnx_adapt.adapter.fitting import overlaps

    with patience(f"checking {model}"):
        adapters = [oa.load_adapter(file) for file in files]
        named = dict(zip(files, adapters, strict=True))
        pasts = {file: adapter for file, adapter in named.items() if adapter.initial_state}
        slotted = {file: named[file] for file in named if file not in pasts}
        problems: dict[str, list[str]] = {model: []}
        notes: dict[str, list[str]] = {}
        silent: dict[str, list[str]] = {}
        if slotted or not pasts or oa.list_slots(oa.open_model(model)):
            problems = _problems(model, slotted, allow_partial)
            if not any(problems.values()):
                notes = _saturation(model, slotted, inputs, provider, problems)
            if any(file in problems for file in slotted):
                silent = _unchecked(model, slotted)
        if pasts and not problems[model]:
            problems |= _past_problems(model, pasts)
    together = overlaps(adapters)
    wrong = any(problems.values())
    if as_json:
        found = {"problems": problems, "unchecked": silent, "overlaps": together}
        print_json({"passed": not wrong, **found, "notes": notes})
    else:
        _show(problems, silent)
    _tell_notes(notes)
    if problems[model]:
        say(
            "hint: run tools that rewrite a graph before `insert`; docs/after-other-tools.md "
            "says which of them keep slots, and in which order to run each"
        )
    for text in together[:3] if len(adapters) > 1 else ():
        say(f"note: feed only one at a time: {text}")
    good = [file for file in files if not problems.get(file)] if not problems[model] else []
    _suggest(model, {file: named[file] for file in good})
    if wrong:
        ctx.exit(1)


def _show(
    problems: Mapping[str, Sequence[str]], unchecked: Mapping[str, Sequence[str]]
) -> None:
    """Print the problems of each file, and what could not be checked about it."""
    for place, found in problems.items():
        emit(f"{plain(place)}: {'ok' if not found else count(len(found), 'problem')}")
        for text in (*found, *unchecked.get(place, ())):
            emit(f"  {plain(text)}")


def _tell_notes(notes: Mapping[str, Sequence[str]]) -> None:
    """Print the first notes about each file."""
    for place, found in notes.items():
        for text in found[:3]:
            say(f"note: {place}: {text}")
        if len(found) > 3:
            say(f"note: {place}: {len(found) - 3} slots more; --json has all")


def _suggest(model: str, fitting: Mapping[str, Adapter]) -> None:
    """Suggest what to do with an adapter that fits, or with a model none fits.

    An adapter of `pack-rows` is for other runtimes; no command here runs it.
    """
    import onnx_adapt as oa
    from onnx_adapt.adapter.fitting import required_manifest, rows_of

    if not fitting:
        say_next("slots", model)
        return
    if past := next((file for file in fitting if fitting[file].initial_state), ""):
        say_next("run", model, "--inputs", "x.npz", "--adapter", past, "--compare", "base")
        return
    manifest = required_manifest(oa.open_model(model))
    single = [file for file, adapter in fitting.items() if not rows_of(manifest, adapter)]
    if not single:
        say_next("slots", model)
    elif all(slot.swappable for slot in manifest.slots):
        again = "--adapter", single[0], "--compare", "base"
        say_next("run", model, "--inputs", "x.npz", *again)
    else:
        say_next("fill", model, single[0])


def _unchecked(model: str, adapters: Mapping[str, Adapter]) -> dict[str, list[str]]:
    """What could not be checked about each file because it does not record it."""
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


def _past_problems(model: str, pasts: Mapping[str, Adapter]) -> dict[str, list[str]]:
    """Why each adapter that is the first past of a decoder cannot be used with the model."""
    import onnx_adapt as oa
    from onnx_adapt.errors import AdapterError

    problems: dict[str, list[str]] = {}
    with oa.AdapterSession(model) as session:
        for file, adapter in pasts.items():
            problems[file] = []
            try:
                session.load(file, adapter)
            except AdapterError as error:
                problems[file].append(error.message)
    return problems


def _saturation(
    model: str,
    adapters: Mapping[str, Adapter],
    inputs: tuple[str, ...],
    provider: tuple[str, ...],
    problems: dict[str, list[str]],
) -> dict[str, list[str]]:
    """Add the adapters whose values leave the ranges of a quantised model to the problems.

    Returns:
        Notes about it, by the adapter's file.
    """
    import onnx_adapt as oa
    from onnx_adapt.edit.insert import all_places
    from onnx_adapt.errors import UnprovableError
    from onnx_adapt.graph.index import index_model
    from onnx_adapt.graph.quantizers import quantizers_behind
    from onnx_adapt.proof.inputs import inputs_for
    from onnx_adapt.proof.result import CALIBRATE
    from onnx_adapt.proof.runner import proof_providers
    from onnx_adapt.proof.saturation import check_saturation

    providers = proof_providers(provider)
    opened = oa.open_model(model)
    slots = all_places(opened)
    if not adapters or not quantizers_behind(index_model(opened), slots):
        idle = "nothing was run: that takes an adapter, and a slot whose value is quantised "
        return {model: [f"{idle}with a calibrated range"]} if inputs or provider else {}
    try:
        feeds = inputs_for(oa.remove(opened), inputs or None, providers=providers)
    except UnprovableError as error:
        return {model: [f"what saturates was not counted: {error.message} ({error.hint})"]}
    notes: dict[str, list[str]] = {}
    for file, adapter in adapters.items():
        found, _ = check_saturation(opened, slots, adapter, feeds, providers)
        if found is not None and not found.passed:
            problems.setdefault(file, []).append(f"{found.detail} ({CALIBRATE})")
        if found is not None and found.warnings:
            notes[file] = list(found.warnings)
    return notes
