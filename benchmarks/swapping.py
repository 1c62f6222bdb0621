"""What another adapter costs beside another session: time, memory, a thousand, threads.

Times are the best of many, of the processor; memory is that of a process of its own (PSS),
after each adapter has run.

    python benchmarks/swapping.py
    python benchmarks/swapping.py --quick
"""

from __future__ import annotations

import gc
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from dense_models import base_model, inputs, random_adapter
from measuring import Cell, Finding, Part, Table, in_turn, one_thread, ratio, same
from setting import Setting, alone

import onnx_adapt as oa
from onnx_adapt.cli.outputs import say

LAYERS, BOTTLENECK = 24, 64
NEW = "new InferenceSession and run"
LOAD = 1.0
"""At most, in milliseconds, for an adapter of 9.5 MB."""


def model_with_slots(layers: int) -> oa.Model:
    """The generated model with a slot in each layer."""
    return oa.insert(base_model(layers), after="layers.*/Add", bias=True)


def loads(folder: Path, adapted: oa.Model, adapter: oa.Adapter, runs: int) -> Part:
    """Loading an adapter and the first run with it, beside a session for each adapter."""
    model = oa.save_model(adapted, folder / "adapted.onnx").path
    session = oa.AdapterSession(model, session_options=one_thread())
    files = [
        oa.save_adapter(adapter, folder / f"large{suffix}")
        for suffix in (".onnx_adapter", ".safetensors", ".npz")
    ]
    baked = oa.save_model(oa.bake(oa.fill(adapted, adapter)), folder / "baked.onnx").path
    x = inputs(1, 1)

    def swap(file: Path) -> None:
        session.load("a", file)
        session.run(x, adapter="a")

    def bare() -> None:
        ort.LoraAdapter().Load(str(files[0]))

    def anew() -> None:
        ort.InferenceSession(baked, one_thread()).run(None, x)

    calls: dict[str, Callable[[], Any]] = {
        f"load {file.suffix}": lambda file=file: session.load("a", file) for file in files
    }
    calls["LoraAdapter.Load, unchecked"] = bare
    calls |= {f"load {file.suffix} and run": lambda file=file: swap(file) for file in files}
    calls[NEW] = anew
    rounds = in_turn(calls, runs, clock=time.process_time)
    times = {name: min(each) * 1e3 for name, each in rounds.items()}
    new = times[NEW]
    load, first = times["load .onnx_adapter"], times["load .onnx_adapter and run"]
    size = f"{adapter.size / 1e6:.1f} MB, checked"
    return Part(
        "swap",
        [
            Finding("a new session / a swap, to the first output", new / first, "x"),
            Finding("load .onnx_adapter", load, "ms", size, most=LOAD),
        ],
        [
            Table(
                "an adapter of 9.5 MB, or a session with it baked in",
                ("of", "to a new session", "ms", "times faster than a new session"),
                [
                    (name, ratio(rounds, name, NEW), value, new / value)
                    for name, value in times.items()
                ],
            )
        ],
    )


