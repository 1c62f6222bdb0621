"""A language model in onnxruntime-genai: the base, its slots off and on, and another build.

Ways take turns, and each number is the shortest of many, a ratio to the base: of the processor
for the prompt and a token, and of the wall for a token, which needs a quiet machine.

    onnx-adapt insert llm/model.onnx --adapter lora/ -o llm/adapted.onnx --thin
    onnx-adapt convert lora/ --for llm/adapted.onnx -o lora.onnx_adapter
    python benchmarks/decode.py llm lora.onnx_adapter --beside built-with-adapter-path
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from onnx_adapt.cli.outputs import print_table, say

PROMPT, TOKENS = 128, 32

Seconds = tuple[float, float, float]
Run = Callable[[], Seconds]


def model(folder: Path, threads: int, file: str = "") -> Any:
    """Load a model from its folder, on some threads."""
    config = og.Config(str(folder))
    decoder: dict[str, Any] = {"session_options": {"intra_op_num_threads": threads}}
    decoder |= {"filename": file} if file else {}
    config.overlay(json.dumps({"model": {"decoder": decoder}}))
    return og.Model(config)


def run(loaded: Any, adapters: Any = None) -> Seconds:
    """Write some tokens.

    Returns:
        The processor's for the prompt, and the fewest of it and of the wall for a token.
    """
    settings = og.GeneratorParams(loaded)
    most = PROMPT + TOKENS + 2
    settings.set_search_options(max_length=most, min_length=most, do_sample=False)
    generator = og.Generator(loaded, settings)
    if adapters is not None:
        generator.set_active_adapter(adapters, "on")
    prompt = np.random.default_rng(0).integers(3, 3000, PROMPT).astype(np.int32)
    started = time.process_time()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    read = time.process_time() - started
    busy, wall = [], []
    for _ in range(TOKENS):
        began, started = time.perf_counter(), time.process_time()
        generator.generate_next_token()
        busy.append(time.process_time() - started)
        wall.append(time.perf_counter() - began)
    return read, min(busy), min(wall)


def ways(given: argparse.Namespace, threads: int) -> dict[str, Run]:
    """Each way to write, by name."""
    base = model(given.folder, threads)
    adapted = model(given.folder, threads, given.adapted)
    adapters = og.Adapters(adapted)
    adapters.load(str(given.adapter), "on")
    found: dict[str, Run] = {
        "base": lambda: run(base),
        "off": lambda: run(adapted),
        "on": lambda: run(adapted, adapters),
    }
    for folder in given.beside:
        other = model(folder, threads)
        found[folder.name] = lambda other=other: run(other)  # type: ignore[misc]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the base, as genai's builder makes it")
    parser.add_argument("adapter", type=Path, help="an .onnx_adapter file")
    parser.add_argument("--adapted", default="adapted.onnx", help="its file in the folder")
    parser.add_argument("--beside", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    say(f"onnxruntime-genai {version('onnxruntime-genai')}, {os.cpu_count()} cores")
    rows = []
    for threads in given.threads:
        calls = ways(given, threads)
        times: dict[str, list[Seconds]] = {name: [] for name in calls}
        for _ in range(given.rounds):
            for name, call in calls.items():
                times[name].append(call())
        best = {name: np.min(each, 0) for name, each in times.items()}
        for name, each in best.items():
            rows.append((threads, name, *(f"{x:.3f}" for x in each / best["base"])))
    print_table(("threads", "way", "prompt", "token", "token, wall"), rows)


if __name__ == "__main__":
    main()
