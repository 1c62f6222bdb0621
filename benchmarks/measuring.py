"""Measure commands and calls in turn, and hold what was found: shared by all benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ADAPT = str(Path(sys.executable).with_name("onnx-adapt"))
SECONDS = 600
"""How long a command may take."""

# A process starts with the peak memory of the one it came from: this one stays small.
_LAUNCHER = """
import json, os, resource, subprocess, sys, time
command, written, room, seconds = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (room, room))
started = time.perf_counter()
try:
    status = subprocess.call(command, stdout=subprocess.DEVNULL, timeout=seconds)
except subprocess.TimeoutExpired:
    sys.exit(f"it takes longer than {seconds} s")
done = time.perf_counter() - started
for path in filter(os.path.exists, written if status == 0 else ()):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
on_disk = time.perf_counter() - started
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(status, done, on_disk, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line, the files it writes, and whether they stay until its next run."""

    line: Sequence[str]
    writes: tuple[Path, ...] = ()
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Times:
    """How long something took, once per run, in seconds."""

    each: tuple[float, ...]

    @property
    def best(self) -> float:
        """The shortest: whatever else the machine does only adds to it."""
        return min(self.each)

    def __str__(self) -> str:
        return f"{self.best:.2f} s (to {max(self.each):.2f})"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a command took.

    Attributes:
        done: Time until it ended; what it wrote may still be in memory.
        on_disk: Time until all it wrote was on the disk.
        busy: Time of the processor; other processes disturb it less.
        peak: Most memory resident at once in any run, in bytes.
    """

    done: Times
    on_disk: Times
    busy: Times
    peak: int


Run = tuple[float, float, float, int]


class CommandError(Exception):
    """A command did not do what it should; the text is why."""


_UNCOMPILED = "PYTHONDONTWRITEBYTECODE"


def memory_left() -> int:
    """Bytes of memory that can be had without swapping."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return int(text.split("MemAvailable:")[1].split()[0]) << 10


def run(command: Command) -> Run:
    """Run a command once, with nothing left to write to disk from before.

    It may not take more than three quarters of the memory there is.

    Returns:
        Seconds until it ended, until all was on disk, of the processor; its peak memory.

    Raises:
        CommandError: If it fails.
    """
    os.sync()
    room = memory_left() * 3 // 4
    order = json.dumps([list(command.line), list(map(str, command.writes)), room, SECONDS])
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER, order]
    # Installed libraries are compiled already; ours in a clone would be compiled in each run.
    own = {key: value for key, value in os.environ.items() if key != _UNCOMPILED}
    ended = subprocess.run(launch, capture_output=True, text=True, check=False, env=own)
    status, *numbers = ended.stdout.split() or ["1"]
    if int(status):
        said = ended.stderr.strip().splitlines() or [f"exit status {status}"]
        raise CommandError(said[-1][:160])
    done, on_disk, busy, peak = numbers
    return float(done), float(on_disk), float(busy), int(peak)


def try_all(commands: Mapping[str, Command], runs: int) -> dict[str, Cost | CommandError]:
    """Run commands in turn, so that noise meets all alike; one that failed is left out."""
    rounds: dict[str, list[Run]] = {name: [] for name in commands}
    failed: dict[str, CommandError] = {}
    for _ in range(runs):
        for name, command in commands.items():
            for file in command.writes:
                file.unlink(missing_ok=True)
            if name not in failed:
                try:
                    rounds[name].append(run(command))
                except CommandError as error:
                    failed[name] = error
            for file in () if command.keep else command.writes:
                file.unlink(missing_ok=True)
    return {name: failed.get(name) or _cost(found) for name, found in rounds.items()}


def measure(commands: Mapping[str, Command], runs: int) -> dict[str, Cost]:
    """The same of commands that must not fail."""
    found = try_all(commands, runs)
    for name, cost in found.items():
        if isinstance(cost, CommandError):
            raise SystemExit(f"{name}: {cost}")
    return {name: cost for name, cost in found.items() if isinstance(cost, Cost)}


def _cost(rounds: Sequence[Run]) -> Cost:
    done, on_disk, busy, peaks = zip(*rounds, strict=True)
    return Cost(Times(done), Times(on_disk), Times(busy), max(peaks))


def in_turn(
    calls: Mapping[str, Callable[[], Any]],
    runs: int,
    seconds: float = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds of each call, all of them in turn: they share every noise.

    There are `runs` rounds, and more until `seconds` have passed. A round makes each call
    as often as takes 5 ms, after one that is not timed: else a call that shares weights
    with the one before it finds them in the processor's caches. With the clock
    `time.process_time`, what other processes do to the machine counts for less.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    often = dict.fromkeys(calls, 1)
    began, rounds = time.perf_counter(), 0
    while rounds <= runs or time.perf_counter() - began < seconds:
        for name, call in calls.items():
            call()
            start = clock()
            for _ in range(often[name]):
                call()
            took = (clock() - start) / often[name]
            if rounds:
                times[name].append(took)
            else:
                often[name] = max(1, int(0.005 / max(took, 1e-5)))
        rounds += 1
    return times


@dataclass(frozen=True, slots=True)
class Ratio:
    """How long something took, measured by something else; less is better.

    Attributes:
        value: The median of the rounds.
        spread: Half of the distance between the 10th and the 90th percentile of the rounds.
    """

    value: float
    spread: float

    @classmethod
    def of(cls, ours: Sequence[float], other: Sequence[float]) -> Ratio:
        """The ratios of two calls that ran in the same rounds."""
        rounds = [a / b for a, b in zip(ours, other, strict=True)]
        if len(rounds) == 1:
            return cls(rounds[0], 0.0)
        tenths = quantiles(rounds, n=10, method="inclusive")
        return cls(median(rounds), (tenths[-1] - tenths[0]) / 2)

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.spread:.2f}"


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> Ratio:
    """The ratio of two calls of `in_turn`."""
    return Ratio.of(times[name], times[to])


def one_thread() -> Any:
    """Options of a session: ratios of two threads are noise on a busy machine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


@dataclass(frozen=True, slots=True)
class Finding:
    """A number, what it is made of, and what it should be at most or at least."""

    what: str
    value: float
    unit: str
    detail: str = ""
    most: float | None = None
    least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if there is none."""
        if self.most is None and self.least is None:
            return None
        return (self.most is None or self.value <= self.most) and (
            self.least is None or self.value >= self.least
        )

    @property
    def cells(self) -> tuple[str, ...]:
        """A line of the table: value, of what, the goal, detail."""
        value = "yes" if self.value else "NO"
        if self.unit != "yes":
            digits = 0 if self.unit in ("MB", "fields") or self.value >= 100 else 2
            value = f"{self.value:.{digits}f} {self.unit}"
        goal = ""
        if self.met is not None and self.unit != "yes":
            sign, limit = ("<=", self.most) if self.most is not None else (">=", self.least)
            goal = f"{sign} {limit:g}: {'yes' if self.met else 'NO'}"
        return value, self.what, goal, self.detail


def same(what: str, holds: bool, detail: str = "") -> Finding:
    """Something that should be so."""
    return Finding(what, float(holds), "yes", detail, least=1)


Cell = str | float | Ratio


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers side by side; a cell that is text says why there is no number.

    `all.py --check` compares the ratios. A row is known by its first texts and whole numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]


@dataclass(slots=True)
class Part:
    """What one benchmark found; `where` says on what machine, and with which versions."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    where: str = ""

    def add(self, other: Part) -> None:
        """Take over what another one found."""
        self.findings += other.findings
        self.tables += other.tables
        self.notes += other.notes
