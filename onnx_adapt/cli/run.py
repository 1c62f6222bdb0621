"""`onnx-adapt run`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.complete import adapter_names
from onnx_adapt.cli.outputs import print_json, print_table, refuse_to_replace, say, say_next
from onnx_adapt.cli.progress import patience
from onnx_adapt.errors import AdapterError, SaveError
from onnx_adapt.formats import FORMATS, adapter_files

if TYPE_CHECKING:
    from onnx_adapt.session.adapter_session import Choice

_BASE = "-"


@click.command("run", short_help="Run a model with one adapter or several.")
@click.argument("model", type=click.Path())
@click.option(
    "--inputs",
    required=True,
    type=click.Path(),
    help="An .npz with an array for each input of the model.",
)
@click.option(
    "--adapter",
    shell_complete=adapter_names,
    help="An adapter file, or the name of one beside MODEL.",
)
@click.option("--blend", help="Several adapters with weights, such as a=0.7,b=0.3.")
@click.option(
    "--rows", help="One adapter for each row of the batch, such as a,b,- where - is the base."
)
@options.allow_partial
@click.option(
    "--batch-axis",
    type=click.IntRange(min=0),
    help="The axis of the batch, if it cannot be found.",
)
@click.option("-o", "--output", type=click.Path(), help="Write the outputs to an .npz.")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many runs to time, after one that is not timed.",
)
@click.option(
    "--compare",
    type=click.Choice(["base"]),
    help="Also show how far the outputs are from those of the base.",
)
@options.provider
@options.as_json
def command(
    model: str,
    inputs: str,
    adapter: str | None,
    blend: str | None,
    rows: str | None,
    allow_partial: bool,
    batch_axis: int | None,
    output: str | None,
    repeat: int,
    compare: str | None,
    provider: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run MODEL with an adapter, a blend of several, or one adapter for each row.

    An adapter is given by its file, or by NAME if the file is MODEL.NAME.safetensors
    (or .onnx_adapter, .npz).

    \b
      onnx-adapt run adapted.onnx --inputs x.npz --adapter fr --compare base
      onnx-adapt run adapted.onnx --inputs x.npz --blend fr=0.7,de.npz=0.3 -o y.npz
      onnx-adapt run adapted.onnx --inputs x.npz --rows fr,de,- --repeat 100
    """
    if sum(option is not None for option in (adapter, blend, rows)) > 1:
        raise click.UsageError("give one of --adapter, --blend and --rows")
    if compare and not (adapter or blend or rows):
        raise click.UsageError("--compare base has nothing to compare without an adapter")
    import onnx_adapt as oa
    from onnx_adapt.model.file import protect_files
    from onnx_adapt.proof.feeds import read_arrays

    chosen, names = read_choice(adapter, blend, rows)
    files = {name: _file(Path(model), name) for name in names}
    _refuse_output(output, model, inputs, *files.values())
    if output is not None and Path(output).exists():
        protect_files(oa.open_model(model), output)
    feeds = read_arrays(Path(inputs))
    with (
        patience(f"running {model}"),
        oa.AdapterSession(model, providers=provider, batch_axis=batch_axis) as session,
    ):
        for name, file in files.items():
            session.load(name, file, allow_partial=allow_partial)
        found, times = _timed(lambda: session.run(feeds, adapter=chosen), repeat)
        base = session.run(feeds) if compare else None
    if output is not None:
        _write(Path(output), found)
    described = [_describe(name, value, base) for name, value in found.items()]
    _show(described, times, as_json=as_json, output=output)
    if adapter is not None:
        say_next("fill", model, files[adapter])
    else:
        say_next("slots", model)


def read_choice(
    adapter: str | None, blend: str | None, rows: str | None
) -> tuple[Choice | Sequence[Choice], list[str]]:
    """The choice of adapters, and the names in it."""
    if adapter is not None:
        return adapter, [adapter]
    if blend is not None:
        recipe: dict[str, float] = {}
        for item in blend.split(","):
            name, equals, weight = item.strip().rpartition("=")
            if not equals or not name or name in recipe:
                raise click.UsageError(f"--blend {blend}: give a=0.7,b=0.3, each name once")
            try:
                recipe[name] = float(weight)
            except ValueError:
                raise click.UsageError(f"--blend {blend}: {weight!r} is no number") from None
        return recipe, list(recipe)
    if rows is not None:
        entries = [item.strip() for item in rows.split(",")]
        if not all(entries):
            raise click.UsageError(f"--rows {rows}: one is empty; write - for the base")
        named = list(dict.fromkeys(item for item in entries if item != _BASE))
        return [None if item == _BASE else item for item in entries], named
    return None, []


