"""The tiny Llamas of tests/genai: put slots into them, and let them generate."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from safetensors.numpy import load_file

import onnx_adapt as oa

FOLDER = Path(__file__).parent / "genai"
PLACES = ("model.layers.*.attn.o_proj", "model.layers.*.mlp.down_proj")
STEPS = 16

with np.load(FOLDER / "expected.npz") as _stored:
    _EXPECTED = {name: _stored[name] for name in _stored.files}
PROMPT = _EXPECTED["prompt"].astype(np.int32)


@dataclass(frozen=True)
class Text:
    """What was generated: the tokens, and the logits each came from."""

    tokens: list[int]
    logits: np.ndarray


def by_pytorch(name: str) -> Text:
    """What PyTorch generates with an adapter, or with `base`."""
    return Text(_EXPECTED[f"{name}.tokens"].tolist(), _EXPECTED[f"{name}.logits"])


def bottlenecks(name: str, model: oa.Model | None = None) -> oa.Adapter:
    """A bottleneck adapter, with the names that slots have in a graph of genai's builder."""
    weights: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_file(FOLDER / f"{name}.safetensors").items():
        slot, _, part = key.replace(".self_attn.", ".attn.").rpartition(".")
        weights.setdefault(slot, {})[part] = array
    return oa.make_adapter(model, name, weights) if model else oa.Adapter(name, weights)


def put(model: oa.Model, folder: Path) -> Path:
    """Save a model of tests/genai with all that onnxruntime-genai reads beside it."""
    assert model.path is not None
    shutil.copytree(model.path.parent, folder, ignore=shutil.ignore_patterns("model.onnx*"))
    oa.save_model(model, folder / "model.onnx")
    return folder


def start(model: og.Model, adapters: og.Adapters | None = None, *names: str) -> og.Generator:
    """A greedy generator with adapters on, that has read the prompt."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(PROMPT) + STEPS, do_sample=False)
    generator = og.Generator(model, params)
    for name in names:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(PROMPT)
    return generator


def step(generator: og.Generator) -> np.ndarray:
    """Generate a token: the logits it came from."""
    logits = np.array(generator.get_logits(), copy=True).reshape(-1)
    generator.generate_next_token()
    return logits


def written(generator: og.Generator) -> list[int]:
    """The tokens behind the prompt."""
    return [int(token) for token in generator.get_sequence(0)[len(PROMPT) :]]


def generate(model: og.Model, adapters: og.Adapters | None = None, *names: str) -> Text:
    """Generate to the end with a generator of its own."""
    generator = start(model, adapters, *names)
    logits = [step(generator) for _ in range(STEPS)]
    return Text(written(generator), np.stack(logits))
