"""Read LoRA saved by loralib and minLoRA: bare `lora_A` and `lora_B` in a state dict."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from onnx_adapt.checkpoints.edits import Edit, Replacement
from onnx_adapt.checkpoints.readers.by_keys import file_by_keys, tensors_by_keys
from onnx_adapt.checkpoints.readers.factors import low_rank, sort_by_module, spread_groups
from onnx_adapt.checkpoints.readers.files import CONFIG, Files
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage, number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_MINLORA = ".parametrizations.weight.0"
_ENDINGS = {
    f"{_MINLORA}.lora_A": "lora_A",
    f"{_MINLORA}.lora_B": "lora_B",
    ".lora_A": "lora_A",
    ".lora_B": "lora_B",
}
_OWN_KEY = re.compile(r".+\.lora_A$")


def _fits(keys: Collection[str]) -> bool:
    return any(_OWN_KEY.match(key) for key in keys)


def is_loralib(files: Files) -> bool:
    """Whether files are a state dict with the bare factors of loralib."""
    return file_by_keys(files, _fits) != ""


def read_loralib(files: Files) -> Saved:
    """Read a state dict, and the adapter_config.json that was put beside it.

    Raises:
        CheckpointError: If a file is damaged.
    """
    return Saved(files.path, "loralib", files.config(), tensors_by_keys(files, _fits))


def loralib_edits(saved: Saved) -> list[Edit]:
    """Read what LoRA of loralib or minLoRA asks for.

    Raises:
        CheckpointError: If lora_alpha is not said, or a tensor is of no known kind.
    """
    config = saved.config
    if "lora_alpha" not in config:
        raise CheckpointError(
            f"{saved.path} does not say the scale: loralib and minLoRA keep it in the program",
            hint=f'put a file {CONFIG} with {{"lora_alpha": 16}}, the lora_alpha of '
            "training, beside it, and give the folder",
        )
    alpha = number(config["lora_alpha"], "lora_alpha")
    modules, others = sort_by_module(saved.tensors, _ENDINGS)
    edits: list[Edit] = []
    for module, parts in modules.items():
        with name_damage(saved, module):
            a, b = parts["lora_A"], parts["lora_B"]
            rank = max(b.shape[-1], 1)
            if a.ndim == b.ndim == 2 and len(a) > rank and len(a) % rank == 0:
                edits += _merged(module, a, b, alpha / rank, config)
            else:
                edits.append(low_rank(module, a, b, alpha / rank))
    return edits + [_bias(key, value) for key, value in others.items()]


# `loralib.MergedLinear` is one layer of several projections of equal size, such as q, k and v,
# of which `enable_lora` says which are trained. A has the rows of these, and so has B: for q
# and v of [True, False, True] with rank 2 and 4 outputs each, A is (4, in) and B (8, 2). The
# update of the layer has three blocks of rows, the second of them zero, so B becomes (12, 4):
#
#     B_q  0
#      0   0
#      0  B_v


def _merged(
    module: str, a: Array, b: Array, scale: float, config: Mapping[str, Any]
) -> Iterator[Edit]:
    enabled, rank = config.get("enable_lora"), b.shape[1]
    if not isinstance(enabled, list) or not all(type(on) is bool for on in enabled):
        raise CheckpointError(
            f"module {module!r} is a MergedLinear, with A {list(a.shape)} and B "
            f"{list(b.shape)}, and which of its projections were trained is not in the file",
            hint=f'say it in {CONFIG}: {{"enable_lora": [true, false, true]}} for q and v of '
            "q, k, v",
        )
    count = sum(enabled)
    if len(a) != count * rank or len(b) % count:
        raise CheckpointError(
            f"module {module!r}: enable_lora {enabled} does not fit A {list(a.shape)} and B "
            f"{list(b.shape)}"
        )
    yield low_rank(module, a, spread_groups(b, enabled), scale)


def _bias(key: str, value: Array) -> Replacement:
    """A bias that was trained with the factors (`lora_state_dict` with bias)."""
    module, _, parameter = key.rpartition(".")
    if parameter != "bias" or not module:
        raise CheckpointError(
            f"the checkpoint has {key!r} beside its factors, and does not say whether it was "
            "trained",
            hint="save lora.lora_state_dict(model) of loralib, or get_lora_state_dict(model) "
            "of minLoRA, alone",
        )
    return Replacement(module, parameter, value)
