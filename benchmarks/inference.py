"""What adapters cost per run, beside the base and beside the arithmetic they add.

Every ratio is the median over rounds in which all ways run in turn, in one process, on one
thread, by the processor's time: other processes disturb it less than the wall clock.

    python benchmarks/inference.py
    python benchmarks/inference.py --quick
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import onnxruntime as ort
import peers
from dense_models import WIDTH, base_model, inputs, random_adapter, with_lora
from measuring import Command, Finding, Part, Table, in_turn, one_thread, ratio, run
from setting import Setting, alone

import onnx_adapt as oa
from onnx_adapt.cli.outputs import say

from fetch_models import fetch  # isort: skip

OFF, ON, LIMIT = 1.05, 1.03, 1.05
"""At most: off / base, swapped / baked, baked / base over what the arithmetic adds."""

REAL, REAL_SITES = "minilm-l3", "/model/**/output/dense/MatMul"
Call = Callable[[], Any]
Feeds = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Layers of the generated model, batches and lengths, bottlenecks, seconds per cell."""

    layers: int
    shapes: tuple[tuple[int, int], ...]
    bottlenecks: tuple[int, ...]
    seconds: float


FULL = Sizes(
    layers=12,
    shapes=((1, 1), (1, 16), (1, 128), (1, 512), (8, 1), (8, 16), (8, 128), (32, 1), (32, 64)),
    bottlenecks=(8, 64, 256),
    seconds=3,
)
QUICK = Sizes(layers=4, shapes=((1, 1), (1, 128), (8, 16)), bottlenecks=(8, 64), seconds=1)
TINY = Sizes(layers=1, shapes=((1, 2),), bottlenecks=(4,), seconds=0)


@dataclass(frozen=True, slots=True)
class Ways:
    """Sessions that compute the base, and adapters on it in every way.

    Attributes:
        raw: Plain sessions of ONNX Runtime, by name; `base` is one.
        adapted: Sessions with slots, by the name of the way.
    """

    raw: dict[str, Any]
    adapted: dict[str, oa.AdapterSession]

    def calls(self, feeds: Feeds) -> dict[str, Call]:
        """What to time."""
        slots = self.adapted["LoraAdapter"]
        calls: dict[str, Call] = {
            name: lambda session=session: session.run(None, feeds)
            for name, session in self.raw.items()
        }
        calls["off"] = lambda: slots.run(feeds)
        for name, session in self.adapted.items():
            calls[name] = lambda session=session, name=name: session.run(feeds, adapter=name)
        return calls


def ways(folder: Path, base: oa.Model, adapted: oa.Model, bottleneck: int) -> Ways:
    """The base, the adapter baked, and the same adapter mapped and fed."""
    adapter = random_adapter(adapted, 0, bottleneck)
    models = {"base": base, "baked": oa.bake(oa.fill(adapted, adapter))}
    raw = {name: plain(folder / f"{name}.onnx", model) for name, model in models.items()}
    saved = oa.save_model(adapted, folder / "adapted.onnx").path
    files = {
        "LoraAdapter": oa.save_adapter(adapter, folder / "a.onnx_adapter"),
        "feeds": oa.save_adapter(adapter, folder / "a.safetensors"),
    }
    session = oa.AdapterSession(saved, files, session_options=one_thread())
    return Ways(raw, dict.fromkeys(files, session))


def plain(path: Path, model: oa.Model) -> Any:
    """A session of ONNX Runtime's own on a model."""
    return ort.InferenceSession(oa.save_model(model, path).path, one_thread())


def add_lora(
    found: Ways,
    folder: Path,
    base: oa.Model,
    bottleneck: int,
    sizes: Sizes,
    python: Path | None,
) -> None:
    """LoRA at the same layers: ours swapped, and what onnxsim injects."""
    model = with_lora(base, sizes.layers)
    path = oa.save_adapter(random_adapter(model, 0, bottleneck), folder / "l.onnx_adapter")
    found.adapted["our LoRA"] = oa.AdapterSession(
        oa.save_model(model, folder / "lora.onnx").path,
        {"our LoRA": path},
        session_options=one_thread(),
    )
    if python:
        target = folder / "onnxsim.onnx"
        command = peers.insertion(python, "onnxsim", folder / "base.onnx", target, "*")
        run(Command([*command.line, str(bottleneck)]))
        found.raw["onnxsim LoRA"] = ort.InferenceSession(target, one_thread())


COLUMNS = ("batch", "sequence", "bottleneck", "base ms", "arithmetic")
NAMES = ("off", "baked", "LoraAdapter", "feeds", "our LoRA", "onnxsim LoRA")


