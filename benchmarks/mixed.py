"""A batch with another adapter in each row: one run of a batched model, or one per adapter.

Times of the processor are the best of many, on one thread, each a ratio to the base on the
same batch. `session` is what a session on the batched model chooses by itself, and the last
column how much longer that takes than the faster of the two. `first run` packs the adapters
anew. `gather` is a model made for comparison only: each row's weights are picked out of a
stack in the graph.

    python benchmarks/mixed.py
    python benchmarks/mixed.py --bottleneck 64
    python benchmarks/mixed.py --quick
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

import onnx_adapt as oa
from onnx_adapt.cli.outputs import print_table, say

WIDTH, LAYERS = 768, 24
CASES = (
    *((2, 1, 2), (8, 1, 2), (8, 1, 4), (8, 1, 8), (32, 1, 4), (32, 1, 8)),
    *((8, 4, 4), (8, 16, 4), (8, 16, 8), (32, 16, 4), (32, 16, 8)),
    *((8, 128, 2), (8, 128, 4), (8, 128, 8)),
)
"""Batch, positions, adapters."""
QUICK = ((8, 1, 4), (8, 16, 4), (8, 128, 4))

Run = Callable[[], Any]


def base_model(width: int, layers: int) -> onnx.ModelProto:
    """Dense layers one after the other, each with a bias and a residual."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(layers):
        x = f"x{i}" if i else "x"
        w = rng.standard_normal((width, width)).astype(np.float32) / np.float32(width**0.5)
        weights += [
            numpy_helper.from_array(w, f"w{i}"),
            numpy_helper.from_array(np.zeros(width, np.float32), f"b{i}"),
        ]
        nodes += [
            helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"], f"layer{i}"),
            helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}"], f"bias{i}"),
            helper.make_node("Tanh", [f"a{i}"], [f"x{i + 1}"], f"act{i}"),
        ]
    shape = ["batch", "positions", width]
    ends = [helper.make_tensor_value_info(n, 1, shape) for n in ("x", f"x{layers}")]
    graph = helper.make_graph(nodes, "dense", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def gather_model(width: int, layers: int) -> onnx.ModelProto:
    """The same with slots that pick each row's weights out of a stack by its number."""
    model = base_model(width, layers)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    declare = helper.make_tensor_value_info
    model.graph.input.append(declare("rows", onnx.TensorProto.INT64, ["batch"]))
    for i in range(layers):
        down, up = f"down{i}", f"up{i}"
        model.graph.input.append(declare(down, 1, [f"n{i}", width, f"r{i}"]))
        model.graph.input.append(declare(up, 1, [f"n{i}", f"r{i}", width]))
        nodes[3 * i + 1].output[0] = f"t{i}"
        model.graph.node.extend(nodes[3 * i : 3 * i + 2])
        model.graph.node.extend(
            [
                helper.make_node("Gather", [down, "rows"], [f"{down}/rows"]),
                helper.make_node("Gather", [up, "rows"], [f"{up}/rows"]),
                helper.make_node("MatMul", [f"t{i}", f"{down}/rows"], [f"h{i}"]),
                helper.make_node("Relu", [f"h{i}"], [f"r{i}/act"]),
                helper.make_node("MatMul", [f"r{i}/act", f"{up}/rows"], [f"u{i}"]),
                helper.make_node("Add", [f"t{i}", f"u{i}"], [f"a{i}"]),
            ]
        )
        model.graph.node.append(nodes[3 * i + 2])
    return model


def one_thread() -> ort.SessionOptions:
    """Session options for times that do not depend on the number of cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def random_adapters(model: oa.Model, count: int, size: int) -> list[oa.Adapter]:
    """Adapters of one bottleneck for plain slots."""
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32) * np.float32(0.03)

    return [
        oa.make_adapter(
            model,
            str(i),
            {
                s.name: {"down": draw(s.width, size), "up": draw(size, s.width)}
                for s in oa.list_slots(model)
            },
        )
        for i in range(count)
    ]


@dataclass(frozen=True, slots=True)
class Bench:
    """Sessions on the models, and the adapters they have loaded."""

    base: Any
    plain: oa.AdapterSession
    batched: oa.AdapterSession
    gather: Any
    adapters: list[oa.Adapter]

    def ways(self, batch: int, positions: int, count: int) -> dict[str, Run]:
        """Every way to run one batch, by name."""
        rng = np.random.default_rng(2)
        x = rng.standard_normal((batch, positions, WIDTH)).astype(np.float32)
        number = np.arange(batch) % count
        feeds, rows = {"x": x}, [str(i) for i in number]
        picked: dict[str, Any] = {"rows": number}
        for i, slot in enumerate(self.adapters[0].weights):
            for part in ("down", "up"):
                stack = np.stack([a.weights[slot][part] for a in self.adapters[:count]])
                picked[f"{part}{i}"] = ort.OrtValue.ortvalue_from_numpy(stack)

        def one_run() -> Any:
            self.batched._model.base_size, size = 1 << 60, self.batched._model.base_size
            try:
                return self.batched.run(feeds, adapter=rows)
            finally:
                self.batched._model.base_size = size

        def first_run() -> Any:
            self.batched._cache._packs.clear()
            return one_run()

        return {
            "base": lambda: self.base.run(None, feeds),
            "off": lambda: self.batched.run(feeds),
            "one adapter": lambda: self.plain.run(feeds, adapter="0"),
            "one adapter, batched": lambda: self.batched.run(feeds, adapter="0"),
            "grouped": lambda: self.plain.run(feeds, adapter=rows),
            "one run": one_run,
            "session": lambda: self.batched.run(feeds, adapter=rows),
            "first run": first_run,
            "gather": lambda: self.gather.run(None, {**feeds, **picked}),
        }


def check(ways: dict[str, Run]) -> None:
    """The ways to mix give the same numbers."""
    wanted = next(iter(ways["grouped"]().values()))
    for name in ("one run", "session", "first run", "gather"):
        got = ways[name]()
        value = got[0] if isinstance(got, list) else next(iter(got.values()))
        if not np.allclose(value, wanted, atol=1e-4):
            raise SystemExit(f"{name} is not what grouped runs give")


def times(ways: dict[str, Run], seconds: float) -> dict[str, float]:
    """The best time of each way, in seconds; they take turns, so noise meets all alike."""
    best = dict.fromkeys(ways, float("inf"))
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for name, run in ways.items():
            run()
            for _ in range(2):
                started = time.process_time()
                run()
                best[name] = min(best[name], time.process_time() - started)
    return best


def start(bottleneck: int) -> Bench:
    """Make the models and their sessions."""
    base = oa.Model(base_model(WIDTH, LAYERS))
    after = [f"bias{i}" for i in range(LAYERS)]
    plain, batched = oa.insert(base, after=after), oa.insert(base, after=after, batched=True)
    count = max(case[2] for case in CASES)
    adapters = random_adapters(plain, count, bottleneck)
    named = {adapter.name: adapter for adapter in adapters}
    sessions = [
        oa.AdapterSession(model, named, session_options=one_thread())
        for model in (plain, batched)
    ]
    raw = [
        ort.InferenceSession(proto.SerializeToString(), one_thread())
        for proto in (base.proto, gather_model(WIDTH, LAYERS))
    ]
    return Bench(raw[0], sessions[0], sessions[1], raw[1], adapters)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bottleneck", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10, help="for each row of the table")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    bench = start(given.bottleneck)
    say(
        f"{LAYERS} layers of {WIDTH}, bottleneck {given.bottleneck}; {platform.machine()}, "
        f"onnxruntime {version('onnxruntime')}, numpy {version('numpy')}"
    )
    rows = []
    names: tuple[str, ...] = ()
    for batch, positions, count in QUICK if given.quick else CASES:
        ways = bench.ways(batch, positions, count)
        check(ways)
        took = times(ways, given.seconds)
        names = tuple(took)
        ratios = [f"{took[name] / took['base']:.2f}" for name in names[1:]]
        over = f"{took['session'] / min(took['grouped'], took['one run']):.2f}"
        rows.append((batch, positions, count, f"{1e3 * took['base']:.1f} ms", *ratios, over))
    print_table(("batch", "positions", "adapters", *names, "session / best"), rows)


if __name__ == "__main__":
    main()
