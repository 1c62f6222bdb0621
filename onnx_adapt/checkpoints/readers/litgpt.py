"""Read LoRA that LitGPT trained: `lit_model.pth.lora` and the settings beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.by_keys import file_by_keys, tensors_by_keys
from onnx_adapt.checkpoints.readers.factors import (
    low_rank,
    low_rank_groups,
    refuse_others,
    sort_by_module,
)
from onnx_adapt.checkpoints.readers.files import Files
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage, number
from onnx_adapt.checkpoints.readers.yaml_files import read_yaml
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_SETTINGS, _MODEL = "hyperparameters.yaml", "model_config.yaml"
_ENDINGS = {".lora_A": "lora_A", ".lora_B": "lora_B"}
_LAYER = re.compile(r"^transformer\.h\.(?P<layer>\d+)\.(?P<module>.+)$")
_OWN_KEY = re.compile(
    r"^transformer\.h\.\d+\."
    r"(attn\.(qkv|attn|proj)|mlp\.(fc(_\d)?|proj|gate|experts\..+))\.lora_A$"
)
_MODULES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
"""LitGPT's modules in a layer and Hugging Face's (convert_lit_checkpoint.py)."""

_LIKE_LLAMA = ("LLaMAMLP", "GemmaMLP")
"""Values of `mlp_class_name` of the models that have these names in Hugging Face's form."""

_PROJECTIONS = {"lora_query": "q_proj", "lora_key": "k_proj", "lora_value": "v_proj"}


def _fits(keys: Collection[str]) -> bool:
    return any(_OWN_KEY.match(key) for key in keys)


def is_litgpt(files: Files) -> bool:
    """Whether files are LitGPT's."""
    return file_by_keys(files, _fits) != ""


def read_litgpt(files: Files) -> Saved:
    """Read the folder that `litgpt finetune_lora` wrote.

    Raises:
        CheckpointError: If one of its files is missing or damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in (_MODEL, _SETTINGS):
        if name not in files.names:
            raise CheckpointError(
                f"{files.path} has no {name}: LitGPT's weights alone do not say rank, scale "
                "and heads",
                hint=f"give the folder that litgpt finetune_lora wrote, with {_SETTINGS} and "
                f"{_MODEL}",
            )
        path = files.at(name)
        found[name] = read_yaml(path.read_bytes(), str(path), "litgpt")
    settings = {k: v for k, v in found[_SETTINGS].items() if str(k).startswith("lora_")}
    model = {k: v for k, v in found[_MODEL].items() if not str(k).startswith("lora_")}
    return Saved(files.path, "litgpt", {**model, **settings}, tensors_by_keys(files, _fits))


def litgpt_edits(saved: Saved) -> list[Edit]:
    """Read what LoRA of LitGPT asks for.

    Raises:
        CheckpointError: If the model or a module is of another kind than supported.
    """
    kind = saved.config.get("mlp_class_name")
    if kind not in _LIKE_LLAMA:
        raise CheckpointError(
            f"LitGPT's {saved.config.get('name')}, with mlp_class_name {kind}, is not "
            "supported",
            hint=f"models with {' or '.join(_LIKE_LLAMA)} are; else merge with litgpt "
            "merge_lora, convert and export",
        )
    modules, others = sort_by_module(saved.tensors, _ENDINGS)
    refuse_others(others, "lora_A and lora_B of a module")
    rank = number(saved.config["lora_r"], "lora_r")
    scale = number(saved.config["lora_alpha"], "lora_alpha") / rank
    edits: list[Edit] = []
    for module, parts in modules.items():
        with name_damage(saved, module):
            if len(parts["lora_A"]) % rank:
                raise CheckpointError(
                    f"{module!r}: lora_A is {list(parts['lora_A'].shape)}, but lora_r is "
                    f"{rank:g}"
                )
            edits += _edits(module, parts, saved.config, scale)
    return edits


def _edits(
    module: str, parts: Mapping[str, Array], config: Mapping[str, Any], scale: float
) -> Iterator[Edit]:
    a, b = parts["lora_A"], parts["lora_B"]
    match = _LAYER.match(module)
    if module == "lm_head":
        yield low_rank(module, a, b, scale)
    elif match and match["module"] in _MODULES:
        path = f"model.layers.{match['layer']}.{_MODULES[match['module']]}"
        yield low_rank(path, a, b, scale)
    elif match and match["module"] == "attn.qkv":
        sizes = _projections(config)
        layer = f"model.layers.{match['layer']}.self_attn"
        named = {f"{layer}.{name}": rows for name, rows in sizes.items()}
        yield from low_rank_groups(module, a, b, scale, named)
    else:
        raise CheckpointError(
            f"LitGPT's module {module!r} is not supported",
            hint="attn.attn is of LitGPT before 0.5.4, which kept q, k and v in another order"
            if module.endswith("attn.attn")
            else "attn.qkv, attn.proj, mlp.fc_1, mlp.fc_2, mlp.proj and lm_head are",
        )


def _projections(config: Mapping[str, Any]) -> dict[str, int]:
    """The rows of B of each of query, key and value that was trained."""
    size, heads = int(config["head_size"]), int(config["n_head"])
    rows = {name: size * int(config["n_query_groups"]) for name in ("k_proj", "v_proj")}
    rows["q_proj"] = size * heads
    return {name: rows[name] for key, name in _PROJECTIONS.items() if config.get(key)}
