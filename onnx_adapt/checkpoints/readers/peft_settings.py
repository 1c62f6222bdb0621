"""Read the settings of a PEFT configuration: scales, and patterns of module names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from onnx_adapt.checkpoints.readers.saved import number, refuse_rank_zero
from onnx_adapt.errors import CheckpointError


def by_pattern(path: str, config: Mapping[str, Any], setting: str, default: Any) -> Any:
    """Return the value of the first pattern of a setting that a path matches."""
    patterns = config.get(setting) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{setting} {patterns!r} is no setting")
    for pattern, value in patterns.items():
        if is_match(rf"(.*\.)?({pattern})", pattern, path, setting):
            return value
    return default


def scale_of(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """Compute alpha / r, or alpha / sqrt(r) with rsLoRA; alpha may differ by module."""
    alpha = alpha_of(module, config, "lora_alpha")
    rooted = config.get("use_rslora", False)
    if not isinstance(rooted, bool | None):
        raise CheckpointError(f"use_rslora {rooted!r} is no setting")
    check_rank(module, rank, config)
    return alpha / (math.sqrt(rank) if rooted else rank)


def alpha_of(module: str, config: Mapping[str, Any], setting: str) -> float:
    """Alpha of a module: that of the first `alpha_pattern` that fits, or a setting."""
    alpha = by_pattern(module, config, "alpha_pattern", config.get(setting, 8))
    return number(alpha, setting)


def check_rank(module: str, rank: int, config: Mapping[str, Any]) -> None:
    """Refuse a rank of 0, or another than the configuration's, if it has one for all modules.

    Raises:
        CheckpointError: If it is.
    """
    refuse_rank_zero(module, rank)
    if not config.get("rank_pattern") and config.get("r", rank) != rank:
        raise CheckpointError(
            f"module {module!r} has rank {rank}; the configuration says r={config['r']}"
        )


def is_match(whole: str, pattern: str, module: str, setting: str) -> bool:
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
