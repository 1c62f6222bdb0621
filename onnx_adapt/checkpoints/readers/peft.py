"""Read checkpoints of PEFT (Hugging Face peft 0.21 and older), whatever their method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx_adapt.checkpoints.edits import Edit, Replacement
from onnx_adapt.checkpoints.readers.peft_methods.table import (
    METHODS,
    REFUSED_METHODS,
    Method,
)
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.peft_methods.tokens import settle_tables
from onnx_adapt.checkpoints.readers.peft_methods.virtual_tokens import (
    VIRTUAL_TOKENS,
    virtual_tokens,
)
from onnx_adapt.checkpoints.readers.peft_parameters import parameter_edit, split_parameters
from onnx_adapt.checkpoints.readers.peft_settings import by_pattern, scale_of
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage, number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_CHANGES_BASE = ("pissa_niter", "corda", "loftq", "lora_ga")
_REFUSED_SETTINGS = {
    "layer_replication": "layers of the base are repeated",
    "arrow_config": "adapters are routed at run time",
    "megatron_config": "the model is split over machines",
}


def peft_edits(saved: Saved) -> list[Edit]:
    """Read what a PEFT checkpoint asks for.

    Raises:
        CheckpointError: If the method or one of its settings is not supported.
    """
    config = saved.config
    kind = str(config.get("peft_type"))
    if kind in VIRTUAL_TOKENS:
        return [virtual_tokens(saved)]
    method = METHODS.get(kind)
    if method is None:
        reason = f": {REFUSED_METHODS[kind]}" if kind in REFUSED_METHODS else ""
        raise CheckpointError(
            f"peft_type {kind} is not supported{reason}",
            hint="merge the adapter in PyTorch and export again, if its method can be merged",
        )
    _refuse_settings(config)
    found = _sort_tensors(saved, kind, method)
    modules, parameters = split_parameters(found.modules, config)
    edits: list[Edit] = []
    for module, parts in modules.items():
        with name_damage(saved, module):
            edits += method.edits(ModuleTensors(module, parts, config, found.shared))
    for module, named in parameters.items():
        with name_damage(saved, module):
            edits += (_parameter_edit(module, name, parts, config) for name, parts in named)
    return settle_tables([*edits, *found.replaced.values()])


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The tensors of a checkpoint by what they are for.

    Attributes:
        modules: Those of adapted modules, by module and part.
        shared: Those that all modules share, by name.
        replaced: Trained weights of the base, by module and parameter.
    """

    modules: dict[str, dict[str, Array]] = field(default_factory=dict)
    shared: dict[str, Array] = field(default_factory=dict)
    replaced: dict[tuple[str, str], Replacement] = field(default_factory=dict)


def _sort_tensors(saved: Saved, kind: str, method: Method) -> _Sorted:
    """Sort tensors by what they are for.

    `base_model.model.encoder.query.lora_B.weight` is part `lora_B` of `encoder.query`,
    `base_model.vera_A` is shared, and `base_model.model.classifier.weight` replaces the
    weight of `classifier`.
    """
    known = _key_pattern()
    result = _Sorted()
    for key, value in saved.tensors.items():
        path = key.removeprefix("base_model.model.")
        match = known.match(path)
        if ".original_module." in path:
            continue  # PEFT's own copy of a module in modules_to_save, before training
        if not set(method.training).isdisjoint(path.split(".")):
            continue
        if (shared := _shared_name(key, method)) is not None:
            result.shared[shared] = value
            continue
        if match is None:
            edit = _replacement(path, key, value)
            # Of two copies of a trained module the one under its plain name is in force.
            if path == f"{edit.module}.{edit.parameter}":
                result.replaced[edit.module, edit.parameter] = edit
            else:
                result.replaced.setdefault((edit.module, edit.parameter), edit)
            continue
        ending = ".bias" if (match["rest"] or "").endswith("bias") else ""
        part = match["part"] + ending
        if part not in method.parts:
            raise _of_another_method(key, part, kind)
        parts = result.modules.setdefault(match["module"], {})
        if part in parts:
            raise CheckpointError(
                f"the checkpoint has {part} of module {match['module']!r} twice, the second "
                f"time as {key!r}: it holds several adapters",
                hint="save one alone: save_pretrained(folder, selected_adapters=[name])",
            )
        parts[part] = value
    return result


def _of_another_method(key: str, part: str, kind: str) -> CheckpointError:
    """The error about a tensor that the method of the configuration does not have."""
    others = [name for name, method in METHODS.items() if part in method.parts]
    whose = f"a tensor of {' or '.join(others)}" if others else "no tensor of any known method"
    return CheckpointError(
        f"the checkpoint has {key!r}, which is {whose}, but its configuration's peft_type "
        f"{kind} is another method",
        hint="was adapter_config.json copied from another adapter, or were two adapters put "
        "into one file?",
    )


def _shared_name(key: str, method: Method) -> str | None:
    """The name of a tensor that all modules share, such as `vera_A`; None for others."""
    words = key.split(".")
    return next((".".join(words[i:]) for i, w in enumerate(words) if w in method.shared), None)


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
    plain = re.sub(r"\.((token_adapter\.)?base_layer|modules_to_save(\.[^.]+)?)$", "", module)
    return Replacement(plain, parameter, value, of_base=module.endswith(".base_layer"))


def _parameter_edit(
    module: str, name: str, parts: dict[str, Array], config: Mapping[str, Any]
) -> Edit:
    path = f"{module}.{name}"
    rank = int(number(by_pattern(path, config, "rank_pattern", config.get("r", 8)), "r"))
    scale = scale_of(path, rank, config)
    version = str(config.get("peft_version") or "")
    return parameter_edit(module, name, parts, rank, scale, version)
