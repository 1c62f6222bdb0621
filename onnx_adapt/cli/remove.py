"""`onnx-adapt remove`."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_adapt.cli.complete import slot_names
from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.show import print_json, say, say_next, tell_saved
from onnx_adapt.words import count


@click.command("remove", short_help="Take slots out again; the base comes back.")
@click.argument("model", type=click.Path())
@click.option(
    "--slot",
    "names",
    multiple=True,
    shell_complete=slot_names,
    help="A slot to remove; by default all.",
)
@click.option("-o", "--output", type=click.Path(), help="Default: MODEL.removed.onnx.")
@click.option("--keep-external", is_flag=True, help="Do not copy external data.")
@click.option("--force", is_flag=True, help="Let the output replace MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: str,
    names: tuple[str, ...],
    output: str | None,
    keep_external: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Take slots out of MODEL; without the last one it is the base, byte for byte.

    \b
      onnx-adapt remove model.adapted.onnx -o model.onnx
    """
    import onnx_adapt as oa
    from onnx_adapt.edit.remove import base_notes

    adapted = oa.open_model(model)
    path = Path(model).with_suffix(".removed.onnx") if output is None else output
    result = oa.remove(adapted, slots=names or None)
    with patience() as (progress, _):
        saved = oa.save_model(
            result, path, overwrite=force, keep_external=keep_external, progress=progress
        )
    left = [slot.name for slot in oa.list_slots(result)]
    gone = len(oa.list_slots(adapted)) - len(left)
    notes = base_notes(adapted, result)
    if as_json:
        document = {"output": str(saved.path), "removed": gone, "left": left}
        exact = not left and not notes
        print_json({**document, "base_restored": exact, "notes": notes})
    else:
        for note in notes:
            say(f"note: {note}")
        if not left and not notes:
            say("the base is back, byte for byte")
    say(f"removed {count(gone, 'slot')}, {len(left)} left")
    tell_saved(saved)
    say_next("slots" if left else "sites", path)
