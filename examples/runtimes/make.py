"""Make what the tests of the runtimes read: models, adapters, inputs and Python's outputs.

`python make.py`, where onnx-adapt is installed, writes everything into `made/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import onnx_adapt as oa

ROOT = Path(__file__).resolve().parents[2]
MADE = Path(__file__).resolve().parent / "made"
TRAINED = ("peft_bert_lora_default_ts", "peft_vit_lora")
CHANNELS = ROOT / "models/dnsmos-p808.onnx"
TRANSFORMERS = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}

Arrays = Mapping[str, np.ndarray[Any, Any]]


def main() -> None:
    """Write all files."""
    MADE.mkdir(exist_ok=True)
    made = {name: trained(name) for name in TRAINED} | {"channels": channels()}
    (MADE / "expected.json").write_text(json.dumps(made), encoding="utf-8")
    write_transformers(TRAINED[0])


def trained(name: str) -> dict[str, Any]:
    """A trained LoRA, with its classifier, of a transformer."""
    case = ROOT / "tests/cases" / name
    facts = json.loads((case / "case.json").read_text(encoding="utf-8"))
    home = case.parent / facts.get("base", name)
    base = oa.open_model(home / "base.onnx")
    checkpoint = oa.load_checkpoint(case / "adapter", base)
    model = oa.insert_checkpoint(base, checkpoint)
    return write(name, model, checkpoint.adapter, dict(np.load(home / "inputs.npz")))


def channels() -> dict[str, Any]:
    """A bottleneck of 5 on the channels of a convolution; its weights are random."""
    rng = np.random.default_rng(0)
    model = oa.insert(oa.open_model(CHANNELS), after="conv2d_5")
    (slot,) = oa.list_slots(model)
    shapes = {"down": (slot.width, 5), "up": (5, slot.width)}
    weights = {part: 0.2 * rng.standard_normal(shape) for part, shape in shapes.items()}
    adapter = oa.make_adapter(
        model, "random", {slot.name: {k: v.astype(np.float32) for k, v in weights.items()}}
    )
    features = rng.standard_normal((1, 900, 120)).astype(np.float32)
    return write("channels", model, adapter, {"input_1": features})


def write(name: str, model: oa.Model, adapter: oa.Adapter, inputs: Arrays) -> dict[str, Any]:
    """Write one model, as it is and exported, and say what Python computes with it."""
    exported, neutral = oa.export(model)
    oa.save_model(model, MADE / f"{name}.adapted.onnx")
    oa.save_model(exported, MADE / f"{name}.required.onnx")
    oa.save_adapter(neutral, MADE / f"{name}.neutral.safetensors")
    oa.save_adapter(adapter, MADE / f"{name}.trained.safetensors")
    with oa.AdapterSession(model, {"trained": adapter}) as session:
        outputs = {"neutral": session.run(inputs), "trained": session.run(inputs, "trained")}
    return {
        "inputs": {key: described(value) for key, value in inputs.items()},
        "outputs": {
            key: {output: described(value) for output, value in found.items()}
            for key, found in outputs.items()
        },
    }


def described(value: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array as JSON."""
    return {"type": str(value.dtype), "dims": value.shape, "data": value.ravel().tolist()}


def write_transformers(name: str) -> None:
    """Write the folders of a model, adapted and exported, as transformers.js reads them."""
    for form in ("adapted", "required"):
        folder = MADE / "transformers" / form
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        data = (MADE / f"{name}.{form}.onnx").read_bytes()
        (folder / "onnx/model.onnx").write_bytes(data)
        (folder / "config.json").write_text(json.dumps(TRANSFORMERS), encoding="utf-8")


if __name__ == "__main__":
    main()
