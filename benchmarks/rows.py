"""A batch with another adapter in each row: grouped, on batched slots, one by one.

Every ratio is to the base on the same batch, by the processor's time, on one thread.

    python benchmarks/rows.py
    python benchmarks/rows.py --quick
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from dense_models import base_model, inputs, random_adapter
from measuring import Cell, Part, Table, in_turn, one_thread, ratio
from setting import Setting, alone

import onnx_adapt as oa
from onnx_adapt.cli.outputs import say

BOTTLENECK = 16
FULL = (
    *((2, 1, 2), (8, 1, 2), (8, 1, 4), (8, 1, 8), (32, 1, 4), (32, 1, 8), (32, 1, 32)),
    *((8, 16, 2), (8, 16, 4), (8, 16, 8), (32, 16, 4), (8, 128, 2), (8, 128, 8)),
)
"""Batch, positions, adapters."""
QUICK, TINY = ((8, 1, 4), (8, 16, 4), (8, 128, 8)), ((2, 1, 2),)
WAYS = ("one by one", "grouped", "batched")

Session = Any


def sessions(layers: int) -> dict[str, Session]:
    """A session for each kind of slot; `batched` ones where the library has them."""
    base = base_model(layers)
    models = {"grouped": oa.insert(base, after="layers.*/Add")}
    if "batched" in inspect.signature(oa.insert).parameters:
        models["batched"] = oa.insert(base, after="layers.*/Add", batched=True)
    most = max(count for _, _, count in FULL)
    adapters = {str(i): random_adapter(models["grouped"], i, BOTTLENECK) for i in range(most)}
    return {
        name: oa.AdapterSession(model, adapters, session_options=one_thread())
        for name, model in models.items()
    }


def calls(
    found: dict[str, Session], case: tuple[int, int, int]
) -> dict[str, Callable[[], Any]]:
    """Every way to run one batch; they give the same numbers."""
    batch, length, count = case
    feeds, chosen = inputs(batch, length), [str(i % count) for i in range(batch)]
    single = [{"x": feeds["x"][i : i + 1]} for i in range(batch)]
    (output,) = found["grouped"].run(feeds)

    def one_by_one() -> Any:
        each = [
            found["grouped"].run(row, adapter=name)[output]
            for row, name in zip(single, chosen, strict=True)
        ]
        return {output: np.concatenate(each)}

    ways: dict[str, Callable[[], Any]] = {"one by one": one_by_one}
    for name, session in found.items():
        ways[name] = lambda session=session: session.run(feeds, adapter=chosen)
    wanted = one_by_one()[output]
    for name, way in ways.items():
        if not np.allclose(way()[output], wanted, atol=1e-4):
            raise SystemExit(f"{name} is not what single runs give")
    return {"base": lambda: found["grouped"].run(feeds), **ways}


def benchmark(setting: Setting) -> Part:
    """All of it."""
    say("mixed: rows")
    found = sessions(setting.pick(12, 4, 1))
    rows: list[tuple[Cell, ...]] = []
    seconds = setting.pick(4.0, 1.0, 0.0)
    names = [name for name in WAYS if name in ("one by one", *found)]
    for case in setting.pick(FULL, QUICK, TINY):
        ways = calls(found, case)
        times = in_turn(ways, 5 if seconds else 1, seconds, time.process_time)
        ratios = {name: ratio(times, name, "base") for name in names}
        rows.append((*case, *ratios.values(), min(names, key=lambda name: ratios[name].value)))
    columns = ("batch", "positions", "adapters", *names, "best")
    title = f"time / base of the whole batch, bottleneck {BOTTLENECK}"
    part = Part("mixed", tables=[Table(title, columns, rows)])
    if "batched" not in found:
        part.notes.append("This version has no batched slots: no mixed batch in one run.")
    return part


if __name__ == "__main__":
    sys.exit(alone(benchmark, __doc__))
