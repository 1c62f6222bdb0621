"""Many threads and many adapters: no wrong output, no leak."""

import gc
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
from adapter_models import bumped
from session_adapters import BASE, X, adapted_file, adapter, close

import onnx_adapt as oa

SECONDS = float(os.environ.get("ONNX_ADAPT_STRESS_SECONDS", "3"))
THREADS = 16


def test_threads_with_random_adapters_never_get_a_wrong_output(tmp_path: Path) -> None:
    """A minute by hand: ONNX_ADAPT_STRESS_SECONDS=60."""
    given = {f"a{i}": adapter(f"a{i}", i, 1 + i % 5) for i in range(12)}
    truth = {name: bumped(X, item) for name, item in given.items()}
    truth_at: dict[str | None, np.ndarray] = {**truth, None: BASE}
    suffixes = ("onnx_adapter", "safetensors", "npz")
    files = {
        name: oa.save_adapter(item, tmp_path / f"{name}.{suffixes[i % 3]}")
        for i, (name, item) in enumerate(given.items())
    }
    session = oa.AdapterSession(adapted_file(tmp_path), files, max_adapters=6)
    wrong: list[str] = []
    runs = [0] * THREADS
    end = time.monotonic() + SECONDS

    def call(thread: int) -> None:
        rng = random.Random(thread)
        while not wrong and (time.monotonic() < end or not runs[thread]):
            try:
                names = [rng.choice([None, *files]) for _ in X]
                kind = rng.random()
                if kind < 0.1:
                    session.reload(rng.choice(list(files)))
                elif kind < 0.4:
                    found = session.run({"x": X}, adapter=names)["y"]
                    expected = np.stack([truth_at[n][i] for i, n in enumerate(names)])
                    if not close(found, expected):
                        wrong.append(f"rows {names}")
                elif not close(
                    session.run({"x": X}, adapter=names[0])["y"], truth_at[names[0]]
                ):
                    wrong.append(f"{names[0]}")
                runs[thread] += 1
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(runs) > 0


def _resident() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_adapters_in_one_session_leave_nothing_behind(tmp_path: Path) -> None:
    size = 1000  # (4, 1000) and (1000, 4) twice: 64 kB each
    path = oa.save_adapter(adapter("x", 1, size), tmp_path / "x.onnx_adapter")
    session = oa.AdapterSession(adapted_file(tmp_path))

    def fill_and_empty() -> int:
        for i in range(1000):
            session.load(f"a{i}", path)
            session.run({"x": X}, adapter=f"a{i}")
        open_files = len(os.listdir("/proc/self/fd"))
        for i in range(1000):
            session.unload(f"a{i}")
        gc.collect()
        return open_files

    before = len(os.listdir("/proc/self/fd"))
    fill_and_empty()
    resident = _resident()
    assert fill_and_empty() <= before + 4
    assert session.adapters == {}
    assert _resident() - resident < 20e6
