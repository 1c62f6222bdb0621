"""Read checkpoints of AdapterHub (`adapters` 1.3 and older, and adapter-transformers)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import (
    Bottleneck,
    Coupling,
    Edit,
    LowRank,
    Replacement,
    Scaling,
)
from onnx_adapt.checkpoints.readers.adapterhub_places import bottleneck_place, sub_layer
from onnx_adapt.checkpoints.readers.factors import spread_groups
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage, number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_PREFIX_TUNING = "prefix tuning adds keys and values to the attention"
_REFUSED_ARCHITECTURES = {
    "prefix_tuning": _PREFIX_TUNING,
    "prompt_tuning": "prompt tuning adds tokens to the input",
    "reft": "ReFT edits hidden states at chosen positions",
    "union": "a union of several methods is one adapter only in its library",
}
"""Values of `architecture` that are refused, and why."""

_REFUSED_KINDS = {
    "prefix_tunings": _PREFIX_TUNING,
    "prefix_gates": _PREFIX_TUNING,
    "prompt_tunings": _REFUSED_ARCHITECTURES["prompt_tuning"],
    "refts": _REFUSED_ARCHITECTURES["reft"],
}
"""Kinds of tensors that are refused, and why."""

_SHARED = "shared_parameters"
"""The kind of the tensors that the layers of Compacter have in common."""

_LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    "gelu_pytorch_tanh": "gelu_tanh",
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **{name: name for name in ("relu", "relu2", "relu6", "quick_gelu", "mish", "tanh")},
    **dict.fromkeys(("swish", "silu"), "silu"),
    **dict.fromkeys(("leakyrelu", "leaky_relu"), "leaky_relu"),
    "sigmoid": "sigmoid",
    "linear": "identity",
}
"""AdapterHub's `non_linearity` (transformers' ACT2FN) in our names."""

_EMBEDDINGS = dict.fromkeys(
    ("bert", "roberta", "xlm-roberta", "distilbert", "electra"), "embeddings"
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a method's function may read beside the tensors of one place.

    Attributes:
        saved: The checkpoint.
        config: The method's settings, from `config` in adapter_config.json.
        shared: Tensors that all places have in common.
    """

    saved: Saved
    config: Mapping[str, Any]
    shared: Mapping[str, Array]


def adapterhub_edits(saved: Saved) -> list[Edit]:
    """Read what an AdapterHub checkpoint asks for.

    Raises:
        CheckpointError: If the method or one of its settings is not supported.
    """
    config = dict(saved.config.get("config") or {})
    architecture = config.get("architecture")
    if architecture not in (None, "lora"):
        reason = _REFUSED_ARCHITECTURES.get(str(architecture))
        raise CheckpointError(
            f"architecture {architecture!r} is not supported{f': {reason}' if reason else ''}",
            hint="bottleneck adapters, LoRA, IA3 and DoRA are",
        )
    groups = _group(saved)
    shared = {
        key: value
        for (_, kind), parts in groups.items()
        if kind == _SHARED
        for key, value in parts.items()
    }
    trained = Trained(saved, config, shared)
    edits: list[Edit] = []
    for (location, kind), parts in groups.items():
        with name_damage(saved, location):
            if kind in METHODS:
                edits.append(METHODS[kind](location, parts, trained))
    if not edits:
        raise CheckpointError(f"{saved.path} has no adapter weights")
    return edits + list(_head(saved))


def _group(saved: Saved) -> dict[tuple[str, str], dict[str, Array]]:
    """Sort tensors by where the adapter is and of what kind it is.

    `bert.encoder.layer.0.output.adapters.fr.adapter_up.weight` of the adapter `fr` is
    `adapter_up.weight` at `bert.encoder.layer.0.output`, of the kind `adapters`.
    """
    name = re.escape(str(saved.config.get("name")))
    kinds = "|".join((*METHODS, _SHARED, *_REFUSED_KINDS))
    pattern = re.compile(rf"^(?:(.*?)\.)?({kinds})\.{name}\.(.+)$")
    groups: dict[tuple[str, str], dict[str, Array]] = {}
    for key, value in saved.tensors.items():
        current = ".".join(_LEGACY.get(part, part) for part in key.split("."))
        match = pattern.match(current)
        if match is None:
            raise CheckpointError(f"the checkpoint has {key!r}, which is of no known kind")
        location, kind, rest = match.groups()
        if kind in _REFUSED_KINDS:
            raise CheckpointError(f"{key!r} is not supported: {_REFUSED_KINDS[kind]}")
        groups.setdefault((location or "", kind), {})[rest] = value.astype(np.float64)
    return groups


