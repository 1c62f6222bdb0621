"""`onnx-adapt inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.outputs import emit, print_json, print_table, say, size_text
from onnx_adapt.cli.progress import patience
from onnx_adapt.words import plain

if TYPE_CHECKING:
    from onnx_adapt import Inspection
    from onnx_adapt.adapter.inspecting import Measured

_COLUMNS = (
    *("slot", "activation", "type", "reads", "makes", "r", "rank", "rank of 99%", "norm"),
    *("dead", "note"),
)


@click.command("inspect", short_help="Measure an adapter: rank, energy, norm, base.")
@click.argument("adapter", type=click.Path())
@click.option(
    "--for", "model", type=click.Path(), help="A model with slots: is the adapter for it?"
)
@options.as_json
@click.pass_context
def command(ctx: click.Context, /, adapter: str, model: str | None, as_json: bool) -> None:
    """Measure ADAPTER, slot by slot, and tell which base it is for.

    r is the bottleneck, rank the number of singular values of the update above rounding, and
    dead the number of units of the bottleneck that reach nothing. The status is 1 if the
    adapter does not fit the model that is given with --for.

    \b
      onnx-adapt inspect fr.safetensors
      onnx-adapt inspect fr.safetensors --for adapted.onnx --json
    """
    import onnx_adapt as oa
    from onnx_adapt.adapter.files import stored_bits
    from onnx_adapt.formats import FORMATS

    with patience(f"reading {adapter}"):
        loaded = oa.load_adapter(adapter)
        opened = oa.open_model(model) if model else None
        found = oa.inspect(loaded, opened)
    path = Path(adapter)
    file = {
        "file": adapter,
        "format": FORMATS[path.suffix].name,
        "file_size": path.stat().st_size,
        "bits": stored_bits(path),
    }
    if as_json:
        state = {name: list(value.shape) for name, value in loaded.initial_state.items()}
        more = {"invocation_tokens": loaded.invocation_tokens, "initial_state": state}
        print_json({**file, **asdict(found), **more})
    else:
        print_table(_COLUMNS, [_row(slot) for slot in found.slots])
        for name, (shape, dtype) in found.replaced.items():
            emit(f"replaces {plain(name)} {list(shape)} {dtype}")
        for name, value in loaded.initial_state.items():
            emit(f"first past {plain(name)} {list(value.shape)} {value.dtype}")
    if loaded.invocation_tokens:
        say(f"on from its invocation tokens on (aLoRA): {list(loaded.invocation_tokens)}")
    _tell(found, f"{size_text(path.stat().st_size)}", file["bits"], model)
    if found.misfits:
        ctx.exit(1)


def _row(slot: Measured) -> tuple[object, ...]:
    """One slot as a row of the table."""
    notes = [f"NaN or infinity in {', '.join(slot.odd)}"] if slot.odd else []
    notes += ["off: changes nothing"] if slot.off else []
    sizes = ("-" if size is None else size for size in (slot.reads, slot.makes))
    ranks = ("-" if rank is None else rank for rank in (slot.rank, slot.effective_rank))
    norm = "-" if slot.norm is None else f"{slot.norm:.3g}"
    activation = slot.activation or "unknown"
    own = (slot.bottleneck or "-", *ranks, norm, slot.dead_units)
    return (slot.slot, activation, slot.dtype, *sizes, *own, "; ".join(notes))


def _tell(found: Inspection, size: str, bits: object, model: str | None) -> None:
    """Print on stderr what is true of the whole adapter."""
    stored = f", stored with {bits} bits a number" if bits else ""
    say(f"adapter {found.name!r}: {size}{stored}")
    say(f"base: {', '.join(found.bases) if found.bases else 'the adapter does not say'}")
    if found.misfits is None:
        return
    said = {True: "was made for", False: "was not made for", None: "does not say if it is for"}
    say(f"it {said[found.same_base]} the base of {model}")
    for text in found.misfits:
        say(f"it does not fit {model}: {text}")