def _file(model: Path, name: str) -> Path:
    """The adapter file that a name means: a path, or one beside the model.

    Raises:
        AdapterError: If there is none, or several.
    """
    if Path(name).suffix in FORMATS:
        return Path(name)
    labels = (f"{model.stem}.{name}", name)
    beside = [model.parent / f"{label}{suffix}" for label in labels for suffix in FORMATS]
    found = [path for path in beside if path.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterError(
            f"{name!r} means {' and '.join(map(str, found))}", hint="give the path of one"
        )
    present = [path.name for path in adapter_files(model)]
    raise AdapterError(
        f"there is no adapter {name!r}: no such file, and none called {labels[0]} beside the "
        "model",
        hint=f"beside it: {', '.join(present[:10])}" if present else "give a path",
    )


def _timed(
    call: Callable[[], dict[str, Any]], repeat: int
) -> tuple[dict[str, Any], list[float]]:
    """The outputs, and the milliseconds of each timed run."""
    found = call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        found = call()
        times.append((time.perf_counter() - start) * 1e3)
    return found, times


def _describe(name: str, value: Any, base: dict[str, Any] | None) -> dict[str, Any]:
    import numpy as np

    from onnx_adapt.proof.compare import movement

    shape, dtype = None, type(value).__name__
    if isinstance(value, np.ndarray):
        shape, dtype = list(value.shape), str(value.dtype)
    entry: dict[str, Any] = {"output": name, "shape": shape, "dtype": dtype}
    if base is not None:
        entry["moved"] = _difference(base[name], value)
        entry["relative"] = movement({name: base[name]}, {name: value})
    return entry


def _difference(before: Any, after: Any) -> float | None:
    """The largest difference of two arrays of numbers."""
    import numpy as np

    if not isinstance(after, np.ndarray) or after.dtype.kind not in "fiub":
        return None
    if before.shape != after.shape:
        return None
    apart = np.abs(after.astype(np.float64) - before.astype(np.float64))
    return float(apart.max(initial=0.0))


def _refuse_output(output: str | None, *given: str | Path) -> None:
    if output is None:
        return
    if Path(output).suffix != ".npz":
        raise SaveError(f"{output} is no .npz", hint="give the outputs a name such as y.npz")
    refuse_to_replace(output, *given)


def _write(path: Path, outputs: dict[str, Any]) -> None:
    """Write the outputs by name; the items of a sequence or map by number."""
    import numpy as np

    from onnx_adapt.adapter.npz import archive
    from onnx_adapt.model.whole_files import write_files
    from onnx_adapt.proof.runner import as_arrays

    arrays: dict[str, Any] = {}
    for name, value in outputs.items():
        for i, array in enumerate(as_arrays(value)):
            label = name if isinstance(value, np.ndarray) else f"{name}.{i}"
            arrays[label] = array.astype(str) if array.dtype == object else array
    write_files([(path.absolute(), [archive(arrays)])])


def _show(
    rows: list[dict[str, Any]], times: list[float], *, as_json: bool, output: str | None
) -> None:
    median = statistics.median(times)
    if as_json:
        latency = {"median": median, "min": min(times), "max": max(times), "runs": len(times)}
        outputs = [{key: _plain(value) for key, value in row.items()} for row in rows]
        print_json({"outputs": outputs, "latency_ms": latency, "written": output})
    else:
        columns = list(rows[0])
        print_table(columns, [[_cell(row[column]) for column in columns] for row in rows])
    spread = f" (median of {len(times)}; {min(times):.3g} to {max(times):.3g})"
    say(f"latency {median:.3g} ms{spread if len(times) > 1 else ''}")
    if output is not None:
        say(f"wrote {output}")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "" if value is None else str(value)
