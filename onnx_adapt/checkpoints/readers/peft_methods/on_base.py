"""DEFT and Super-Tuning of PEFT: the trained weight is computed from the base's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, LowRank, Reweight, Weighed
from onnx_adapt.checkpoints.readers.peft_methods.sizes import check_weight
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.saved import number, refuse_rank_zero
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def deft_edits(found: ModuleTensors) -> Iterator[Edit]:
    """DEFT: a part of the weight's outputs is taken away, and another put in its place.

    `W' = W - Q right^T W + Q R`, where P is trained and `Q = right = qr(P)`, or `Q = P` and
    `right = relu(P)`. With `para` there is no R.
    """
    config, module = found.config, found.module
    p = found.read("deft_P", None, None)
    outputs, rank = p.shape
    q, right = _projection(p, str(config.get("decomposition_method")))
    added = found.read("deft_R", rank, None) if not config.get("para") else None
    scale = number(config["alpha"], "alpha") / rank if config.get("alpha") else 1.0

    def compute(weight: Array, bias: Array | None) -> Weighed:
        inputs = weight.shape[1] if added is None else added.shape[1]
        check_weight(module, weight, outputs, inputs)
        change = -(right.T @ weight)
        if added is not None:
            change += scale * added
        return weight + q @ change, bias

    yield Reweight(module, compute, rank)


def _projection(p: Array, method: str) -> tuple[Array, Array]:
    if method == "qr":
        q = np.linalg.qr(p)[0]
        return q, q
    if method == "relu":
        return p, np.maximum(p, 0)
    raise CheckpointError(f"decomposition_method={method!r} is not known; qr and relu are")


def supertuning_edits(found: ModuleTensors) -> Iterator[Edit]:
    """Super-Tuning (arXiv 2607.09287): single numbers of the weight change, beside a LoRA."""
    module = found.module
    values = found.read("supertuning_values", None)
    if "supertuning_indices" not in found.parts:
        raise CheckpointError(
            f"module {module!r} has no supertuning_indices: the checkpoint was saved with "
            "save_precomputed_indices=False, and the order of equal weights is not defined",
            hint="set save_precomputed_indices=True in PEFT and save it again",
        )
    indices = found.read("supertuning_indices", len(values)).astype(np.int64)
    if len(np.unique(indices)) != len(indices):
        raise CheckpointError(f"module {module!r}: supertuning_indices has a place twice")
    low_rank = _added_lora(found)

    def compute(weight: Array, bias: Array | None) -> Weighed:
        trained = weight.reshape(-1).copy()
        if indices.size and not (indices.min() >= 0 and indices.max() < trained.size):
            raise CheckpointError(
                f"module {module!r}: supertuning_indices points outside of the base's weight "
                f"{list(weight.shape)}",
                hint="is it an adapter for another size of this model?",
            )
        trained[indices] += values
        if low_rank is not None:
            check_weight(module, weight, len(low_rank.b), low_rank.a.shape[1])
            trained += low_rank.scale * (low_rank.b @ low_rank.a).reshape(-1)
        return trained.reshape(weight.shape), bias

    yield Reweight(module, compute)


def _added_lora(found: ModuleTensors) -> LowRank | None:
    """The LoRA beside the sparse values; None without one."""
    if not {"supertuning_lora_A", "supertuning_lora_B"} & found.parts.keys():
        return None
    a = found.read("supertuning_lora_A", None, None)
    b = found.read("supertuning_lora_B", None, len(a))
    refuse_rank_zero(found.module, len(a))
    return LowRank(found.module, a, b, number(found.config["lora_alpha"], "alpha") / len(a))
