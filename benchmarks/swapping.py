"""What adapters cost at inference: load, swap, run, a thousand of them, many threads.

Every ratio is of two things timed in turn in one process, medians of many runs.

    python benchmarks/swapping.py
    python benchmarks/swapping.py --quick
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

import onnx_adapt as oa
from onnx_adapt.cli.show import print_table, say

LAYERS, WIDTH, BOTTLENECK = 24, 768, 64
RNG = np.random.default_rng(0)
ON, OFF, LOAD = 1.03, 1.05, 1.0


def base_model(layers: int = LAYERS) -> oa.Model:
    """Layers of MatMul, Add and Relu, 2.4 MB each."""
    nodes, stored, x = [], [], "x"
    for i in range(layers):
        weight = RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 28
        stored += [
            numpy_helper.from_array(weight, f"w{i}"),
            numpy_helper.from_array(np.zeros(WIDTH, np.float32), f"b{i}"),
        ]
        nodes += [
            helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"], f"layers.{i}/MatMul"),
            helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}"], f"layers.{i}/Add"),
            helper.make_node("Relu", [f"a{i}"], [f"r{i}"], f"layers.{i}/Relu"),
        ]
        x = f"r{i}"
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "seq", WIDTH])
        for name in ("x", x)
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opset = helper.make_opsetid("", 17)
    return oa.Model(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def random_adapter(model: oa.Model, seed: int, bottleneck: int = BOTTLENECK) -> oa.Adapter:
    """Weights for every slot; 9.5 MB for a bottleneck of 64."""
    rng = np.random.default_rng(seed)
    shapes = {
        "down": (WIDTH, bottleneck),
        "up": (bottleneck, WIDTH),
        "down_bias": (bottleneck,),
        "up_bias": (WIDTH,),
    }
    return oa.Adapter(
        f"a{seed}",
        {
            slot.name: {
                part: (rng.standard_normal(shape) / 50).astype(np.float32)
                for part, shape in shapes.items()
            }
            for slot in oa.list_slots(model)
        },
    )


def in_turn(calls: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """The median milliseconds of each call, all of them in turn: they share every noise."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(runs + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def options() -> ort.SessionOptions:
    """One thread: ratios of two are noise."""
    found = ort.SessionOptions()
    found.intra_op_num_threads = 1
    found.log_severity_level = 3
    return found


def loads(folder: Path, adapted: oa.Model, adapter: oa.Adapter, runs: int) -> list[list[str]]:
    """Loading an adapter of 9.5 MB beside what it saves: a session for each adapter."""
    session = oa.AdapterSession(adapted)
    files = [
        oa.save_adapter(adapter, folder / f"large{suffix}")
        for suffix in (".onnx_adapter", ".safetensors", ".npz")
    ]
    baked = oa.save_model(oa.bake(oa.fill(adapted, adapter)), folder / "baked.onnx").path

    def bare() -> None:
        ort.LoraAdapter().Load(str(files[0]))

    calls: dict[str, Callable[[], Any]] = {
        f"load {file.suffix}, checked": lambda file=file: session.load("a", file)
        for file in files
    }
    calls["ONNX Runtime's LoraAdapter.Load, unchecked"] = bare
    times = in_turn(calls, runs)
    slow = in_turn({"new InferenceSession": lambda: ort.InferenceSession(baked, options())}, 3)
    return [
        [name, f"{value:.2f} ms", f"{slow['new InferenceSession'] / value:.0f} x faster"]
        for name, value in times.items()
    ] + [
        [
            "a new InferenceSession of the baked model",
            f"{slow['new InferenceSession']:.0f} ms",
            "",
        ]
    ]


