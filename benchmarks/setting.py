"""Where and how large to measure: the options that all benchmarks share."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import peers
from measuring import Part
from showing import missed, show, surroundings, without_goals

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
SIZES = ("full", "quick", "tiny")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a benchmark is given.

    Attributes:
        size: One of `SIZES`; the goals are for `full`.
        folder: A place for large files; the system's own if None.
        peers: The Python that has the other libraries, if they take part.
        torch: A Python with torch, transformers and peft, if there is one.
    """

    size: str = "full"
    folder: Path | None = None
    peers: Path | None = None
    torch: Path | None = None

    @contextmanager
    def room(self) -> Iterator[Path]:
        """A folder that is deleted afterwards."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            yield Path(name)

    def pick(self, full: T, quick: T, tiny: T) -> T:
        """What belongs to the size."""
        return dict(zip(SIZES, (full, quick, tiny), strict=True))[self.size]


Benchmark = Callable[[Setting], Part]


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that all have."""
    made = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="small models, no goals")
    made.add_argument("--tiny", action="store_true", help="only to see that it works")
    made.add_argument("--folder", type=Path, help="a place for the models")
    made.add_argument("--no-peers", action="store_true", help="install no other library")
    made.add_argument(
        "--peers",
        type=Path,
        default=ROOT / ".venv-peers",
        help="where the other libraries are installed (default: .venv-peers)",
    )
    torch = os.environ.get("ONNX_ADAPT_TORCH")
    made.add_argument(
        "--torch",
        type=Path,
        default=Path(torch) if torch else None,
        help="a Python with torch, transformers and peft (default: $ONNX_ADAPT_TORCH)",
    )
    return made


def setting(options: argparse.Namespace) -> Setting:
    """What the options say."""
    size = "tiny" if options.tiny else "quick" if options.quick else "full"
    python = None if options.no_peers else peers.environment(options.peers.absolute())
    return Setting(size, options.folder, python, options.torch)


def measured(benchmark: Benchmark, given: Setting) -> Part:
    """Run one benchmark and print what it finds, with goals only at the full size."""
    part = benchmark(given)
    if given.size != "full":
        part = without_goals(part)
    part.where = f"{surroundings()}; peers: {peers.versions() if given.peers else 'none'}"
    show(part)
    print(f"\n{part.where}")
    return part


def alone(benchmark: Benchmark, about: str | None) -> int:
    """Run one benchmark; the exit status is 1 if a goal is missed."""
    given = setting(parser(about).parse_args())
    return int(bool(missed([measured(benchmark, given)])))