def _activation(config: Mapping[str, Any], saved: Saved) -> str:
    name = str(config.get("non_linearity", "relu")).lower()
    if "version" not in saved.config:
        name = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(name, name)
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"non_linearity {name!r} is not supported", hint=f"known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _without_phm(
    location: str, parts: dict[str, Array], shared: Mapping[str, Array]
) -> dict[str, Array]:
    """Multiply Compacter's hypercomplex layers out into plain Linears."""
    plain = {key: value for key, value in parts.items() if not _PHM.search(key)}
    for layer in sorted({m[1] for m in map(_PHM.match, parts) if m}):
        rule = parts.get(f"{layer}.phm_rule", shared.get("phm_rule"))
        left, right = (
            parts.get(f"{layer}.{side}", shared.get(side)) for side in ("W_left", "W_right")
        )
        whole = parts.get(f"{layer}.W")
        if whole is None and left is not None and right is not None:
            _refuse_large(layer, left.shape[-2] * right.shape[-1] * len(left))
            whole = left @ right
        if rule is None or whole is None:
            raise CheckpointError(
                f"the hypercomplex layer {layer!r} at {location!r} is incomplete"
            )
        _refuse_large(layer, rule[0].size * whole[0].size)
        matrix = sum(np.kron(rule[i], whole[i]) for i in range(len(rule)))
        plain[f"{layer}.weight"] = np.asarray(matrix).T
        if f"{layer}.b" in parts:
            plain[f"{layer}.bias"] = parts[f"{layer}.b"]
    return plain


def _refuse_large(layer: str, size: int) -> None:
    """Refuse a layer that would be too large, before its factors are multiplied."""
    if size > _LARGEST:
        raise CheckpointError(f"the hypercomplex layer {layer!r} would have {size} numbers")


_LARGEST = 2**27
_PHM = re.compile(r"^(.*)\.(W_left|W_right|W|phm_rule|b)$")


def _bottleneck(location: str, parts: dict[str, Array], trained: Trained) -> Bottleneck:
    config, saved = trained.config, trained.saved
    parts = _without_phm(location, parts, trained.shared)
    module, post_ln = sub_layer(location, saved)
    down = next(k for k, v in parts.items() if k.startswith("adapter_down") and v.ndim == 2)
    weights = {
        "down": parts[down].T,
        "up": parts["adapter_up.weight"].T,
        "down_bias": parts[down.removesuffix("weight") + "bias"],
        "up_bias": parts["adapter_up.bias"],
    }
    scaling = (
        parts["scaling"]
        if "scaling" in parts
        else number(config.get("scaling", 1.0), "scaling")
    )
    weights["up"] = weights["up"] * scaling
    weights["up_bias"] = weights["up_bias"] * scaling
    if config.get("ln_before"):
        weights["norm_weight"] = parts["adapter_norm_before.weight"]
        weights["norm_bias"] = parts["adapter_norm_before.bias"]
    if config.get("use_gating"):
        weights["gate"] = parts["gate.weight"].T
        weights["gate_bias"] = parts["gate.bias"]
    norm_after = ""
    if config.get("ln_after"):
        weights["after_weight"] = parts["adapter_norm_after.weight"]
        weights["after_bias"] = parts["adapter_norm_after.bias"]
        norm_after = "sum" if config.get("adapter_residual_before_ln") else "term"
    place, reads, extra = bottleneck_place(config, norm_after, post_ln=post_ln)
    if "scale" in extra:
        extra["scale"] = np.zeros(weights["up"].shape[1])
    weights.update(extra)
    return Bottleneck(module, place, reads, weights, _activation(config, saved), norm_after)


