"""Read LoRA that PEFT put on parameters instead of modules (`target_parameters`).

PEFT wraps a module once for each of its parameters, from the first that the module registered
outwards, and does not write their names into the file. An example: for
`target_parameters=["experts.gate_up_proj", "experts.down_proj"]` it has

    experts.base_layer.lora_A   (experts * r, in)     gate_up_proj, which was registered first
    experts.base_layer.lora_B   (out, experts * r)
    experts.lora_A, experts.lora_B                    down_proj

The rows of A are those of the experts one after the other; the columns of B go through the
experts in each rank: column `k * experts + e` is column `k` of expert `e`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, LowRank, ParameterLowRank
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

Parts = dict[str, Array]
"""Tensors by what PEFT calls them: `lora_A`, `lora_B`."""

_REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w2", "w3")
"""Names of stacked parameters in the order in which modules register them."""

_RECURRENT = re.compile(r"weight_(?P<which>ih|hh)_l(?P<layer>\d+)(?P<reverse>_reverse)?")

_SWAPPED = (0, 19)
"""The first version of PEFT whose `in` is the axis that transformers' experts sum over."""

_TRANSFORMERS = ("gate_up_proj", "down_proj")
"""Parameters of the experts of transformers, which tell PEFT how they are stored."""


def split_parameters(
    modules: Mapping[str, Parts], config: Mapping[str, Any]
) -> tuple[dict[str, Parts], dict[str, list[tuple[str, Parts]]]]:
    """Tell the tensors of modules from those of parameters.

    Args:
        modules: The tensors by the path before `lora_A`, and by part.
        config: The checkpoint's configuration.

    Returns:
        The tensors of modules, and for each module the parameters with theirs.

    Raises:
        CheckpointError: If the file does not tell which parameters its tensors are for.
    """
    targets = [str(target) for target in config.get("target_parameters") or ()]
    plain: dict[str, Parts] = {}
    nested: dict[str, list[tuple[int, Parts]]] = {}
    for path, parts in modules.items():
        base = re.sub(r"(\.base_layer)+$", "", path)
        names = _parameters_of(base, targets)
        if not names or (path == base and _is_targeted(base, config)):
            plain[path] = parts
        else:
            nested.setdefault(base, []).append((path.count(".base_layer"), parts))
    found = {}
    for base, levels in nested.items():
        names = _in_order(base, _parameters_of(base, targets))
        if len(names) != len(levels):
            raise CheckpointError(
                f"module {base!r} has the LoRA of {len(levels)} parameters; target_parameters "
                f"names {', '.join(names)}",
                hint="was adapter_config.json copied from another adapter?",
            )
        inside_first = sorted(levels, key=lambda level: -level[0])
        found[base] = [
            (name, parts) for name, (_, parts) in zip(names, inside_first, strict=True)
        ]
    return plain, found


def _parameters_of(module: str, targets: Sequence[str]) -> list[str]:
    """The parameters of a module that the configuration names, as PEFT matches them."""
    split = (target.rpartition(".") for target in targets)
    return [
        leaf
        for around, _, leaf in split
        if f".{module}".endswith(f".{around}" if around else "")
    ]


def _is_targeted(module: str, config: Mapping[str, Any]) -> bool:
    """Whether `target_modules` names a module, which then has no wrapped parameters."""
    names = config.get("target_modules") or ()
    if isinstance(names, str):
        return False
    return any(f".{module}".endswith(f".{name}") for name in names)


def _in_order(module: str, names: Sequence[str]) -> list[str]:
    """Parameters in the order in which their module registered them.

    Raises:
        CheckpointError: If that is not known.
    """
    matches = {name: _RECURRENT.fullmatch(name) for name in names}
    if all(matches.values()):
        return sorted(names, key=lambda name: _recurrent_order(matches[name]))
    unknown = [name for name in names if name not in _REGISTERED]
    if len(names) > 1 and unknown:
        raise CheckpointError(
            f"the file does not tell which of the parameters {', '.join(names)} of "
            f"{module!r} its tensors are for",
            hint="train one adapter for each of them, or merge it in PyTorch and export again",
        )
    return sorted(names, key=lambda name: _REGISTERED.index(name) if len(names) > 1 else 0)


def _recurrent_order(match: re.Match[str] | None) -> tuple[int, bool, bool]:
    assert match is not None
    return int(match["layer"]), bool(match["reverse"]), match["which"] == "hh"


def parameter_edit(
    module: str, parameter: str, parts: Parts, rank: int, scale: float, version: str
) -> Edit:
    """Read the LoRA of one parameter.

    Args:
        module: Path of the module.
        parameter: The parameter's name in it.
        parts: Its tensors.
        rank: The rank for each matrix of the parameter.
        scale: alpha / rank or what replaces it.
        version: The version of PEFT that saved it, or ''.

    Raises:
        CheckpointError: If the tensors are not those of LoRA on a parameter.
    """
    path = f"{module}.{parameter}"
    if set(parts) != {"lora_A", "lora_B"}:
        raise CheckpointError(f"parameter {path!r} has {', '.join(parts)}, not lora_A, lora_B")
    a, b = (parts[name].astype(np.float64) for name in ("lora_A", "lora_B"))
    fits = a.ndim == b.ndim == 2 and rank > 0 and a.shape[0] == b.shape[1]
    if not fits or not a.shape[0] or a.shape[0] % rank:
        raise CheckpointError(
            f"parameter {path!r}: A {list(a.shape)} and B {list(b.shape)} are not of rank "
            f"{rank} for each matrix"
        )
    groups = a.shape[0] // rank
    if groups == 1 and parameter == "weight":
        return LowRank(module, a, b, scale)
    known = parameter in _TRANSFORMERS and _numbers(version) >= _SWAPPED
    return ParameterLowRank(
        module,
        parameter,
        a.reshape(groups, rank, -1),
        np.moveaxis(b.reshape(b.shape[0], rank, groups), 2, 0),
        scale,
        sums_over_input=known,
    )


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (0, 21) of `0.21.2`; none if it has no numbers."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else ()
