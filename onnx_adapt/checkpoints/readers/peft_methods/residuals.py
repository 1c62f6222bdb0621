"""LoRA that began with a part of the weight, which was taken out of the weight for it.

An example. PiSSA begins with the first r singular values of W. PEFT splits W in two, of which
only the second stays as it is, and trains the first:

    W = W_r + rest        W' = rest + scale * B A = W - W_r + scale * B A

`W_r` follows from W, and so does what the adapter adds to the weight of the exported base. It
has rank 2 r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank, Reweight, Weighed
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_REFUSED = {
    "pissa_": "began with random approximations of singular vectors",
    "corda": "began with data that is not in the checkpoint",
    "loftq": "began with the errors of a quantisation that is not in the checkpoint",
    "lora_ga": "began with gradients that are not in the checkpoint",
}
"""Initialisations that cannot be told from the base's weight, and what they began with."""

_CONVERT = "convert the adapter with PEFT's path_initial_model_for_weight_conversion"


def taken_out(config: Mapping[str, Any]) -> str:
    """Which part of the weight a LoRA began with: `pissa`, `olora`, or '' for none.

    Raises:
        CheckpointError: If that cannot be told from the base's weight.
    """
    start = config.get("init_lora_weights")
    name = start.lower() if isinstance(start, str) else ""
    for refused, why in _REFUSED.items():
        if name.startswith(refused):
            raise CheckpointError(
                f"init_lora_weights={start!r}: training changed the base model's own weights "
                f"and {why}",
                hint=_CONVERT,
            )
    return name if name in ("pissa", "olora") else ""


def trained_residual(edit: LowRank, start: str, config: Mapping[str, Any]) -> Reweight:
    """LoRA that began with a part of the weight, as what the weight is trained to be.

    Args:
        edit: The LoRA.
        start: What `taken_out` told.
        config: The checkpoint's configuration.

    Raises:
        CheckpointError: If it is combined with what PEFT does not combine it with.
    """
    turned = start == "olora" and config.get("fan_in_fan_out")
    extra = edit.magnitude is not None or edit.bias is not None
    if extra or edit.a.ndim != 2 or turned:
        raise CheckpointError(
            f"module {edit.module!r}: init_lora_weights={start!r} with DoRA or "
            "lora_bias, of a convolution or of a Conv1D is not supported",
            hint=_CONVERT,
        )
    rank = len(edit.a)

    def compute(weight: Array, bias: Array | None) -> Weighed:
        part = (
            _leading(weight, rank) if start == "pissa" else _first(weight, rank) * edit.scale
        )
        return weight - part + edit.scale * (edit.b @ edit.a), bias

    return Reweight(edit.module, compute, 2 * rank)


def _leading(weight: Array, rank: int) -> Array:
    """The part of a weight that its first singular values make: W times a projection.

    The projection is onto the last eigenvectors of W^T W, which are found sooner than all
    singular vectors.
    """
    if weight.shape[0] < weight.shape[1]:
        return _leading(weight.T, rank).T
    _, vectors = np.linalg.eigh(weight.T @ weight)
    kept = vectors[:, -rank:]
    return np.asarray(weight @ kept @ kept.T)


def _first(weight: Array, rank: int) -> Array:
    """The part of a weight that the first columns of Q in its QR decomposition make."""
    columns, _ = np.linalg.qr(weight[:, :rank])
    return np.asarray(columns @ (columns.T @ weight))
