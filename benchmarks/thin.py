"""What thin models cost, and what many of them share, beside full ones.

Models are generated, and everything runs in processes of its own. It needs 8 GB of disk,
6 GB of memory (--quick: 1 GB) and Linux.

    python benchmarks/thin.py
    python benchmarks/thin.py --quick
"""

from __future__ import annotations

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from insert import ADAPT, ALL, FIRST, Row, measure, row, surroundings
from large_models import write_inline

import onnx_adapt as oa
from onnx_adapt.cli.show import print_table, say, size_text

_SESSIONS = """
import json, re, sys, time, numpy, onnxruntime
def own():
    text = open("/proc/self/smaps_rollup").read()
    return int(re.search(r"^Pss: +(\\d+)", text, re.M)[1]) << 10
prepacking, *files = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = 1
if prepacking == "off":
    options.add_session_config_entry("session.disable_prepacking", "1")
before, started = own(), time.perf_counter()
sessions = [onnxruntime.InferenceSession(file, options) for file in files]
loaded = time.perf_counter() - started
width = sessions[0].get_inputs()[0].shape[2]
x = numpy.random.default_rng(0).standard_normal((1, 2, width), numpy.float32)
for session in sessions:
    session.run(None, {"x": x})
memory = own() - before
times = []
for turn in range(50):
    started = time.perf_counter()
    sessions[turn % len(sessions)].run(None, {"x": x})
    times.append(time.perf_counter() - started)
print(json.dumps([loaded, memory, sorted(times)[25]]))
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the models are, how many variants there are, and how often each runs."""

    width: int
    layers: int
    shared_width: int
    variants: int
    runs: int


FULL = Sizes(width=8192, layers=6, shared_width=2048, variants=20, runs=5)
QUICK = Sizes(width=2048, layers=6, shared_width=1024, variants=20, runs=3)


def insertion(folder: Path, sizes: Sizes) -> list[Row]:
    """Insert thin and full into a large inline model, and make the thin one whole."""
    model, copy, thin, full, packed = (
        folder / f"{name}.onnx" for name in ("in", "cp", "thin", "full", "packed")
    )
    name = f"inline {size_text(write_inline(model, sizes.layers, sizes.width))}"
    insert = [ADAPT, "insert", str(model), "--no-verify", "--after", ALL, "-o"]
    cp, whole, small, pack = measure(
        ["cp", str(model), str(copy)],
        [*insert, str(full)],
        [*insert, str(thin), "--thin"],
        [ADAPT, "pack", str(thin), "-o", str(packed)],
        runs=sizes.runs,
        outputs=(copy, thin, full, packed),
    )
    rows = [
        row(f"{name}: {verb}", cost.done.typical, "s", f"{cost.done}; cp {cp.done}", most)
        for verb, cost, most in (("insert", whole, None), ("insert --thin", small, 0.5))
    ]
    ratio = pack.done.typical / cp.done.typical
    same = filecmp.cmp(full, packed, shallow=False)
    return [
        *rows,
        row(f"{name}: insert --thin, memory", small.peak / 1e6, "MB", "", 200),
        row(f"{name}: size of it", thin.stat().st_size / 1e3, "kB", "", 100),
        row(f"{name}: pack / cp", ratio, "x", pack.done),
        ("yes" if same else "NO", f"{name}: pack gives the full save", "", "by byte"),
    ]


def sharing(folder: Path, sizes: Sizes) -> list[Row]:
    """Sessions of as many baked variants in one process: do they share the weights?"""
    model = folder / "base.onnx"
    weights = write_inline(model, 4, sizes.shared_width)
    base = oa.open_model(model)
    files: dict[str, list[Path]] = {"thin": [], "full": []}
    for seed in range(sizes.variants):
        variant = oa.insert(base, after=FIRST, baked=True, bottleneck=8, seed=seed)
        for kind, paths in files.items():
            path = folder / f"{kind}{seed}.onnx"
            paths.append(oa.save_model(variant, path, thin=kind == "thin").path)
    on_disk = {kind: sum(p.stat().st_size for p in files[kind]) for kind in files}
    name = f"{sizes.variants} variants of {size_text(weights)}"
    ratio = on_disk["full"] / (on_disk["thin"] + model.stat().st_size)
    detail = f"{size_text(on_disk['thin'])} and the base; full {size_text(on_disk['full'])}"
    rows = [row(f"{name}: disk, full / thin", ratio, "x", detail)]
    for prepacking in ("on", "off"):
        found = {
            kind: sessions(prepacking, paths, sizes.runs) for kind, paths in files.items()
        }
        for kind, (loaded, memory, ran) in found.items():
            what = f"{name}, prepacking {prepacking}: {kind}, memory / weights"
            detail = f"loaded in {loaded:.2f} s; a run {ran * 1e3:.2f} ms"
            rows.append(row(what, memory / weights, "x", detail))
    return rows


def sessions(prepacking: str, files: Sequence[Path], runs: int) -> tuple[float, ...]:
    """Medians of seconds to load all, memory of one's own, and seconds of a run."""
    command = [sys.executable, "-c", _SESSIONS, prepacking, *map(str, files)]
    found = [
        json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(runs)
    ]
    return tuple(median(numbers) for numbers in zip(*found, strict=True))


def main() -> int:
    """Measure everything and print it; the exit status is 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models a tenth of the size")
    parser.add_argument("--folder", type=Path, help="a place for the models")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    rows = []
    for part in (insertion, sharing):
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