def cell(
    found: Ways, feeds: Feeds, where: tuple[int, int, int], limit: float, seconds: float
) -> dict[str, Any]:
    """One line: every way as a ratio to the base."""
    calls = found.calls(feeds)
    times = in_turn(calls, 5 if seconds else 1, seconds, time.process_time)
    ratios = {name: ratio(times, name, "base") for name in calls if name != "base"}
    ratios["swapped / baked"] = ratio(times, "LoraAdapter", "baked")
    ratios["fed / baked"] = ratio(times, "feeds", "baked")
    base = median(times["base"]) * 1e3
    return {**dict(zip(COLUMNS, (*where, base, limit), strict=True)), **ratios}


def dense(setting: Setting, sizes: Sizes) -> list[dict[str, Any]]:
    """The generated model, over batch, sequence and bottleneck."""
    base, rows = base_model(sizes.layers), []
    adapted = oa.insert(base, after="layers.*/Add")
    for bottleneck in sizes.bottlenecks:
        with setting.room() as folder:
            found = ways(folder, base, adapted, bottleneck)
            add_lora(found, folder, base, bottleneck, sizes, setting.peers)
            for batch, length in sizes.shapes:
                where, feeds = (batch, length, bottleneck), inputs(batch, length)
                limit = 1 + 2 * bottleneck / WIDTH
                rows.append(cell(found, feeds, where, limit, sizes.seconds))
    return rows


def real(setting: Setting, sizes: Sizes) -> list[dict[str, Any]]:
    """A trained sentence encoder, two slots in each of its three blocks."""
    import numpy as np

    base, rows = oa.open_model(fetch(REAL)), []
    adapted = oa.insert(base, after=REAL_SITES)
    kernels = linear_work(oa.open_model(fetch(REAL)).proto)
    for bottleneck in sizes.bottlenecks:
        with setting.room() as folder:
            found = ways(folder, base, adapted, bottleneck)
            more = sum(2 * s.width * bottleneck for s in oa.list_slots(adapted))
            for batch, length in ((1, 1), (1, 16), (1, 128), (1, 512), (8, 128)):
                ids = np.arange(batch * length).reshape(batch, length) % 20000 + 1000
                feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
                attention = 3 * 2 * length * 384
                limit = 1 + more / (kernels + attention)
                where = (batch, length, bottleneck)
                rows.append(cell(found, feeds, where, limit, sizes.seconds))
    return rows


def linear_work(proto: onnx.ModelProto) -> int:
    """Multiplications per token in products with weights."""
    sizes = {
        t.name: t.dims[0] * t.dims[1] for t in proto.graph.initializer if len(t.dims) == 2
    }
    return sum(sizes.get(n.input[1], 0) for n in proto.graph.node if n.op_type == "MatMul")


def goals(name: str, rows: list[dict[str, Any]]) -> list[Finding]:
    """The worst of all lines, where it is, and the middle of them."""
    for row in rows:
        row["baked / limit"] = row["baked"].value / row["arithmetic"]
    found = []
    rows = [{key: getattr(cell, "value", cell) for key, cell in row.items()} for row in rows]
    for what, key, most in (
        ("off / base", "off", OFF),
        ("LoraAdapter / baked", "swapped / baked", ON),
        ("feeds / baked", "fed / baked", ON),
        ("baked / base over the arithmetic", "baked / limit", LIMIT),
    ):
        worst = max(rows, key=lambda row: row[key])
        at = f"batch {worst['batch']}, sequence {worst['sequence']}"
        above = sum(row[key] > most for row in rows)
        detail = f"worst of {len(rows)} at {at}, bottleneck {worst['bottleneck']}; "
        detail += f"{above} above; median {median(row[key] for row in rows):.3f}"
        found.append(Finding(f"{name}: {what}", worst[key], "x", detail, most=most))
    return found


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """All lines."""
    names = [name for name in NAMES if name in rows[0]]
    columns = (*COLUMNS, *names, "swapped / baked")
    return Table(title, columns, [tuple(row[name] for name in columns) for row in rows])


def benchmark(setting: Setting) -> Part:
    """All of it."""
    sizes = setting.pick(FULL, QUICK, TINY)
    part = Part("inference")
    for name, find in (("dense", dense), (REAL, real)):
        if name == REAL and setting.size != "full":
            continue
        say(f"inference: {name}")
        rows = find(setting, sizes)
        part.findings += goals(name, rows)
        part.tables.append(table(f"{name}: time / base", rows))
    return part


if __name__ == "__main__":
    sys.exit(alone(benchmark, __doc__))
