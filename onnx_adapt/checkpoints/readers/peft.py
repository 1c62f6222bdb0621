"""Read checkpoints of PEFT: LoRA, DoRA and IA3 (Hugging Face peft 0.21 and older)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, LowRank, Replacement, Scaling
from onnx_adapt.checkpoints.readers.folder import Folder, name_damage, number
from onnx_adapt.checkpoints.readers.peft_parameters import parameter_edit, split_parameters
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Method:
    """How the tensors of one `peft_type` are read.

    Attributes:
        parts: What the tensors of a module are called in the keys.
        edits: What the tensors of one module ask for, with the checkpoint's configuration.
    """

    parts: tuple[str, ...]
    edits: Callable[[str, dict[str, Array], Mapping[str, Any]], Iterator[Edit]]


_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED_METHODS = {
    "ADALORA": "AdaLoRA has three factors, and prunes them by module",
    "BOFT": "BOFT rotates the weight instead of adding to it",
    "LOHA": "LoHa multiplies two low-rank matrices element by element",
    "LOKR": "LoKr's update is a Kronecker product, whose rank is not low",
    "MULTITASK_PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "OFT": "OFT rotates the weight instead of adding to it",
    "PREFIX_TUNING": "prefix tuning adds keys and values to the attention",
    "PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "P_TUNING": "prompt tuning adds tokens to the input",
    "VERA": "VeRA scales random matrices that all modules share",
}
"""Methods by `peft_type` that are refused, and why."""

_REFUSED_SETTINGS = {
    "alora_invocation_tokens": "the adapter switches on in the middle of a sequence",
    "layer_replication": "layers of the base are repeated",
    "trainable_token_indices": "single rows of the embedding were trained",
    "use_qalora": "the input is pooled before the adapter",
    "use_bdlora": "the matrices are block-diagonal",
    "arrow_config": "adapters are routed at run time",
    "kasa_config": "the base weights were truncated before training",
    "monteclora_config": "the adapter is sampled",
    "velora_config": "the adapter is of another form",
    "megatron_config": "the model is split over machines",
}


def peft_edits(folder: Folder) -> list[Edit]:
    """Read what a PEFT checkpoint asks for.

    Raises:
        CheckpointError: If the method or one of its settings is not supported.
    """
    config = folder.config
    kind = str(config.get("peft_type"))
    method = METHODS.get(kind)
    if method is None:
        reason = f": {_REFUSED_METHODS[kind]}" if kind in _REFUSED_METHODS else ""
        raise CheckpointError(
            f"peft_type {kind} is not supported{reason}",
            hint="LORA (with DoRA, rsLoRA) and IA3 are",
        )
    _refuse_settings(config)
    modules, replaced = _sort_tensors(folder, kind)
    modules, parameters = split_parameters(modules, config)
    edits: list[Edit] = []
    for module, parts in modules.items():
        with name_damage(folder, module):
            edits += method.edits(module, parts, config)
    for module, named in parameters.items():
        with name_damage(folder, module):
            edits += (_parameter_edit(module, name, parts, config) for name, parts in named)
    return [*edits, *replaced]


def _sort_tensors(
    folder: Folder, kind: str
) -> tuple[dict[str, dict[str, Array]], list[Replacement]]:
    """Sort tensors into those of adapted modules, by part, and replaced weights of the base.

    `base_model.model.encoder.query.lora_B.weight` is part `lora_B` of `encoder.query`, and
    `base_model.model.classifier.weight` replaces the weight of `classifier`.
    """
    known = _key_pattern()
    modules: dict[str, dict[str, Array]] = {}
    replaced: dict[tuple[str, str], Replacement] = {}
    for key, value in folder.tensors.items():
        path = key.removeprefix("base_model.model.")
        match = known.match(path)
        if ".original_module." in path:
            continue  # PEFT's own copy of a module in modules_to_save, before training
        if match is None:
            edit = _replacement(path, key, value)
            # Of two copies of a trained module the one under its plain name is in force.
            if path == f"{edit.module}.{edit.parameter}":
                replaced[edit.module, edit.parameter] = edit
            else:
                replaced.setdefault((edit.module, edit.parameter), edit)
            continue
        ending = ".bias" if (match["rest"] or "").endswith("bias") else ""
        if match["part"] not in METHODS[kind].parts:
            raise CheckpointError(
                f"the checkpoint has {key!r}, but its configuration's peft_type {kind} is "
                "another method",
                hint="was adapter_config.json copied from another adapter?",
            )
        modules.setdefault(match["module"], {})[match["part"] + ending] = value
    return modules, list(replaced.values())


def _key_pattern() -> re.Pattern[str]:
    """The pattern of the keys of every method: module, part, and what PEFT appends."""
    parts = "|".join(re.escape(part) for method in METHODS.values() for part in method.parts)
    rest = r"(?:\.(?P<rest>weight|bias|[^.]+\.weight|[^.]+\.bias))?"
    return re.compile(rf"^(?P<module>.+)\.(?P<part>{parts}){rest}$")


def _refuse_settings(config: Mapping[str, Any]) -> None:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"init_lora_weights={start!r}: training changed the base model's own weights",
            hint="convert the adapter with PEFT's path_initial_model_for_weight_conversion",
        )
    for name, reason in _REFUSED_SETTINGS.items():
        if config.get(name):
            raise CheckpointError(
                f"{name}={config[name]!r} is not supported: {reason}",
                hint="merge the adapter in PyTorch and export again",
            )


def _replacement(path: str, key: str, value: Array) -> Replacement:
    module, _, parameter = path.rpartition(".")
    if parameter not in ("weight", "bias") or not module:
        raise CheckpointError(f"the checkpoint has {key!r}, which is of no known kind")
    module = re.sub(r"\.(base_layer|modules_to_save(\.[^.]+)?)$", "", module)
    return Replacement(module, parameter, value)


_SETTINGS = {"use_dora": "a lora_magnitude_vector", "lora_bias": "a lora_B.bias"}


def _lora(module: str, parts: dict[str, Array], config: Mapping[str, Any]) -> Iterator[Edit]:
    names = ("lora_A", "lora_B")
    if "lora_embedding_A" in parts:
        names = ("lora_embedding_A", "lora_embedding_B")
    if any(name not in parts for name in names):
        raise CheckpointError(f"module {module!r} has {', '.join(parts)}, not {names}")
    a, b = (parts[name] for name in names)
    magnitude = parts.get("lora_magnitude_vector")
    bias = parts.get("lora_B.bias")
    for setting, part in (("use_dora", magnitude), ("lora_bias", bias)):
        if config.get(setting) and (part is None or part.size != b.shape[0]):
            shown = "none" if part is None else list(part.shape)
            raise CheckpointError(
                f"module {module!r}: {setting} is set, which needs {_SETTINGS[setting]} of "
                f"{b.shape[0]} numbers; the checkpoint has {shown}"
            )
    scale = _scale(module, a.shape[0], config)
    yield LowRank(
        module,
        a.astype(np.float64),
        b.astype(np.float64),
        scale,
        bias=bias,
        magnitude=None if magnitude is None else magnitude.reshape(-1),
        norm_scale=scale,
    )


def _parameter_edit(
    module: str, name: str, parts: dict[str, Array], config: Mapping[str, Any]
) -> Edit:
    path = f"{module}.{name}"
    rank = int(number(_by_pattern(path, config, "rank_pattern", config.get("r", 8)), "r"))
    scale = _scale(path, rank, config)
    version = str(config.get("peft_version") or "")
    return parameter_edit(module, name, parts, rank, scale, version)


def _by_pattern(path: str, config: Mapping[str, Any], setting: str, default: Any) -> Any:
    """Return the value of the first pattern of a setting that a path matches."""
    patterns = config.get(setting) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{setting} {patterns!r} is no setting")
    for pattern, value in patterns.items():
        if _is_match(rf"(.*\.)?({pattern})", pattern, path, setting):
            return value
    return default


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """Compute alpha / r, or alpha / sqrt(r) with rsLoRA; alpha may differ by module."""
    alpha = _by_pattern(module, config, "alpha_pattern", config.get("lora_alpha", 8))
    rooted = config.get("use_rslora", False)
    if not isinstance(rooted, bool | None):
        raise CheckpointError(f"use_rslora {rooted!r} is no setting")
    if not config.get("rank_pattern") and config.get("r", rank) != rank:
        raise CheckpointError(
            f"module {module!r} has rank {rank}; the configuration says r={config['r']}"
        )
    return number(alpha, "lora_alpha") / (math.sqrt(rank) if rooted else rank)


def _is_match(whole: str, pattern: str, module: str, setting: str) -> bool:
    """Whether a module matches a pattern of a setting.

    Raises:
        CheckpointError: If it is no valid pattern, or matching could take for ever.
    """
    refuse_slow(pattern, module, setting)
    try:
        return re.fullmatch(whole, module) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{setting} {pattern!r} is no pattern: {error}") from error


_REPEATS = re.compile(r"(?<!\\)(?:[*+]|\{\d*,)")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{)")
_OPTIONAL = re.compile(r"(?<![\\(*+?}])\?")
_MOST_WAYS = 10**11


def refuse_slow(pattern: str, module: str, setting: str = "alpha_pattern") -> None:
    """Refuse a pattern that Python's matcher could take for ever on.

    PEFT's own are names with a number or a wildcard in them.

    Raises:
        CheckpointError: If it repeats what repeats, or too much.
    """
    repeats = len(_REPEATS.findall(pattern))
    optional, bars = len(_OPTIONAL.findall(pattern)), pattern.count("|")
    nested = (repeats or optional or bars) and _REPEATED_GROUP.search(pattern)
    long = len(module) > 500 or len(pattern) > 500
    # Every group of alternatives multiplies the ways to try; at most as if all were alike.
    groups = pattern.count("(") + 1
    if not long:
        ways = (bars / groups + 1) ** groups * 2.0**optional * len(module) ** min(repeats, 4)
    if nested or repeats > 4 or long or ways > _MOST_WAYS:
        raise CheckpointError(
            f"{setting} {pattern[:80]!r} is too involved for module {module[:80]!r}",
            hint="write out the names of the modules in it",
        )


def _ia3(module: str, parts: dict[str, Array], config: Mapping[str, Any]) -> Iterator[Edit]:
    vector = parts["ia3_l"]
    if vector.ndim < 2 or vector.size != max(vector.shape):
        raise CheckpointError(
            f"module {module!r}: ia3_l has shape {list(vector.shape)}, which is neither "
            "(1, in) nor (out, 1)"
        )
    on_input = vector.shape[0] == 1  # (1, in) scales the input, (out, 1) the output
    if vector.size == 1 or vector.ndim > 2:  # of convolutions both are (1, n, 1, ...)
        on_input = _is_feedforward(module, config.get("feedforward_modules") or [])
    yield Scaling(module, vector.reshape(-1), on_input)


def _is_feedforward(module: str, named: Any) -> bool:
    """Whether PEFT scales a module's input: by the end of its name, or by a pattern."""
    if isinstance(named, str):
        return _is_match(named, named, module, "feedforward_modules")
    return any(module.endswith(name) for name in named)


METHODS: dict[str, Method] = {
    "LORA": Method(
        parts=(
            *("lora_embedding_A", "lora_embedding_B", "lora_A", "lora_B"),
            "lora_magnitude_vector",  # DoRA's
        ),
        edits=_lora,
    ),
    "IA3": Method(parts=("ia3_l",), edits=_ia3),
}
"""Methods by `peft_type`."""