def runs_of(
    folder: Path, base: oa.Model, adapted: oa.Model, adapter: oa.Adapter, runs: int
) -> tuple[list[list[str]], bool]:
    """Slots off against the base, adapters against the same weights baked."""
    plain = oa.save_model(base, folder / "base.onnx").path
    model = oa.save_model(adapted, folder / "adapted.onnx").path
    baked = folder / "baked.onnx"
    mapped = oa.save_adapter(adapter, folder / "on.onnx_adapter")
    held = oa.save_adapter(adapter, folder / "on.safetensors")
    given = {"mapped": mapped, "held": held}
    without = ort.InferenceSession(plain, options())
    frozen = ort.InferenceSession(baked, options())
    session = oa.AdapterSession(model, given, session_options=options())
    rows, good = [], True
    for length in (1, 16, 128):
        x = {"x": RNG.standard_normal((1, length, WIDTH)).astype(np.float32)}
        calls: dict[str, Callable[[], Any]] = {
            "base": lambda x=x: without.run(None, x),
            "off": lambda x=x: session.run(x),
            "baked": lambda x=x: frozen.run(None, x),
            "mapped": lambda x=x: session.run(x, adapter="mapped"),
            "held": lambda x=x: session.run(x, adapter="held"),
        }
        found = in_turn(calls, max(runs // (1 if length < 128 else 5), 5))
        off = found["off"] / found["base"]
        on = found["mapped"] / found["baked"], found["held"] / found["baked"]
        good &= off <= OFF and max(on) <= ON
        rows.append(
            [
                str(length),
                f"{found['base']:.2f} ms",
                f"{off:.3f} x",
                f"{found['baked'] / found['base']:.3f} x",
                f"{on[0]:.3f} x",
                f"{on[1]:.3f} x",
            ]
        )
    return rows, good


def resident() -> int:
    """Bytes of memory this process has in use."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def thousand(folder: Path, adapted: oa.Model, count: int) -> list[list[str]]:
    """Many adapters of 1 MB in one session, loaded, run and unloaded, twice over."""
    small = random_adapter(adapted, 7, 6)
    files = []
    for i in range(count):
        file = folder / "many" / f"a{i}.onnx_adapter"
        files.append(oa.save_adapter(small, file))
    session = oa.AdapterSession(adapted, session_options=options())
    x = {"x": RNG.standard_normal((1, 1, WIDTH)).astype(np.float32)}
    session.run(x)
    started, sizes = resident(), []
    for _ in range(3):
        for i, file in enumerate(files):
            session.load(f"a{i}", file)
            session.run(x, adapter=f"a{i}")
        sizes.append(resident())
        for i in range(count):
            session.unload(f"a{i}")
        gc.collect()
        sizes.append(resident())
    total = count * small.size / 1e6
    return [
        [f"{count} adapters of {small.size / 1e6:.2f} MB loaded and run", f"{total:.0f} MB"],
        ["resident, all loaded (mapped files count)", f"+{(sizes[0] - started) / 1e6:.0f} MB"],
        ["resident, all unloaded", f"+{(sizes[1] - started) / 1e6:.1f} MB"],
        ["resident, unloaded the third time", f"+{(sizes[5] - started) / 1e6:.1f} MB"],
    ]


def threads(folder: Path, adapted: oa.Model, seconds: float) -> tuple[list[list[str]], bool]:
    """Sixteen threads with random adapters: every output is compared with the one known."""
    given = {f"t{i}": random_adapter(adapted, i, 4 + i) for i in range(8)}
    kinds = (".onnx_adapter", ".safetensors")
    files = {
        name: oa.save_adapter(item, folder / f"{name}{kinds[i % 2]}")
        for i, (name, item) in enumerate(given.items())
    }
    session = oa.AdapterSession(adapted, files, session_options=options(), max_adapters=6)
    x = {"x": RNG.standard_normal((2, 2, WIDTH)).astype(np.float32)}
    (output,) = session.run(x)
    truth = {name: session.run(x, adapter=name)[output] for name in (None, *files)}
    end, wrong, counts = time.monotonic() + seconds, [0] * 16, [0] * 16

    def call(thread: int) -> None:
        rng = random.Random(thread)
        while time.monotonic() < end:
            name = rng.choice([None, *files])
            found = session.run(x, adapter=name)[output]
            wrong[thread] += not np.array_equal(found, truth[name])
            counts[thread] += 1

    workers = [threading.Thread(target=call, args=(i,)) for i in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    row = [f"16 threads, {seconds:.0f} s", f"{sum(counts)} runs", f"{sum(wrong)} wrong"]
    return [row], not any(wrong)


def main() -> None:
    """Measure everything and print it; exit 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="A few runs, without goals.")
    parser.add_argument("--folder", type=Path, default=None, help="Where to work.")
    args = parser.parse_args()
    count = 15 if args.quick else 100
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        base = base_model()
        adapted = oa.insert(base, after="layers.*/Add", bias=True)
        adapter = random_adapter(adapted, 0)
        say(f"{adapter.size / 1e6:.1f} MB of adapter, {LAYERS} slots of {WIDTH}, one thread")
        loaded = loads(folder, adapted, adapter, count)
        print_table(("of", "time", "beside a new session"), loaded)
        run, run_good = runs_of(folder, base, adapted, adapter, count)
        columns = ("sequence", "base", "off / base", "baked / base", "on / baked (mapped)")
        print_table((*columns, "on / baked (held)"), run)
        print_table(("of", "memory"), thousand(folder, adapted, 50 if args.quick else 1000))
        run_threads, threads_good = threads(folder, adapted, 3 if args.quick else 60)
        print_table(("of", "runs", "outputs"), run_threads)
    fast = float(loaded[0][1].split()[0]) < LOAD
    if not args.quick and not (fast and run_good and threads_good):
        sys.exit(1)


if __name__ == "__main__":
    main()
