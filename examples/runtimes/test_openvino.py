"""Run exported models in OpenVINO and compare them with Python's outputs.

`./test` installs and makes what this needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from safetensors.numpy import load_file

MADE = Path(__file__).resolve().parent / "made"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # a CPU with bfloat16 would use that
TOLERANCE = 1e-4  # of the largest output

Arrays = Mapping[str, np.ndarray[Any, Any]]


def main() -> None:
    """Compare every model, and say what one that is not exported does."""
    for name, case in json.loads((MADE / "expected.json").read_text("utf-8")).items():
        inputs = arrays(case["inputs"])
        wanted = {key: arrays(outputs) for key, outputs in case["outputs"].items()}
        adapters = {key: load_file(MADE / f"{name}.{key}.safetensors") for key in wanted}
        how = exported(MADE / f"{name}.required.onnx", inputs, wanted, adapters)
        print(f"ok: {name}, exported, computes what Python computes, {how}")
        print(f"ok: {name}, not exported, {not_exported(name, inputs, wanted, adapters)}")


def exported(
    file: Path, inputs: Arrays, wanted: Mapping[str, Arrays], adapters: Mapping[str, Arrays]
) -> str:
    """Compare a model whose weights must be fed; says how adapters are swapped."""
    if any(value.ndim == 4 for value in adapters["trained"].values()):
        assert "dynamic weights shape" in refusal(file)
        for key, outputs in wanted.items():
            model = compiled(file, adapters[key])
            compare(model, {**inputs, **adapters[key]}, outputs)
        return "compiled once for each bottleneck"
    model = compiled(file)
    for key in ("neutral", "trained", "neutral", "trained"):
        compare(model, {**inputs, **adapters[key]}, wanted[key])
    return "however swapped"


def not_exported(
    name: str, inputs: Arrays, wanted: Mapping[str, Arrays], adapters: Mapping[str, Arrays]
) -> str:
    """What OpenVINO does with a model whose weights have defaults."""
    file = MADE / f"{name}.adapted.onnx"
    empty = name != "channels"  # whose default has a bottleneck of 1
    try:
        model = compiled(file)
    except RuntimeError:
        assert empty, file
        return "is not loaded: it has empty tensors"
    assert not empty, file
    compare(model, inputs, wanted["neutral"])
    try:
        model({**inputs, **adapters["trained"]})
    except RuntimeError:
        return "is the base, and refuses adapters"
    raise AssertionError(f"{file.name} took an adapter")


def refusal(file: Path) -> str:
    """Why OpenVINO does not compile a model; empty if it does."""
    try:
        compiled(file)
    except RuntimeError as error:
        return str(error)
    return ""


def compiled(file: Path, adapter: Arrays | None = None) -> openvino.CompiledModel:
    """A model on the CPU, in float32; with an adapter for weights of its shapes only."""
    core = openvino.Core()
    model = core.read_model(file)
    if adapter is not None:
        shapes = {port.get_any_name(): port.partial_shape for port in model.inputs}
        shapes |= {name: openvino.PartialShape(v.shape) for name, v in adapter.items()}
        model.reshape(shapes)
    return core.compile_model(model, "CPU", EXACT)


def compare(model: openvino.CompiledModel, feeds: Arrays, wanted: Arrays) -> None:
    """See that a model computes what is wanted."""
    found = model(feeds)
    for name, value in wanted.items():
        apart = np.abs(found[name] - value).max()
        assert apart <= TOLERANCE * np.abs(value).max(), f"{name} is {apart} from Python's"


def arrays(described: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays that are written as JSON."""
    return {
        name: np.array(item["data"], item["type"]).reshape(item["dims"])
        for name, item in described.items()
    }


if __name__ == "__main__":
    main()
