"""What thin models cost, and what many of them share, beside full ones.

Models are generated, and everything runs in processes of its own. It needs 8 GB of disk,
6 GB of memory (--quick: 1 GB) and Linux.

    python benchmarks/thin.py
    python benchmarks/thin.py --quick
"""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from insert import FIRST, ours
from large_models import write_inline
from measuring import ADAPT, Command, Finding, Part, measure, same
from setting import Setting, alone

import onnx_adapt as oa
from onnx_adapt.cli.outputs import say, size_text

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
TINY = Sizes(width=64, layers=2, shared_width=64, variants=2, runs=1)


def insertion(setting: Setting, sizes: Sizes) -> Part:
    """Insert thin and full into a large inline model, and make the thin one whole."""
    with setting.room() as folder:
        model, copy, thin, full, packed = (
            folder / f"{name}.onnx" for name in ("in", "cp", "thin", "full", "packed")
        )
        name = f"inline {size_text(write_inline(model, sizes.layers, sizes.width))}"
        pack = [ADAPT, "pack", str(thin), "-o", str(packed)]
        costs = measure(
            {
                "cp": Command(["cp", str(model), str(copy)], (copy,)),
                "full": ours(model, full, keep=True),
                "thin": ours(model, thin, "--thin", keep=True),
                "pack": Command(pack, (packed,), keep=True),
            },
            sizes.runs,
        )
        cp, small, whole = costs["cp"], costs["thin"], costs["pack"]
        detail = f"wall clock {small.done}; full {costs['full'].done}; cp {cp.done}"
        ratio = whole.done.best / cp.done.best
        return Part(
            "insert --thin",
            [
                Finding(f"{name}: --thin, processor", small.busy.best, "s", detail, most=0.5),
                Finding(f"{name}: memory of it", small.peak / 1e6, "MB", "", most=200),
                Finding(f"{name}: size of it", thin.stat().st_size / 1e3, "kB", "", most=100),
                Finding(f"{name}: pack / cp", ratio, "x", f"{whole.done}; cp {cp.done}"),
                same(f"{name}: pack gives the full save", filecmp.cmp(full, packed, False)),
            ],
        )


def sharing(setting: Setting, sizes: Sizes) -> Part:
    """Sessions of as many baked variants in one process: do they share the weights?"""
    with setting.room() as folder:
        return Part("sharing", shared(folder, sizes))


def shared(folder: Path, sizes: Sizes) -> list[Finding]:
    """Disk and memory, full beside thin, with and without prepacking."""
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
    rows = [Finding(f"{name}: disk, full / thin", ratio, "x", detail)]
    for prepacking in ("on", "off"):
        found = {
            kind: sessions(prepacking, paths, sizes.runs) for kind, paths in files.items()
        }
        for kind, (loaded, memory, ran) in found.items():
            what = f"{name}, prepacking {prepacking}: {kind}, memory / weights"
            detail = f"loaded in {loaded:.2f} s; a run {ran * 1e3:.2f} ms"
            rows.append(Finding(what, memory / weights, "x", detail))
    return rows


def sessions(prepacking: str, files: Sequence[Path], runs: int) -> tuple[float, ...]:
    """The best of: seconds to load all, memory of one's own, and seconds of a run."""
    command = [sys.executable, "-c", _SESSIONS, prepacking, *map(str, files)]
    found = [
        json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(runs)
    ]
    return tuple(min(numbers) for numbers in zip(*found, strict=True))


def benchmark(setting: Setting) -> Part:
    """All of it."""
    sizes = setting.pick(FULL, QUICK, TINY)
    whole = Part("thin")
    for each in (insertion, sharing):
        say(f"thin: {each.__name__}")
        whole.add(each(setting, sizes))
    return whole


if __name__ == "__main__":
    sys.exit(alone(benchmark, __doc__))
