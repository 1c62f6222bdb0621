"""From a folder that PEFT saved to the first output: through onnx-adapt, and through torch.

Each way is a process of its own, from its start to its output. Torch is not installed for
this: without `--torch PYTHON` (with torch, transformers, peft, onnxruntime and onnxscript)
only our own ways are timed, on a small case of the tests.

    python benchmarks/checkpoints.py --torch ~/torch/bin/python
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from measuring import (
    ADAPT,
    Cell,
    Command,
    CommandError,
    Cost,
    Finding,
    Part,
    Ratio,
    Table,
    run,
    try_all,
)
from setting import ROOT, Setting, alone

from onnx_adapt.cli.outputs import say

EXPORTERS = ("torchscript", "dynamo")

_OURS = """
import sys, numpy, onnx_adapt as oa
folder, baked = sys.argv[1], sys.argv[2:] == ["baked"]
base = oa.open_model(f"{folder}/base.onnx")
trained = oa.load_checkpoint(f"{folder}/adapter", base)
model = oa.insert_checkpoint(base, trained, baked=baked)
feeds = dict(numpy.load(f"{folder}/inputs.npz"))
session = oa.AdapterSession(model)
found = session.run(feeds, adapter=None if baked else trained.adapter)
numpy.save(f"{folder}/{'baked' if baked else 'swapped'}.npy", found["logits"])
"""
_SWAP = """
import sys, numpy, onnx_adapt as oa
folder = sys.argv[1]
session = oa.AdapterSession(f"{folder}/m.onnx", {"a": f"{folder}/m.adapter.safetensors"})
found = session.run(dict(numpy.load(f"{folder}/inputs.npz")), adapter="a")
numpy.save(f"{folder}/files.npy", found["logits"])
"""
_SHELL = """
set -e
"$1" insert "$2/base.onnx" --adapter "$2/adapter" -o "$2/m.onnx" --no-verify --force
exec "$3" -c "$4" "$2"
"""


def prepare(folder: Path, setting: Setting) -> str:
    """Make a base and an adapter; a case of the tests if there is no torch.

    Returns:
        What they are.
    """
    if setting.torch is None:
        case = ROOT / "tests" / "cases" / "peft_bert_lora_default_ts"
        shutil.copytree(case, folder, dirs_exist_ok=True)
        return "a tiny BERT"
    layers, width = setting.pick((12, 768), (2, 128), (1, 64))
    script = Path(__file__).with_name("torch_export.py")
    line = [setting.torch, script, "make", folder, layers, width]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"torch_export.py make: {done.stderr.strip()}")
    size = (folder / "base.onnx").stat().st_size
    return f"a BERT of {layers} layers, {size / 1e6:.0f} MB"


def commands(folder: Path, setting: Setting) -> dict[str, Command]:
    """Every way to the first output; the last is what a second start takes."""
    python, place = sys.executable, str(folder)
    ways = {
        "ours, swappable": Command([python, "-c", _OURS, place]),
        "ours, baked": Command([python, "-c", _OURS, place, "baked"]),
        "ours, command line": Command(["sh", "-c", _SHELL, "sh", ADAPT, place, python, _SWAP]),
        "ours, from its files": Command([python, "-c", _SWAP, place]),
    }
    script = Path(__file__).with_name("torch_export.py")
    for exporter in EXPORTERS if setting.torch else ():
        line = [setting.torch, script, exporter, folder]
        ways[f"torch, {exporter}"] = Command([*map(str, line)])
    return ways


def benchmark(setting: Setting) -> Part:
    """All of it."""
    say("checkpoints")
    part = Part("checkpoints")
    with setting.room() as folder:
        name = prepare(folder, setting)
        ways = commands(folder, setting)
        run(ways["ours, command line"])
        costs = try_all(ways, setting.pick(3, 1, 1))
        outputs = {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}
    mine = costs["ours, swappable"]
    rows: list[tuple[Cell, ...]] = []
    if isinstance(mine, CommandError):
        raise SystemExit(str(mine))
    for who, cost in costs.items():
        if isinstance(cost, CommandError):
            rows.append((who, "", "", "", "", "", str(cost)))
            continue
        busy = Ratio.of(mine.busy.each, cost.busy.each)
        ratios = (busy, cost.done.best / mine.done.best, cost.peak / mine.peak)
        rows.append((who, *ratios, cost.done.best, cost.peak / 1e6, ""))
    ratio_columns = ("ours / it, processor", "time / ours", "memory / ours")
    columns = ("way", *ratio_columns, "s", "MB", "fails with")
    part.tables.append(Table(f"{name}: to the first output", columns, rows))
    wanted = outputs.pop("swapped")
    apart = max(float(np.abs(value - wanted).max()) for value in outputs.values())
    part.findings.append(
        Finding(f"{name}: largest difference of outputs", apart * 1e6, "1e-6", most=100)
    )
    for exporter in EXPORTERS:
        cost = costs.get(f"torch, {exporter}")
        if isinstance(cost, Cost):
            what, detail = (
                f"{name}: torch, {exporter} / ours",
                f"{cost.done}; ours {mine.done}",
            )
            part.findings.append(Finding(what, cost.done.best / mine.done.best, "x", detail))
    if setting.torch is None:
        part.notes.append("No torch was given (--torch): nothing to compare with.")
    return part


if __name__ == "__main__":
    sys.exit(alone(benchmark, __doc__))
