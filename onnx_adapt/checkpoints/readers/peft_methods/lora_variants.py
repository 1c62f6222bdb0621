"""Variants of LoRA in PEFT that a setting turns on: other forms of A and B, or of the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from onnx_adapt.checkpoints.edits import BySize, Edit, LowRank, Reweight, Weighed
from onnx_adapt.checkpoints.readers.peft_methods.sizes import check_weight
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.saved import number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def variant_of(edit: LowRank, found: ModuleTensors) -> Edit:
    """A LoRA in the form that the settings of its configuration give it.

    Raises:
        CheckpointError: If they do not fit the tensors, or each other.
    """
    start = found.config.get("init_lora_weights")
    on = [setting for setting in _VARIANTS if found.config.get(setting)]
    if isinstance(start, str) and start.lower() in _RESIDUALS:
        on.append(start.lower())
    if not on:
        return edit
    if len(on) > 1 or edit.magnitude is not None or edit.bias is not None:
        raise CheckpointError(
            f"module {edit.module!r}: {', '.join(on)} with another variant of LoRA or "
            "lora_bias is not supported",
            hint="merge the adapter in PyTorch and export again",
        )
    if on[0] == "olora" and found.config.get("fan_in_fan_out"):
        raise CheckpointError(
            f"module {edit.module!r}: init_lora_weights='olora' on a Conv1D is not supported: "
            "PEFT decomposes its weight the other way round",
            hint="convert the adapter with PEFT's path_initial_model_for_weight_conversion",
        )
    if on[0] in _RESIDUALS:
        return _on_residual(edit, _RESIDUALS[on[0]])
    return _VARIANTS[on[0]](edit, found)


def _pooled(edit: LowRank, found: ModuleTensors) -> Edit:
    """QA-LoRA (arXiv 2309.14717): A reads the means of groups of inputs, times their number.

    Only layers of GPTQ are pooled in PEFT; A of others has a number for each input.
    """
    group = int(number(found.config.get("qalora_group_size"), "qalora_group_size"))

    def make(inputs: int, _: int) -> LowRank:
        pools = edit.a.shape[1]
        if pools == inputs or pools * group != inputs:
            return edit
        return replace(edit, a=np.repeat(edit.a, group, axis=1) * (pools / group))

    return BySize(edit.module, make)


def _block_diagonal(edit: LowRank, found: ModuleTensors) -> Edit:
    """BD-LoRA: A or B is block-diagonal; the file has its blocks one below the other."""
    settings = found.config["use_bdlora"]
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"use_bdlora {settings!r} is no setting")
    blocks = int(number(settings.get("nblocks"), "nblocks"))
    target = edit.module.rpartition(".")[2]
    on_a, on_b = (
        any(name in target for name in settings.get(f"target_modules_bd_{part}") or ())
        for part in "ab"
    )

    def make(inputs: int, _: int) -> LowRank:
        if on_a:
            return replace(edit, a=_diagonal(edit.a, blocks, inputs, edit.module))
        return replace(edit, b=_diagonal(edit.b, blocks, len(edit.a), edit.module))

    return BySize(edit.module, make) if on_a or on_b else edit


def _diagonal(stacked: Array, blocks: int, width: int, module: str) -> Array:
    """Lay blocks along the diagonal: `(rows, width / blocks)` becomes `(rows, width)`."""
    if blocks < 1 or len(stacked) % blocks or blocks * stacked.shape[1] != width:
        raise CheckpointError(
            f"module {module!r}: {list(stacked.shape)} is not {blocks} blocks (nblocks) of a "
            f"matrix with {width} columns"
        )
    rows, columns = len(stacked) // blocks, stacked.shape[1]
    result = np.zeros((blocks, rows, blocks, columns))
    for i in range(blocks):
        result[i, :, i] = stacked[i * rows : (i + 1) * rows]
    return result.reshape(blocks * rows, blocks * columns)


def _of_singular_values(edit: LowRank, found: ModuleTensors) -> Edit:
    """KaSA (arXiv 2412.06071): the base loses its r smallest singular values to the update."""
    diagonal = found.read("lora_diag", len(edit.a))
    return _on_residual(replace(edit, a=edit.a * diagonal[:, None]), _minor)


def _on_residual(edit: LowRank, taken: Callable[[Array, LowRank], Array]) -> Reweight:
    """A LoRA for which a part of the base is taken away: `W' = W - taken(W) + scale * BA`."""

    def compute(weight: Array, bias: Array | None) -> Weighed:
        check_weight(edit.module, weight, len(edit.b), edit.a.shape[1])
        return weight - taken(weight, edit) + edit.scale * (edit.b @ edit.a), bias

    return Reweight(edit.module, compute, 2 * len(edit.a))


def _minor(weight: Array, edit: LowRank) -> Array:
    """What KaSA takes away: the part of the r smallest singular values."""
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    rank = len(edit.a)
    return np.asarray((u[:, -rank:] * s[-rank:]) @ v[-rank:])


def _principal(weight: Array, edit: LowRank) -> Array:
    """What PiSSA (arXiv 2404.02948) starts from: the part of the r largest singular values."""
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    rank = len(edit.a)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


def _orthonormal(weight: Array, edit: LowRank) -> Array:
    """What OLoRA (arXiv 2406.01775) starts from: r columns of a QR decomposition, scaled."""
    q, r = np.linalg.qr(weight)
    rank = len(edit.a)
    return np.asarray(edit.scale * (q[:, :rank] @ r[:rank]))


def _activated(edit: LowRank, found: ModuleTensors) -> LowRank:
    """Activated LoRA (arXiv 2504.12397): the update is on from its invocation tokens on."""
    tokens = found.config["alora_invocation_tokens"]
    if not isinstance(tokens, list) or any(type(t) is not int or t < 0 for t in tokens):
        raise CheckpointError(
            f"alora_invocation_tokens is {tokens!r}, which is no list of token ids",
            hint="was adapter_config.json written by hand? PEFT writes a list of numbers",
        )
    return replace(edit, invocation=tuple(tokens))


_VARIANTS: dict[str, Callable[[LowRank, ModuleTensors], Edit]] = {
    "use_qalora": _pooled,
    "use_bdlora": _block_diagonal,
    "kasa_config": _of_singular_values,
    "alora_invocation_tokens": _activated,
}
"""The settings that change the form of A and B, or the base."""

_RESIDUALS: dict[str, Callable[[Array, LowRank], Array]] = {
    "pissa": _principal,
    "olora": _orthonormal,
}
"""The values of `init_lora_weights` that take away from the base what they start from."""