def _lora(module: str, parts: dict[str, Array], trained: Trained) -> Edit:
    config, saved = trained.config, trained.saved
    if "vera_D" in parts or "vera_B" in parts:
        raise CheckpointError(
            f"{module!r}: VeRA is not supported: VeRA scales random matrices that all "
            "modules share"
        )
    b = parts["lora_B"]
    rank, alpha = int(number(config.get("r", 1), "r")), number(config.get("alpha", 1), "alpha")
    if _before_1_1(saved) and "lora_A" in parts:
        alpha = float(rank)
    if config.get("composition_mode") == "scale":
        if config.get("use_gating"):
            raise CheckpointError(f"{module!r}: IA3 with use_gating is not supported")
        return Scaling(module, _fused_vector(module, b.reshape(-1) * alpha, config), False)
    a = parts["lora_A"]
    if _is_fused(module):
        b = _fused_matrix(b, a.shape[0], config)
    magnitude = parts.get("m.weight")
    if config.get("use_dora") and (magnitude is None or magnitude.shape != (len(b), 1)):
        raise CheckpointError(f"{module!r}: DoRA's magnitude m.weight is not ({len(b)}, 1)")
    gate = (parts["gate.weight"], parts["gate.bias"]) if config.get("use_gating") else None
    return LowRank(
        module,
        a,
        b,
        1.0 if gate else alpha / rank,
        magnitude=None if magnitude is None else magnitude.reshape(-1),
        scales_bias=True,
        gate=gate,
    )


def _before_1_1(saved: Saved) -> bool:
    """Whether the library that trained the adapter ignored alpha."""
    match = re.match(r"adapters\.(\d+)\.(\d+)", str(saved.config.get("version", "")))
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)


def _enabled(config: Mapping[str, Any]) -> list[bool]:
    return [letter in config.get("attn_matrices", ()) for letter in "qkv"]


def _is_fused(module: str) -> bool:
    return module.rpartition(".")[2] in ("c_attn", "query_key_value", "qkv", "Wqkv", "in_proj")


def _fused_vector(module: str, vector: Array, config: Mapping[str, Any]) -> Array:
    """Expand a vector over the enabled thirds of a fused q, k, v to all three."""
    enabled = _enabled(config)
    if not _is_fused(module) or all(enabled):
        return vector
    pieces = iter(np.split(vector, sum(enabled)))
    size = vector.size // sum(enabled)
    return np.concatenate([next(pieces) if on else np.ones(size) for on in enabled])


def _fused_matrix(b: Array, rows: int, config: Mapping[str, Any]) -> Array:
    """Expand the grouped B of a fused q, k, v to one dense matrix `(out, rows)`."""
    enabled = _enabled(config)
    count, rank = sum(enabled), b.shape[1]
    if count * rank != rows:
        raise CheckpointError(f"lora_A has {rows} rows, which is not {count} x {rank}")
    return spread_groups(b, enabled)


def _coupling(location: str, parts: dict[str, Array], trained: Trained) -> Coupling:
    config, saved = trained.config, trained.saved
    kind = str(saved.config.get("model_type"))
    described = f"{saved.config.get('model_class')} {saved.head_config.get('config')}"
    if kind not in _EMBEDDINGS or config.get("inv_adapter") != "nice":
        raise CheckpointError(
            f"an invertible adapter ({config.get('inv_adapter')}) on a {kind} is not supported"
        )
    if re.search(r"MaskedLM|CausalLM|LMHead|masked_lm|causal_lm", described):
        raise CheckpointError(
            "an invertible adapter under a language-model head is not supported: the head "
            "applies its inverse"
        )
    names = {"F.0": "f_down", "F.2": "f_up", "G.0": "g_down", "G.2": "g_up"}
    weights = {part: parts[f"{key}.weight"].T for key, part in names.items()}
    weights |= {f"{part}_bias": parts[f"{key}.bias"] for key, part in names.items()}
    module = f"{location}.{_EMBEDDINGS[kind]}" if location else _EMBEDDINGS[kind]
    return Coupling(module, weights, _activation(config, saved))


def _head(saved: Saved) -> Iterator[Replacement]:
    """Read the prediction head that was saved beside the adapter."""
    for key, value in saved.head.items():
        module, _, parameter = key.rpartition(".")
        if parameter in ("weight", "bias") and module:
            yield Replacement(module, parameter, value)


METHODS: dict[str, Callable[[str, dict[str, Array], Trained], Edit]] = {
    "adapters": _bottleneck,
    "loras": _lora,  # LoRA, DoRA and IA3
    "invertible_adapters": _coupling,
}
"""Methods by the kind of their tensors: what the tensors of one place ask for."""
