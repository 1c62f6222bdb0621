"""Every benchmark, beside its peers, in one run; tables and a plot go to `results/`.

    python benchmarks/all.py                          # 30 minutes, 20 GB of disk
    python benchmarks/all.py --only insert,inference  # the others stay as they are in results/
    python benchmarks/all.py --quick                  # 3 minutes; only prints
    python benchmarks/all.py --check                  # is a ratio worse than in results/?

The exit status is 1 if a goal is missed (`--quick` has none). With `--check` it is 1 if a
ratio is worse, and 2 if there is nothing to compare; compare runs of one size.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import checking
import checkpoints
import inference
import insert
import rows
import setting
import swapping
import thin
from measuring import Part
from showing import from_json, missed, to_json, to_markdown

from onnx_adapt.cli.outputs import say

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BENCHMARKS: dict[str, setting.Benchmark] = {
    "insert": insert.benchmark,
    "nodes": insert.nodes_benchmark,
    "thin": thin.benchmark,
    "inference": inference.benchmark,
    "swap": swapping.benchmark,
    "mixed": rows.benchmark,
    "checkpoints": checkpoints.benchmark,
}
HEAD = """# Results

Made by `python benchmarks/all.py`; what the numbers mean is told in `docs/performance.md`.
Times of commands are the best of several, ratios of runs are medians. `results.json` has the
same numbers.

![Time and memory beside peers](results.svg)
"""


def read(file: Path) -> dict[str, Part]:
    """What an earlier run found."""
    known = json.loads(file.read_text(encoding="utf-8"))
    return {name: from_json(each) for name, each in known.items()}


def save(parts: dict[str, Part], folder: Path, python: Path | None) -> None:
    """Write what was found, with what an earlier run found of other benchmarks."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    merged = (read(file) if file.exists() else {}) | parts
    whole = {name: merged[name] for name in BENCHMARKS if name in merged}
    found = {name: to_json(part) for name, part in whole.items()}
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    pages = [HEAD, *(to_markdown(part) for part in whole.values())]
    (folder / "README.md").write_text("\n".join(pages).rstrip() + "\n", encoding="utf-8")
    if python:
        subprocess.run([python, HERE / "plot.py", file, folder / "results.svg"], check=True)


def main() -> int:
    """Run what is asked for."""
    parser = setting.parser(__doc__)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, with commas")
    parser.add_argument(
        "--output", type=Path, help="a folder (default: results/; quick: none)"
    )
    parser.add_argument(
        "--check",
        nargs="?",
        type=Path,
        const=RESULTS / "results.json",
        metavar="FILE",
        help="compare with an earlier run (default: results/results.json), and write nothing",
    )
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - BENCHMARKS.keys():
        parser.error(f"there is no {min(unknown)!r}; there are {', '.join(BENCHMARKS)}")
    if options.check and not options.check.is_file():
        parser.error(f"there is no {options.check} to compare with")
    given = setting.setting(options)
    folder = options.output or (RESULTS if given.size == "full" else None)
    if options.check:
        folder = None
    parts: dict[str, Part] = {}
    for name in names:
        started = time.monotonic()
        parts[name] = setting.measured(BENCHMARKS[name], given)
        say(f"{name} took {time.monotonic() - started:.0f} s")
        parts[name].where = f"{datetime.now(timezone.utc):%Y-%m-%d}: {parts[name].where}"
        if folder:
            save(parts, folder, given.peers)
    for found in missed(parts.values()):
        say(f"missed: {' | '.join(found.cells)}")
    if options.check:
        return checking.report(parts, read(options.check))
    return int(bool(missed(parts.values())))


if __name__ == "__main__":
    sys.exit(main())
