"""What inserting into large models costs, beside copying the file.

Models are generated, every command runs in a process of its own, and the numbers are
medians. It needs 7 GB of disk and 6 GB of memory (--quick: 1 GB) and runs on Linux.

    python benchmarks/insert.py
    python benchmarks/insert.py --quick
"""

from __future__ import annotations

import argparse
import filecmp
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from large_models import write_external, write_inline

from onnx_adapt.cli.show import print_table, say, size_text

ADAPT = str(Path(sys.executable).with_name("onnx-adapt"))
ALL = "/layers.*/MatMul"
FIRST = "/layers.0/MatMul"

_LOAD = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"

# A process starts with the peak memory of the one it came from: this one stays small.
_LAUNCHER = """
import os, resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
done = time.perf_counter()
os.sync()
on_disk = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(status, done - started, on_disk - started, peak)
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the models are and how often each command runs."""

    width: int
    inline_layers: int
    external_layers: int
    nodes: int
    runs: int


FULL = Sizes(width=8192, inline_layers=6, external_layers=10, nodes=20_000, runs=5)
QUICK = Sizes(width=2048, inline_layers=6, external_layers=10, nodes=2_000, runs=3)


@dataclass(frozen=True, slots=True)
class Times:
    """How long something took, once per run, in seconds."""

    each: tuple[float, ...]

    @property
    def typical(self) -> float:
        """The median."""
        return median(self.each)

    def __str__(self) -> str:
        return f"{self.typical:.2f} s ({min(self.each):.2f} to {max(self.each):.2f})"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a command took.

    Attributes:
        done: Time until it ended; what it wrote may still be in memory.
        on_disk: Time until all it wrote was on the disk.
        peak: Most memory resident at once in any run, in bytes.
    """

    done: Times
    on_disk: Times
    peak: int


def run(command: Sequence[str]) -> tuple[float, float, int]:
    """Run a command once, with nothing left to write to disk from before.

    Returns:
        Seconds until it ended, seconds until all was on disk, and its peak memory.
    """
    os.sync()
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    ended = subprocess.run(launch, capture_output=True, text=True, check=True)
    status, done, on_disk, peak = ended.stdout.split()
    if int(status):
        raise SystemExit(f"{' '.join(command)} failed\n{ended.stderr}")
    return float(done), float(on_disk), int(peak)


def measure(
    *commands: Sequence[str], runs: int, outputs: Sequence[Path] = ()
) -> tuple[Cost, ...]:
    """Run commands in turn, so that noise meets all alike; delete `outputs` before a round."""
    rounds = []
    for _ in range(runs):
        for file in outputs:
            file.unlink(missing_ok=True)
        rounds.append([run(command) for command in commands])
    costs = []
    for single in zip(*rounds, strict=True):
        done, on_disk, peaks = zip(*single, strict=True)
        costs.append(Cost(Times(done), Times(on_disk), max(peaks)))
    return tuple(costs)


Row = tuple[str, str, str, str]


def row(what: str, value: float, unit: str, detail: object, most: float | None = None) -> Row:
    """One line of the result: the number, what it should be at most, what it is made of."""
    number = f"{value:.0f}" if unit == "MB" else f"{value:.2f}"
    goal = "" if most is None else f"{most:g} {unit}: {'yes' if value <= most else 'NO'}"
    return f"{number} {unit}", what, goal, str(detail)


def start(_: Path, sizes: Sizes) -> list[Row]:
    """The time until a command says something."""
    commands = [ADAPT, "--help"], [sys.executable, "-c", "pass"]
    shown, empty = measure(*commands, runs=4 * sizes.runs)
    detail = f"an empty Python {empty.done}"
    return [row("onnx-adapt --help", shown.done.typical, "s", detail, 0.25)]


def inline(folder: Path, sizes: Sizes) -> list[Row]:
    """Insert into a model with inline weights, remove again; `cp` is the measure."""
    model, copy, adapted, back = (folder / f"{n}.onnx" for n in ("in", "cp", "out", "back"))
    weights = write_inline(model, sizes.inline_layers, sizes.width)
    cp, insert, remove = measure(
        ["cp", str(model), str(copy)],
        [ADAPT, "insert", str(model), "-o", str(adapted), "--no-verify", "--after", ALL],
        [ADAPT, "remove", str(adapted), "-o", str(back)],
        runs=sizes.runs,
        outputs=(copy, adapted, back),
    )
    name = f"inline {size_text(weights)}"
    rows = []
    for verb, cost, most in (("insert", insert, 2), ("remove", remove, None)):
        for until, ours, theirs in (
            ("", cost.done, cp.done),
            (", until on disk", cost.on_disk, cp.on_disk),
        ):
            ratio = ours.typical / theirs.typical
            rows.append(
                row(f"{name}: {verb} / cp{until}", ratio, "x", f"{ours}; cp {theirs}", most)
            )
        rows.append(row(f"{name}: {verb}, memory", cost.peak / 1e6, "MB", "", 200))
    same = filecmp.cmp(model, back, shallow=False)
    rows.append(("yes" if same else "NO", f"{name}: remove gives the base", "", "by byte"))
    return rows + proof(model, adapted, weights)


def proof(model: Path, adapted: Path, weights: int) -> list[Row]:
    """How often the weights are in memory in a plain session, and while `verify` runs."""
    plain, verify = measure(
        [sys.executable, "-c", _LOAD, str(model)],
        [ADAPT, "verify", str(model), str(adapted)],
        runs=1,
    )
    name = f"inline {size_text(weights)}"
    times = (
        f"memory / weights: {verify.peak / weights:.2f} x in {verify.done.typical:.0f} s, "
        f"a session {plain.peak / weights:.2f} x in {plain.done.typical:.0f} s"
    )
    ratio = verify.peak / plain.peak
    return [row(f"{name}: verify / a plain session, memory", ratio, "x", times, 1.25)]


def external(folder: Path, sizes: Sizes) -> list[Row]:
    """Insert into a model with external data, in its own folder."""
    model = folder / "external.onnx"
    weights = write_external(model, sizes.external_layers, sizes.width)
    name = f"external {size_text(weights)}"
    return insertion(name, model, ALL, sizes.runs, seconds=1, megabytes=200)


def many_nodes(folder: Path, sizes: Sizes) -> list[Row]:
    """Insert into a model of very many nodes."""
    model, layers = folder / "nodes.onnx", sizes.nodes // 3
    write_inline(model, layers, 64)
    name = f"{sizes.nodes:,} nodes"
    return [
        *insertion(f"{name}, 1 slot", model, FIRST, sizes.runs, seconds=2),
        *insertion(f"{name}, {layers:,} slots", model, ALL, sizes.runs),
    ]


def insertion(
    name: str,
    model: Path,
    after: str,
    runs: int,
    seconds: float | None = None,
    megabytes: float | None = None,
) -> list[Row]:
    """Insert beside a model."""
    command = [ADAPT, "insert", str(model), "--no-verify", "--after", after]
    (cost,) = measure(command, runs=runs, outputs=[model.with_suffix(".adapted.onnx")])
    return [
        row(f"{name}: insert", cost.done.typical, "s", cost.done, seconds),
        row(f"{name}: insert, memory", cost.peak / 1e6, "MB", "", megabytes),
    ]


def surroundings() -> str:
    """The machine and the versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    names = ("onnx-adapt", "onnx", "onnxruntime", "protobuf", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    machine = f"{os.cpu_count()} vCPU, {memory:.0f} GB, {platform.system()}"
    return f"{machine}, Python {platform.python_version()}, {versions}"


def main() -> int:
    """Measure everything and print it; the exit status is 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models a tenth of the size")
    parser.add_argument("--folder", type=Path, help="a place for the models")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    rows = []
    for part in (start, inline, external, many_nodes):
        say(f"measuring: {part.__name__}")
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += part(Path(folder), sizes)
    if options.quick:  # the goals are for the full sizes: here the start-up counts for more
        rows = [(number, what, "", detail) for number, what, _, detail in rows]
    print_table(("value", "of", "at most", "median (lowest to highest)"), rows)
    print(f"\n{surroundings()}; {sizes.runs} runs")
    return int(any("NO" in number + goal for number, _, goal, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
