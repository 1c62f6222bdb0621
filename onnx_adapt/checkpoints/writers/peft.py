"""Write adapters as PEFT loads them: LoRA, DoRA and IA3, with trained weights of the base.

The scale of LoRA is in B, so alpha is the rank: for example a slot of rank 4 with
`lora_alpha=4` and B as it is in the slot, transposed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank, Replacement, Scaling, SlotEdit
from onnx_adapt.checkpoints.writers.wanted import (
    Files,
    Wanted,
    called,
    config_file,
    refuse,
    tensor_file,
)
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_PREFIX = "base_model.model."
_FILE = "adapter_model.safetensors"
_COMMON = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "revision": None,
    "task_type": None,
}


def write(wanted: Wanted) -> Files:
    """Write an adapter as the folder that PEFT loads.

    Raises:
        CheckpointError: If PEFT has no method for one of its slots.
    """
    low_rank: dict[str, tuple[SlotEdit, LowRank]] = {}
    scalings: dict[str, tuple[SlotEdit, Scaling]] = {}
    replaced: dict[str, dict[str, Array]] = {}
    for item in wanted.items:
        match item.edit:
            case LowRank() as edit:
                _refuse_odd(item, edit)
                low_rank[edit.module] = item, edit
            case Scaling() as scaling:
                scalings[scaling.module] = item, scaling
            case Replacement() as trained:
                replaced.setdefault(trained.module, {})[trained.parameter] = trained.value
            case _:
                reason = "PEFT has no method that computes it"
                raise refuse(item, reason, "--to adapterhub writes it")
    if low_rank and scalings:
        raise _mixed(*(next(iter(kind.values()))[0] for kind in (low_rank, scalings)))
    if not low_rank and not scalings:
        raise CheckpointError(
            "the adapter has only trained weights of the base, and PEFT has no method without "
            "adapters of its own"
        )
    tensors, settings = _ia3(scalings) if scalings else _lora(low_rank)
    trained_tensors, trained_settings = _replaced(replaced, [*low_rank, *scalings], settings)
    if wanted.invocation_tokens:
        settings |= {
            "alora_invocation_tokens": list(wanted.invocation_tokens),
            "task_type": "CAUSAL_LM",
        }
    config = {**_COMMON, **settings, **trained_settings}
    return {
        "adapter_config.json": config_file(config),
        _FILE: tensor_file(tensors | trained_tensors, _FILE),
    }


def _refuse_odd(item: SlotEdit, edit: LowRank) -> None:
    if edit.gate is not None:
        raise refuse(item, "it has a gate, which PEFT does not", "--to adapterhub writes it")
    if edit.scales_bias:
        raise refuse(
            item,
            "its scale covers the bias of the layer, and that of PEFT's DoRA does not",
            "--to adapterhub writes it",
        )


def _mixed(one: SlotEdit, other: SlotEdit) -> CheckpointError:
    return CheckpointError(
        f"slot {one.slot!r} is {called(one.edit)} and slot {other.slot!r} is "
        f"{called(other.edit)}; an adapter of PEFT has one method"
    )


def _lora(
    found: Mapping[str, tuple[SlotEdit, LowRank]],
) -> tuple[dict[str, Array], dict[str, Any]]:
    ranks = {module: len(edit.a) for module, (_, edit) in found.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    others = {module: own for module, own in ranks.items() if own != rank}
    dora = [edit.magnitude is not None for _, edit in found.values()]
    if any(dora) and not all(dora):
        items = [item for item, _ in found.values()]
        one, other = items[dora.index(True)], items[dora.index(False)]
        raise CheckpointError(
            f"slot {one.slot!r} is DoRA and slot {other.slot!r} is not; an adapter of PEFT is "
            "DoRA in all its modules"
        )
    biased = any(edit.bias is not None for _, edit in found.values())
    tensors: dict[str, Array] = {}
    for item, edit in found.values():
        tensors |= _lora_tensors(item, edit, biased=biased)
    return tensors, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(found),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": biased,
        "use_dora": all(dora),
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _lora_tensors(item: SlotEdit, edit: LowRank, *, biased: bool) -> dict[str, Array]:
    """The tensors of one module, with a bias of zeros if others have one."""
    key = f"{_PREFIX}{edit.module}.lora_"
    embeds = item.layer == "embedding"
    if embeds and biased:
        raise refuse(item, "PEFT has no lora_bias on an embedding")
    names = ("embedding_A", "embedding_B") if embeds else ("A.weight", "B.weight")
    tensors = {f"{key}{names[0]}": edit.a, f"{key}{names[1]}": edit.b}
    if biased:
        tensors[f"{key}B.bias"] = np.zeros(len(edit.b)) if edit.bias is None else edit.bias
    if edit.magnitude is not None:
        convolves = item.layer == "conv"
        shape = (1, -1, *(1,) * (edit.a.ndim - 2)) if convolves else (-1,)
        tensors[f"{key}magnitude_vector"] = edit.magnitude.reshape(shape)
    return tensors


def _ia3(
    found: Mapping[str, tuple[SlotEdit, Scaling]],
) -> tuple[dict[str, Array], dict[str, Any]]:
    tensors = {}
    for module, (item, edit) in found.items():
        if item.layer == "embedding":
            raise refuse(item, "PEFT has no IA3 on an embedding")
        shape: tuple[int, ...] = (1, -1) if edit.on_input else (-1, 1)
        shape = (1, -1, 1, 1) if item.layer == "conv" else shape
        tensors[f"{_PREFIX}{module}.ia3_l"] = edit.vector.reshape(shape)
    return tensors, {
        "peft_type": "IA3",
        "target_modules": sorted(found),
        "feedforward_modules": sorted(m for m, (_, edit) in found.items() if edit.on_input),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }


def _replaced(
    replaced: Mapping[str, Mapping[str, Array]],
    adapted: Sequence[str],
    settings: Mapping[str, Any],
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The keys of trained weights of the base: whole modules, and biases by themselves.

    PEFT wraps a module in `modules_to_save` and wants all its parameters. A bias alone, and
    the weight of an adapted module, is loaded where it is: in `base_layer` of the latter.
    """
    tensors: dict[str, Array] = {}
    whole: list[str] = []
    alone: list[str] = []
    for module, parameters in replaced.items():
        if set(parameters) == {"bias"}:
            alone.append(module)
        elif module not in adapted:
            whole.append(module)
        inside = ".base_layer" if module in adapted else ""
        tensors |= {f"{_PREFIX}{module}{inside}.{p}": v for p, v in parameters.items()}
    if alone and settings["peft_type"] != "LORA":
        raise CheckpointError(
            f"module {alone[0]!r} has a trained bias, and PEFT's IA3 has none"
        )
    only = "lora_only" if set(alone) <= set(adapted) else "all"
    return tensors, {
        "modules_to_save": whole or None,
        **({"bias": only} if alone else {}),
    }
