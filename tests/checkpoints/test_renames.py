"""Adapters with the module names of other releases than the graph's.

The names on both sides are those of transformers' own `conversion_mapping.py`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from adapter_models import peft_folder
from trained_cases import ROOT

import onnx_adapt as oa
from onnx_adapt.checkpoints.modules.names import map_modules
from onnx_adapt.checkpoints.modules.renames import NAMINGS

LAYER = "layers.0.self_attn.q_proj"
RENAMED: dict[str, Mapping[str, str]] = {
    "llava, gemma3, paligemma, internvl, mistral3, aya": {
        f"language_model.model.{LAYER}": f"model.language_model.{LAYER}",
        "language_model.lm_head": "lm_head",
        f"vision_tower.vision_model.encoder.{LAYER}": f"model.vision_tower.encoder.{LAYER}",
        "multi_modal_projector.linear_1": "model.multi_modal_projector.linear_1",
    },
    "llava between 4.52 and 5": {
        f"model.language_model.{LAYER}": f"model.language_model.{LAYER}",
        f"model.vision_tower.vision_model.encoder.{LAYER}": (
            f"model.vision_tower.encoder.{LAYER}"
        ),
    },
    "mllama": {
        f"language_model.model.{LAYER}": f"model.language_model.{LAYER}",
        f"vision_model.transformer.{LAYER}": f"model.vision_model.transformer.{LAYER}",
        "multi_modal_projector": "model.multi_modal_projector",
    },
    "qwen2-vl, qwen2.5-vl": {
        f"model.{LAYER}": f"model.language_model.{LAYER}",
        "visual.blocks.0.attn.qkv": "model.visual.blocks.0.attn.qkv",
        "lm_head": "lm_head",
    },
    "qwen omni": {
        f"model.{LAYER}": f"model.language_model.{LAYER}",
        f"audio_tower.{LAYER}": f"model.audio_tower.{LAYER}",
        "visual.blocks.0.attn.qkv": "model.visual.blocks.0.attn.qkv",
    },
    "emu3": {
        f"text_model.model.{LAYER}": f"model.text_model.{LAYER}",
        "text_model.lm_head": "lm_head",
    },
    "qwen2-audio, voxtral": {
        f"language_model.model.{LAYER}": f"model.language_model.{LAYER}",
        f"audio_tower.{LAYER}": f"model.audio_tower.{LAYER}",
    },
    "vit": {
        "vit.encoder.layer.3.attention.attention.query": "vit.layers.3.attention.q_proj",
        "vit.encoder.layer.3.output.dense": "vit.layers.3.mlp.fc2",
        "vit.encoder.layer.3.layernorm_before": "vit.layers.3.layernorm_before",
    },
    "dinov2": {
        f"dinov2.encoder.layer.3.{old}": f"dinov2.encoder.layer.3.{new}"
        for old, new in (
            ("attention.attention.query", "attention.q_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("mlp.fc1", "mlp.fc1"),
        )
    },
    "segformer": {
        "segformer.encoder.block.1.0.attention.self.query": (
            "segformer.stages.1.blocks.0.attention.q_proj"
        ),
        "segformer.encoder.block.1.0.mlp.dense1": "segformer.stages.1.blocks.0.mlp.fc1",
    },
    "gpt-neox": {
        "gpt_neox.layers.0.attention.dense": "gpt_neox.layers.0.attention.dense",
        "embed_out": "lm_head",
    },
}


@pytest.mark.parametrize("wrapper", ["", "model.", "a.b."])
@pytest.mark.parametrize("newer", [True, False], ids=["graph is newer", "graph is older"])
@pytest.mark.parametrize("name", RENAMED)
def test_modules_are_found_under_the_names_of_the_other_release(
    name: str, newer: bool, wrapper: str
) -> None:
    pairs = RENAMED[name].items()
    there = {old if not newer else new: new if newer else old for old, new in pairs}
    wanted = {(old if newer else new): wrapper + (new if newer else old) for old, new in pairs}
    more = [wrapper + re.sub("0|3", "1", path, count=1) for path in there]
    found = map_modules(list(wanted), [*wanted.values(), *more])
    assert found == wanted


def test_a_renamed_module_is_not_renamed_again() -> None:
    for old, new in (pair for pairs in RENAMED.values() for pair in pairs.items()):
        for naming in NAMINGS:
            for path in (naming.renamed(old), naming.renamed(new)):
                assert naming.renamed(path) == path


LLAVA = ROOT / "handed" / "bases" / "llava" / "base.onnx"
PARTS = {
    "model.language_model.layers.0.self_attn.q_proj": (32, 32),
    "model.language_model.layers.1.self_attn.v_proj": (32, 16),
    "model.vision_tower.encoder.layers.0.self_attn.q_proj": (32, 32),
    "model.vision_tower.encoder.layers.1.mlp.fc1": (32, 64),
    "model.multi_modal_projector.linear_1": (32, 32),
    "lm_head": (32, 97),
}


def _llava(folder: Path, names: Mapping[str, str]) -> oa.Checkpoint:
    """LoRA on modules of LLaVA, by these names instead of its own, placed in its graph."""
    rng = np.random.default_rng(0)
    tensors = {}
    for module, (reads, makes) in PARTS.items():
        a, b = rng.standard_normal((2, reads)), rng.standard_normal((makes, 2))
        if module in names:
            key = f"base_model.model.{names[module]}"
            tensors[f"{key}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = b.astype(np.float32)
    return oa.load_checkpoint(peft_folder(folder, tensors), oa.open_model(LLAVA))


@pytest.mark.parametrize(
    "part", ["", "language_model", "vision_tower", "projector", "lm_head"]
)
def test_old_names_give_the_slots_and_weights_of_new_ones(part: str, tmp_path: Path) -> None:
    old = {
        "model.language_model": "language_model.model",
        "model.vision_tower": "vision_tower.vision_model",
        "model.multi_modal": "multi_modal",
        "lm_head": "language_model.lm_head",
    }
    names = {
        module: next(
            old[new] + module.removeprefix(new) for new in old if module.startswith(new)
        )
        for module in PARTS
        if part in module
    }
    now = _llava(tmp_path / "now", {module: module for module in names})
    before = _llava(tmp_path / "before", names)
    assert [slot.tensor for slot in now.slots] == [slot.tensor for slot in before.slots]
    assert len(now.slots) == len(names)
    for name, weights in now.adapter.weights.items():
        for key, value in weights.items():
            np.testing.assert_array_equal(before.adapter.weights[name][key], value)
