"""What inserting costs and keeps, beside `cp` and beside other libraries.

Models are generated, every command runs in a process of its own, and the numbers are
the best of three. It needs 20 GB of disk and 10 GB of memory (--quick: 1 GB) and runs on
Linux. The other libraries are installed in an environment of their own, `.venv-peers`.

    python benchmarks/insert.py
    python benchmarks/insert.py --quick
"""

from __future__ import annotations

import filecmp
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from large_models import write_external, write_inline
from lost import lost, rich_model
from measuring import (
    ADAPT,
    Cell,
    Command,
    CommandError,
    Cost,
    Finding,
    Part,
    Ratio,
    Table,
    measure,
    run,
    same,
    try_all,
)
from peers import LIBRARIES, insertion
from setting import Setting, alone

from onnx_adapt.cli.outputs import say, size_text

from fetch_models import fetch  # isort: skip

ALL = "/layers.*/MatMul"
FIRST = "/layers.0/MatMul"
FASTER, LEANER = 5, 20
"""How many times more every peer should take at 1.5 GB."""

_LOAD = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Layers and widths of the models, and how often each command runs."""

    inline: tuple[tuple[int, int], ...]
    external: tuple[int, int]
    nodes: tuple[int, ...]
    runs: int


FULL = Sizes(
    inline=((3, 1024), (6, 2048), (8, 4096), (6, 8192), (9, 8192)),
    external=(30, 8192),
    nodes=(1_000, 5_000, 20_000, 50_000),
    runs=3,
)
QUICK = Sizes(inline=((6, 256), (6, 1024)), external=(10, 1024), nodes=(1_000,), runs=2)
TINY = Sizes(inline=((2, 64),), external=(2, 64), nodes=(30,), runs=1)
GOALS_AT = (6, 8192)
NODES_AT = 20_000
REAL = (("minilm-l3", "/model/**/output/dense/MatMul"),)


def ours(
    model: Path, output: Path, *more: str, after: str = ALL, keep: bool = False
) -> Command:
    """Our command."""
    line = [ADAPT, "insert", str(model), "-o", str(output), "--no-verify", "--after", after]
    large = output.with_name(f"{output.name}.data")  # past 2 GB
    return Command([*line, *more], (output, large), keep)


def everyone(
    model: Path, setting: Setting, *, copy: bool = True, after: str = ALL
) -> dict[str, Command]:
    """Ours, thin, `cp`, and what peers there are; by default a slot after every layer."""
    out = {name: model.with_name(f"{name}.onnx") for name in ("insert", "thin", "cp")}
    commands = {
        "insert": ours(model, out["insert"], after=after),
        "insert --thin": ours(model, out["thin"], "--thin", after=after),
    }
    if copy:
        commands["cp"] = Command(["cp", str(model), str(out["cp"])], (out["cp"],))
    for library in LIBRARIES if setting.peers else ():
        output = model.with_name(f"{library}.onnx")
        commands[library] = insertion(setting.peers, library, model, output, after)
    return commands


Costs = Mapping[str, Cost | CommandError]


def worked(cost: Cost | CommandError) -> Cost:
    """What must not fail, as it is."""
    if isinstance(cost, CommandError):
        raise SystemExit(str(cost))
    return cost


def rows_of(name: str, costs: Costs) -> list[tuple[Cell, ...]]:
    """Lines of a table: ours by it, seconds, seconds until on disk, megabytes."""
    mine = worked(costs["insert"])
    rows: list[tuple[Cell, ...]] = []
    for who, cost in costs.items():
        if isinstance(cost, CommandError):
            rows.append((name, who, "", "", "", "", "", "", "", str(cost)))
            continue
        done, disk = cost.done.best, cost.on_disk.best
        busy = Ratio.of(mine.busy.each, cost.busy.each)
        ratios = (busy, done / mine.done.best, cost.peak / mine.peak)
        rows.append((name, who, *ratios, done, disk, cost.busy.best, cost.peak / 1e6, ""))
    return rows


COLUMNS = (
    "of",
    "by",
    "insert / it, processor",
    "time / ours",
    "memory / ours",
    "s",
    "s, on disk",
    "s, processor",
    "MB",
    "fails with",
)


def start(setting: Setting, sizes: Sizes) -> Part:
    """The time until a command says something."""
    commands = {"help": Command([ADAPT, "--help"])}
    commands["empty"] = Command([sys.executable, "-c", "pass"])
    cost = measure(commands, 4 * sizes.runs)
    detail = f"an empty Python {cost['empty'].done}"
    shown = Finding("onnx-adapt --help", cost["help"].done.best, "s", detail, most=0.25)
    return Part("start", [shown])


def inline(setting: Setting, sizes: Sizes) -> Part:
    """Insert into models with inline weights: the curve over their size."""
    part = Part("inline")
    rows: list[tuple[Cell, ...]] = []
    for layers, width in sizes.inline:
        with setting.room() as folder:
            model = folder / "base.onnx"
            weights = write_inline(model, layers, width)
            name = f"inline {size_text(weights)}"
            costs = try_all(everyone(model, setting), sizes.runs)
            rows += rows_of(name, costs)
            part.findings += inline_goals(name, costs, strict=(layers, width) == GOALS_AT)
            if (layers, width) == GOALS_AT or sizes is not FULL:
                part.add(back(model, name, sizes))
    part.tables.append(Table("inline weights, a slot after every layer", COLUMNS, rows))
    return part


def inline_goals(name: str, costs: Costs, *, strict: bool) -> list[Finding]:
    """The goals; those beside others are of the size that they are stated for."""
    mine, cp = worked(costs["insert"]), worked(costs["cp"])
    found = [Finding(f"{name}: memory of insert", mine.peak / 1e6, "MB", "", most=200)]
    if not strict:
        return found
    for until, a, b, most in (
        (", until on disk", mine.on_disk, cp.on_disk, 1.5),
        (", in the page cache", mine.done, cp.done, 2),
    ):
        value = a.best / b.best
        found.append(
            Finding(f"{name}: insert / cp{until}", value, "x", f"{a}; cp {b}", most=most)
        )
    for library in LIBRARIES:
        cost = costs.get(library)
        if not isinstance(cost, Cost):
            continue
        faster = cost.done.best / mine.done.best
        busy = cost.busy.best / mine.busy.best
        what, detail = f"{name}: {library} / insert", f"{cost.done}; ours {mine.done}"
        detail += f"; {busy:.1f} x the processor's time"
        found.append(Finding(f"{what}, time", faster, "x", detail, least=FASTER))
        detail = f"{size_text(cost.peak)}; ours {size_text(mine.peak)}"
        found.append(
            Finding(f"{what}, memory", cost.peak / mine.peak, "x", detail, least=LEANER)
        )
    return found


def back(model: Path, name: str, sizes: Sizes) -> Part:
    """Remove again, and prove: how often the weights are in memory then."""
    adapted, again = model.with_name("insert.onnx"), model.with_name("back.onnx")
    run(ours(model, adapted))
    remove = Command([ADAPT, "remove", str(adapted), "-o", str(again)], (again,), keep=True)
    cost = measure({"remove": remove}, sizes.runs)["remove"]
    verify = measure(
        {
            "load": Command([sys.executable, "-c", _LOAD, str(model)]),
            "verify": Command([ADAPT, "verify", str(model), str(adapted)]),
        },
        1,
    )
    times = "; ".join(f"{key} {size_text(c.peak)} in {c.done}" for key, c in verify.items())
    value = verify["verify"].peak / verify["load"].peak
    equal = filecmp.cmp(model, again, shallow=False)
    return Part(
        "back",
        [
            same(f"{name}: remove gives the base", equal, f"byte for byte, {cost.done}"),
            Finding(f"{name}: verify / a plain session, memory", value, "x", times, most=1.25),
        ],
    )


def external(setting: Setting, sizes: Sizes) -> Part:
    """Insert into a model with external data, in its own folder."""
    with setting.room() as folder:
        model = folder / "base.onnx"
        name = f"external {size_text(write_external(model, *sizes.external))}"
        costs = try_all(everyone(model, setting, copy=False), sizes.runs)
    cost = worked(costs["insert"])
    return Part(
        "external",
        [
            Finding(f"{name}: insert", cost.done.best, "s", str(cost.done), most=1),
            Finding(f"{name}: memory of insert", cost.peak / 1e6, "MB", "", most=200),
        ],
        [Table("external weights, in place", COLUMNS, rows_of(name, costs))],
    )


def many_nodes(setting: Setting, sizes: Sizes) -> Part:
    """Insert into models of many nodes: the curve over their number."""
    part, rows = Part("nodes"), []
    for nodes in sizes.nodes:
        with setting.room() as folder:
            model, layers = folder / "base.onnx", nodes // 3
            write_inline(model, layers, 16)
            one = {"one slot": ours(model, folder / "one.onnx", after=FIRST)}
            costs = try_all(one | everyone(model, setting), min(sizes.runs, 3))
        rows += rows_of(f"{nodes:,} nodes, {layers:,} slots", costs)
        cost = costs["one slot"]
        if nodes == NODES_AT and isinstance(cost, Cost):
            what = f"{nodes:,} nodes: insert one slot, processor"
            part.findings.append(
                Finding(what, cost.busy.best, "s", f"wall clock {cost.done}", most=2)
            )
    part.tables.append(Table("many nodes", COLUMNS, rows))
    return part


def losses(setting: Setting, sizes: Sizes) -> Part:
    """The fields that are not in the result as they were in the base."""
    part, rows = Part("lost"), []
    with setting.room() as folder:
        model = folder / "base.onnx"
        for name, pattern in (("every field", ALL), *(REAL if sizes is FULL else ())):
            if name == "every field":
                onnx.save(rich_model(), model)
            else:
                shutil.copyfile(fetch(name), model)
            base = onnx.load(model)
            commands = everyone(model, setting, copy=False, after=pattern)
            del commands["insert --thin"]  # `pack` makes of it what `insert` writes
            for who, command in commands.items():
                try:
                    run(command)
                except CommandError as error:
                    rows.append((name, who, f"fails: {error}", ""))
                    continue
                gone = lost(base, onnx.load(command.writes[0]))
                rows.append((name, who, str(len(gone)), ", ".join(gone[:3])))
                if who == "insert":
                    what = f"{name}: fields lost"
                    part.findings.append(Finding(what, len(gone), "fields", "", most=0))
    part.tables.append(Table("lost or changed", ("in", "by", "fields", "for example"), rows))
    return part


def benchmark(setting: Setting) -> Part:
    """Time, memory and losses over the size of the weights."""
    sizes = setting.pick(FULL, QUICK, TINY)
    whole = Part("insert")
    for each in (start, inline, external, losses):
        say(f"insert: {each.__name__}")
        whole.add(each(setting, sizes))
    return whole


def nodes_benchmark(setting: Setting) -> Part:
    """Time and memory over the number of nodes."""
    say("nodes")
    return many_nodes(setting, setting.pick(FULL, QUICK, TINY))


if __name__ == "__main__":
    sys.exit(alone(benchmark, __doc__))
