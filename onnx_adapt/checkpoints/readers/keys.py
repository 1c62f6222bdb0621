"""The keys of a checkpoint as the model has them: without wrappers and training state.

Trainers wrap the modules of a model, and a wrapper's name stands in the keys of what it holds:

    base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight
    module.base_model.model.model.layers.0._orig_mod.self_attn.q_proj.lora_A.weight

Both are `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from onnx_adapt.checkpoints.readers.saved import Saved
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_log = logging.getLogger(__name__)

_WRAPPERS = (
    *("_fsdp_wrapped_module", "_fpw_module"),  # FullyShardedDataParallel, now and before 1.12
    "_checkpoint_wrapped_module",  # torch's checkpoint_wrapper
    "_orig_mod",  # torch.compile
    "_forward_module",  # Lightning Fabric
)
"""Names of attributes that only wrappers have; settings with patterns can have them too."""

_WRAPPED = re.compile(rf"(?<!\w)(?:{'|'.join(_WRAPPERS)})(?:\\?\.|$)")

_AROUND = (
    ("module.", ""),  # DistributedDataParallel, DataParallel and DeepSpeed
    ("base_model.model.module.", "base_model.model."),
    ("base_model.model.base_model.model.", "base_model.model."),  # PEFT around PEFT
)
"""Beginnings that a wrapper gives to all keys; a model may have such names of its own."""

_STATE = {
    "a buffer that is computed, not trained": re.compile(
        r".*\b(original_)?inv_freq|.*\.(cos_cached|sin_cached|masked_bias|position_ids)"
        r"|.*\.num_batches_tracked"
    ),
    "a state of the training": re.compile(
        r"(module\.)?(optimizer|optimizers|optimizer_states?|optim|lr_schedulers?|scheduler"
        r"|grad_scaler|loss_scaler|rng_states?)\..*|(global_)?step|epoch"
        r"|.*\.(exp_avg|exp_avg_sq|momentum_buffer)"
    ),
}
"""What in a file has no effect on a model's outputs, by what it is."""


def with_plain_keys(saved: Saved) -> Saved:
    """Drop the names of wrappers from a checkpoint's keys, and tensors that are no weights.

    What is dropped for having no effect is named in a warning.

    Raises:
        CheckpointError: If two keys are one without the wrappers' names.
    """
    return replace(
        saved,
        tensors=_unwrapped(_trained(saved.tensors)),
        head=_unwrapped(_trained(saved.head)),
        config={name: _plain_setting(value) for name, value in saved.config.items()},
    )


def _trained(tensors: Mapping[str, Array]) -> dict[str, Array]:
    for what, pattern in _STATE.items():
        names = [key for key in tensors if pattern.fullmatch(key)]
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            _log.warning("left out %s: %s, without effect on the outputs", shown, what)
            tensors = {key: value for key, value in tensors.items() if key not in names}
    return dict(tensors)


_SHOWN = 4


def _unwrapped(tensors: Mapping[str, Array]) -> dict[str, Array]:
    names = {key: _WRAPPED.sub("", key) for key in tensors}
    while change := _wrapper_of_all(names.values()):
        old, new = change
        names = {key: new + name.removeprefix(old) for key, name in names.items()}
    first: dict[str, str] = {}
    for key, name in names.items():
        if (other := first.setdefault(name, key)) != key:
            raise CheckpointError(
                f"{other!r} and {key!r} are one weight of the model, {name!r}, and the "
                "checkpoint has both",
                hint="was it saved twice, with a wrapper and without? leave one of them out",
            )
    return {name: tensors[key] for name, key in first.items()}


def _wrapper_of_all(names: Iterable[str]) -> tuple[str, str] | None:
    """The beginning that all keys have from a wrapper, and what stands there without it."""
    keys = list(names)
    return next(
        ((old, new) for old, new in _AROUND if keys and all(k.startswith(old) for k in keys)),
        None,
    )


def _plain_setting(value: Any) -> Any:
    """A setting without the names of wrappers, which patterns of modules can have."""
    match value:
        case str():
            return _WRAPPED.sub("", value)
        case dict():
            return {_WRAPPED.sub("", pattern): item for pattern, item in value.items()}
        case list():
            return [_WRAPPED.sub("", x) if isinstance(x, str) else x for x in value]
        case _:
            return value
