"""Write what deployment pipelines make of tiny models, with adapters and PyTorch's answers.

The files in ``tests/pipelines/`` are made by this script and committed, so that the tests
need none of the pipelines::

    <architecture>/inputs.npz            inputs
    <architecture>/base.npz              what PyTorch computes from them: logits
    <architecture>/<method>/             a trained adapter, as its library saved it
    <architecture>/<method>.npz          what PyTorch computes with it
    <architecture>/decoded.npz           what PyTorch generates greedily, with LoRA and without
    <architecture>/<pipeline>/           the model files that the pipeline wrote

Weights are random and depend on names only, so every run and every library gives the same.
The pipelines need environments that exclude each other. From the root of the repository::

    python -m venv /tmp/optimum
    /tmp/optimum/bin/pip install torch==2.13.0 transformers==4.57.3 optimum-onnx==0.1.0
    /tmp/optimum/bin/pip install peft==0.18.0 adapters==1.3.0 onnx==1.23.2
    /tmp/optimum/bin/pip install onnxruntime==1.32.0 onnxslim==0.1.98
    /tmp/optimum/bin/pip install onnxconverter-common==1.16.0
    PYTHONHASHSEED=0 /tmp/optimum/bin/python tools/export_pipelines.py answers optimum

    python -m venv /tmp/genai
    /tmp/genai/bin/pip install torch==2.13.0 transformers==5.24.0 onnx==1.23.2
    /tmp/genai/bin/pip install onnx-ir==1.1.0 onnxruntime==1.32.0 onnxruntime-genai==0.18.0
    /tmp/genai/bin/python tools/export_pipelines.py genai

    python -m venv /tmp/mobius
    /tmp/mobius/bin/pip install torch==2.13.0 transformers==5.24.0 mobius-onnx==0.1.0
    /tmp/mobius/bin/python tools/export_pipelines.py mobius

Another name picks what to write: ``export_pipelines.py optimum --only bert/o2``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import onnx
from case_making import MACHINE_PATH, clean_folder
from export_fixtures import strip_stack_traces
from pipelines.architectures import ARCHITECTURES

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "pipelines"
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "optimum": {
        "bert/optimum": "by_optimum.plain",
        "bert/optimum_o1": "by_optimum.o1",
        "bert/optimum_o2": "by_optimum.o2",
        "bert/optimum_o3": "by_optimum.o3",
        "bert/optimum_fp16": "by_optimum.float16",
        "bert/ort_extended": "by_onnxruntime.extended",
        "bert/ort_all": "by_onnxruntime.everything",
        "bert/tjs_q8": "by_transformers_js.q8",
        "bert/tjs_bnb4": "by_transformers_js.bnb4",
        "bert/tjs_q4": "by_transformers_js.q4",
        "bert/tjs_q4f16": "by_transformers_js.q4f16",
        "bert/qdq": "by_onnxruntime.qdq",
        "bert/qdq_a16w8": "by_onnxruntime.qdq16",
        "bert/qoperator": "by_onnxruntime.qoperator",
        "bert/qattention": "by_onnxruntime.qattention",
        "albert/optimum_o2": "by_optimum.o2",
        "deberta/tjs_bnb4": "by_transformers_js.bnb4",
        "gpt2/optimum": "by_optimum.plain",
        "gpt2/optimum_o2": "by_optimum.o2",
        "gpt2/tjs_q8": "by_transformers_js.q8",
        "llama/optimum": "by_optimum.plain",
        "llama/ort_transformers": "by_onnxruntime.transformers_optimizer",
        "llama/tjs_q4f16": "by_transformers_js.q4f16",
        "t5/optimum": "by_optimum.plain",
        "bart/optimum": "by_optimum.plain",
        "bart/optimum_o2": "by_optimum.o2",
        "whisper/optimum": "by_optimum.plain",
        "whisper/tjs_q8": "by_transformers_js.q8",
    },
    "genai": {
        "llama/genai": "by_genai.fp32",
        "llama/genai_int4": "by_genai.int4",
        "llama/genai_requantised": "by_genai.requantised",
        "qwen3/genai": "by_genai.fp32",
        "phi3/genai": "by_genai.fp32",
    },
    "mobius": {
        "llama/mobius": "by_mobius.default",
        "llama/mobius_cpu": "by_mobius.cpu",
        "qwen3/mobius_cpu": "by_mobius.cpu",
        "t5/mobius": "by_mobius.default",
    },
}
"""By the environment that a pipeline needs: its fixture, and the function that writes it."""


def clean(path: Path) -> None:
    """Take stack traces and documentation out of a model that was written.

    Raises:
        RuntimeError: If the file still holds a path of this machine.
    """
    model = onnx.load(path)
    strip_stack_traces(model)
    for node in model.graph.node:
        node.ClearField("doc_string")
    onnx.save(model, path)
    if found := MACHINE_PATH.search(path.read_bytes()):
        raise RuntimeError(f"{path} holds {found.group()!r}")


def write_pipeline(fixture: str, function: str, home: Path) -> None:
    """Write what one pipeline makes of one architecture."""
    module, _, call = function.partition(".")
    folder = clean_folder(home / fixture)
    write = getattr(importlib.import_module(f"pipelines.{module}"), call)
    write(fixture.partition("/")[0], folder)
    for path in sorted(folder.glob("*.onnx")):
        clean(path)
        print(f"{fixture}/{path.name}: {path.stat().st_size // 1000} kB", flush=True)


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="+", choices=["answers", *ENVIRONMENTS])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--only", default="", help="part of the names to write")
    asked = parser.parse_args()
    for environment in asked.environments:
        if environment == "answers":
            from pipelines.trained import write_answers

            for name in ARCHITECTURES:
                if asked.only in name:
                    write_answers(name, asked.folder / name)
            continue
        for fixture, function in ENVIRONMENTS[environment].items():
            if asked.only in fixture:
                write_pipeline(fixture, function, asked.folder)


if __name__ == "__main__":
    sys.exit(main())
