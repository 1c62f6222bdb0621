"""What PEFT can ask of a model that onnxruntime-genai's builder made, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from genai_models import FOLDER, PROMPT
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from trained_cases import run

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

BASE = FOLDER / "tinyllama" / "model.onnx"
SPANS = {"q": slice(0, 64), "k": slice(64, 96), "v": slice(96, 128)}
PREFIX = "base_model.model.model.layers"
Tensors = dict[str, np.ndarray]


def _trained(folder: Path, change: Callable[[Tensors], Tensors], **settings: object) -> Path:
    """The LoRA of tests/genai with other tensors and settings."""
    shutil.copytree(FOLDER / "lora", folder)
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    config = folder / "adapter_config.json"
    old = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**old, **settings}), encoding="utf-8")
    return folder


def _logits(path: Path, feeds: Tensors) -> np.ndarray:
    ids = PROMPT[None].astype(np.int64)
    past = {
        f"past_key_values.{layer}.{half}": np.zeros((1, 2, 0, 16), np.float32)
        for layer in range(2)
        for half in ("key", "value")
    }
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past, **feeds}
    return np.asarray(run(path, every)["logits"])


def _inserted(trained: Path, tmp_path: Path) -> np.ndarray:
    base = oa.open_model(BASE)
    checkpoint = oa.load_checkpoint(trained, base)
    path = tmp_path / "adapted.onnx"
    oa.save_model(oa.insert_checkpoint(base, checkpoint), path)
    return _logits(path, checkpoint.adapter.feeds())


def _merged(change: Callable[[str, np.ndarray], np.ndarray], path: Path) -> np.ndarray:
    """The logits with every projection of q, k and v, as PyTorch has it, changed."""
    proto = onnx.load(BASE)
    for tensor in proto.graph.initializer:
        layer, found, _ = tensor.name.removeprefix("model.layers.").partition(".attn.qkv_proj")
        if found:
            packed = numpy_helper.to_array(tensor).copy()
            for name, span in SPANS.items():
                module = f"{PREFIX}.{layer}.self_attn.{name}_proj"
                packed[:, span] = change(module, packed[:, span].T).T
            tensor.CopyFrom(numpy_helper.from_array(packed, tensor.name))
    onnx.save(proto, path)
    return _logits(path, {})


def _vectors(tensors: Tensors, ending: str, axis: int) -> Tensors:
    """A vector for each of q, k and v: over the outputs (axis 0), or the inputs (axis 1)."""
    rng = np.random.default_rng(3)
    found = {}
    for key in tensors:
        module, _, part = key.partition(".lora_")
        if part == "B.weight" and module.endswith(("q_proj", "k_proj", "v_proj")):
            size = tensors[key].shape[0] if axis == 0 else 64
            found[f"{module}.{ending}"] = rng.uniform(0.5, 1.5, size).astype(np.float32)
    return found


def test_dora_rescales_each_packed_projection_by_its_own_magnitudes(tmp_path: Path) -> None:
    tensors: Tensors = {}

    def add(given: Tensors) -> Tensors:
        kept = {k: v for k, v in given.items() if k.split(".")[-3] in ("q_proj", "v_proj")}
        sizes = _vectors(given, "lora_magnitude_vector", 0)
        tensors.update(kept)
        tensors.update({k: v for k, v in sizes.items() if "k_proj" not in k})
        return tensors

    def dora(module: str, weight: np.ndarray) -> np.ndarray:
        if "k_proj" in module:
            return weight
        a, b = (tensors[f"{module}.lora_{part}.weight"] for part in "AB")
        whole = weight + 2 * b @ a
        size = tensors[f"{module}.lora_magnitude_vector"]
        return whole * (size / np.linalg.norm(whole, axis=1))[:, None]

    found = _inserted(_trained(tmp_path / "t", add, use_dora=True), tmp_path)
    np.testing.assert_allclose(found, _merged(dora, tmp_path / "m.onnx"), rtol=0, atol=1e-4)


def test_ia3_scales_the_columns_of_its_own_packed_projection(tmp_path: Path) -> None:
    tensors: Tensors = {}

    def replace(given: Tensors) -> Tensors:
        vectors = _vectors(given, "ia3_l", 0)
        tensors.update({k: v[:, None] for k, v in vectors.items() if "q_proj" not in k})
        return tensors

    def scaled(module: str, weight: np.ndarray) -> np.ndarray:
        return weight * tensors.get(f"{module}.ia3_l", np.ones((1, 1), np.float32))

    found = _inserted(_trained(tmp_path / "t", replace, peft_type="IA3"), tmp_path)
    np.testing.assert_allclose(found, _merged(scaled, tmp_path / "m.onnx"), rtol=0, atol=1e-4)


def test_ia3_on_the_input_of_one_packed_projection_is_refused(tmp_path: Path) -> None:
    def replace(given: Tensors) -> Tensors:
        vectors = _vectors(given, "ia3_l", 1)
        return {k: v[None] for k, v in vectors.items() if "k_proj" in k}

    folder = _trained(tmp_path / "t", replace, peft_type="IA3", feedforward_modules=["k_proj"])
    with pytest.raises(CheckpointError, match="computes it together with other modules"):
        oa.load_checkpoint(folder, oa.open_model(BASE))


def test_dora_on_int4_takes_the_norm_of_the_dequantised_weight(tmp_path: Path) -> None:
    def add(given: Tensors) -> Tensors:
        packed = {k: v for k, v in given.items() if k.split(".")[-3][0] in "qkv"}
        return {**packed, **_vectors(given, "lora_magnitude_vector", 0)}

    folder = _trained(tmp_path / "t", add, use_dora=True)
    base = oa.open_model(FOLDER / "tinyllama_int4" / "model.onnx")
    found = oa.load_checkpoint(folder, base).adapter.weights
    whole = oa.load_checkpoint(folder, oa.open_model(BASE)).adapter.weights
    for slot, parts in whole.items():
        if "scale" in parts:
            np.testing.assert_allclose(found[slot]["scale"], parts["scale"], rtol=0.05)


def test_a_trained_weight_of_a_packed_projection_is_a_slot_on_its_columns(
    tmp_path: Path,
) -> None:
    value = np.random.default_rng(5).standard_normal((64, 64)).astype(np.float32) / 8
    key = f"{PREFIX}.0.self_attn.q_proj"
    folder = _trained(tmp_path / "t", lambda given: {f"{key}.weight": value})

    def replaced(module: str, weight: np.ndarray) -> np.ndarray:
        return value if module == key else weight

    found = _inserted(folder, tmp_path)
    expected = _merged(replaced, tmp_path / "m.onnx")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_trained_norm_that_the_builder_may_have_changed_is_refused(tmp_path: Path) -> None:
    trained = {f"{PREFIX}.0.input_layernorm.weight": np.ones(64, np.float32)}
    folder = _trained(tmp_path / "t", lambda given: trained)
    with pytest.raises(CheckpointError, match="may have added 1 to its weight"):
        oa.load_checkpoint(folder, oa.open_model(BASE))


def test_the_builder_is_known_by_its_nodes_and_not_by_its_name(tmp_path: Path) -> None:
    proto = onnx.load(BASE)
    proto.producer_name = "onnx.quantize"
    onnx.save(proto, tmp_path / "renamed.onnx")
    base = oa.open_model(tmp_path / "renamed.onnx")
    checkpoint = oa.load_checkpoint(FOLDER / "lora", base)
    oa.save_model(oa.insert_checkpoint(base, checkpoint), tmp_path / "again.onnx")
    found = _logits(tmp_path / "again.onnx", checkpoint.adapter.feeds())
    expected = _inserted(FOLDER / "lora", tmp_path)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_second_adapter_goes_onto_the_packed_projections_too(tmp_path: Path) -> None:
    once = oa.open_model(BASE)
    first = oa.load_checkpoint(FOLDER / "lora", once, name="first")
    twice = oa.insert_checkpoint(once, first)
    second = oa.load_checkpoint(FOLDER / "lora", twice, name="second")
    path = tmp_path / "twice.onnx"
    oa.save_model(oa.insert_checkpoint(twice, second), path)
    alone = _inserted(FOLDER / "lora", tmp_path)
    for checkpoint in (first, second):
        found = _logits(path, checkpoint.adapter.feeds())
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-4)