def owned() -> int:
    """Bytes of memory that are this process's share (PSS)."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Pss: +(\d+)", text, re.M)
    return int(found[1]) << 10 if found else 0


def hold(kind: str, model: str, files: Sequence[str]) -> None:
    """Print the memory that one session with adapters takes, or a session for each."""
    x, before = inputs(1, 1), owned()
    if kind == "adapters":
        given = {str(i): file for i, file in enumerate(files)}
        session = oa.AdapterSession(model, given, session_options=one_thread())
        for name in given:
            session.run(x, adapter=name)
    else:
        sessions = [ort.InferenceSession(file, one_thread()) for file in files]
        for each in sessions:
            each.run(None, x)
    gc.collect()
    print(owned() - before)


def memory(setting: Setting) -> Part:
    """One session with 1, 10 and 100 adapters, beside as many sessions."""
    counts = setting.pick((1, 10, 100), (1, 10), (1, 2))
    layers = setting.pick(8, 8, 1)
    rows: list[tuple[Cell, ...]] = []
    with setting.room() as folder:
        adapted = model_with_slots(layers)
        adapter = random_adapter(adapted, 0, BOTTLENECK)
        model = str(oa.save_model(adapted, folder / "adapted.onnx").path)
        baked = oa.save_model(oa.bake(oa.fill(adapted, adapter)), folder / "baked.onnx").path
        files = [
            str(oa.save_adapter(adapter, folder / f"{i}.onnx_adapter"))
            for i in range(max(counts))
        ]
        for count in counts:
            given = {"adapters": files[:count], "sessions": [str(baked)] * count}
            found = {}
            for kind, each in given.items():
                line = [sys.executable, __file__, "--hold", kind, model, *each]
                done = subprocess.run(line, capture_output=True, text=True, check=True)
                found[kind] = int(done.stdout) / 1e6
            saved = found["sessions"] / found["adapters"]
            rows.append((count, saved, found["adapters"], found["sessions"]))
    size = f"a model of {layers * 2.36:.0f} MB, adapters of {adapter.size / 1e6:.1f} MB"
    title = f"memory, {size}"
    columns = ("adapters", "sessions / ours", "one session, MB", "as many sessions, MB")
    what = f"memory of {count} sessions / one with as many adapters"
    return Part("memory", [Finding(what, saved, "x", size)], [Table(title, columns, rows)])


def resident() -> int:
    """Bytes of memory this process has in use."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def thousand(folder: Path, adapted: oa.Model, count: int) -> Part:
    """Many adapters of 1 MB in one session, loaded, run and unloaded, twice over."""
    small = random_adapter(adapted, 7, 6)
    files = []
    for i in range(count):
        file = folder / "many" / f"a{i}.onnx_adapter"
        files.append(oa.save_adapter(small, file))
    session = oa.AdapterSession(adapted, session_options=one_thread())
    x = inputs(1, 1)
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
    rows: list[tuple[Cell, ...]] = [
        ("all loaded (mapped files count)", (sizes[0] - started) / 1e6),
        ("all unloaded", (sizes[1] - started) / 1e6),
        ("unloaded the third time", (sizes[5] - started) / 1e6),
    ]
    title = f"{count} adapters of {small.size / 1e6:.2f} MB, loaded and run: resident"
    return Part("thousand", tables=[Table(title, ("when", "MB more"), rows)])


def threads(folder: Path, adapted: oa.Model, seconds: float) -> Part:
    """Sixteen threads with random adapters: every output is compared with the one known."""
    given = {f"t{i}": random_adapter(adapted, i, 4 + i) for i in range(8)}
    kinds = (".onnx_adapter", ".safetensors")
    files = {
        name: oa.save_adapter(item, folder / f"{name}{kinds[i % 2]}")
        for i, (name, item) in enumerate(given.items())
    }
    session = oa.AdapterSession(adapted, files, session_options=one_thread(), max_adapters=6)
    x = inputs(2, 2)
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
    detail = f"{sum(counts)} runs in {seconds:.0f} s, {sum(wrong)} wrong"
    return Part("threads", [same("16 threads, every output is right", not any(wrong), detail)])


def benchmark(setting: Setting) -> Part:
    """All of it."""
    part = Part("swap")
    runs, many = setting.pick(30, 10, 1), setting.pick(1000, 50, 2)
    seconds = setting.pick(30.0, 3.0, 0.2)
    with setting.room() as folder:
        adapted = model_with_slots(setting.pick(LAYERS, LAYERS, 1))
        say("swap: loads")
        part.add(loads(folder, adapted, random_adapter(adapted, 0, BOTTLENECK), runs))
        say("swap: memory")
        part.add(memory(setting))
        say("swap: many adapters, many threads")
        part.add(thousand(folder, adapted, many))
        part.add(threads(folder, adapted, seconds))
    return part


if __name__ == "__main__":
    if sys.argv[1:2] == ["--hold"]:
        hold(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        sys.exit(alone(benchmark, __doc__))
