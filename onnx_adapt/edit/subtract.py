"""Subtract a base from a full fine-tune of it: the difference as an adapter."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from onnx_adapt.adapter.compressing import refuse_odd_target
from onnx_adapt.checkpoints.load import Checkpoint
from onnx_adapt.edit.differences import Wanted
from onnx_adapt.edit.subtract_models import subtract_models
from onnx_adapt.edit.subtract_weights import subtract_weights
from onnx_adapt.errors import CheckpointError
from onnx_adapt.model.file import Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.slot.manifest import read_manifest


def subtract(
    base: ModelLike,
    tuned: ModelLike,
    *,
    base_weights: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    name: str = "",
) -> Checkpoint:
    """Make an adapter of the difference between a full fine-tune and its base.

    Matrices of layers become LoRA, the nearest of the rank; `checkpoint.losses` says how far
    off each is. Biases, normalisations and what LoRA would not make smaller are replaced,
    which is exact. `insert_checkpoint` makes the model that the adapter is for.

    Args:
        base: The base.
        tuned: The fine-tune: a model of the same graph, or the path of its `.onnx` file or
            of its weights in PyTorch's names (`.safetensors` or `.bin`).
        base_weights: The path of the base's weights, if `tuned` is a path.
        rank: The rank of each LoRA; less where the weight is narrower.
        energy: Instead of a rank, the share of each difference's energy to keep.
        name: The name of the adapter; by default that of the tuned file.

    Raises:
        CheckpointError: If the two are not of one model, a difference has no place in an
            adapter, or there is none.
        AdapterError: If neither a rank nor an energy is given, or they are out of range.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> tuned = base.copy()
        >>> bias = tuned.proto.graph.initializer[0]
        >>> bias.raw_data = bytes(len(bias.raw_data))
        >>> checkpoint = oa.subtract(base, tuned, rank=4, name="zeroed")
        >>> len(checkpoint.slots), len(checkpoint.adapter.replaced)
        (0, 1)
    """
    refuse_odd_target(rank, energy)
    wanted = Wanted(rank, energy)
    base = as_model(base)
    if isinstance(tuned, onnx.ModelProto) or _is_onnx(tuned):
        tuned = as_model(tuned)
    for model in (base, tuned):
        if isinstance(model, Model) and read_manifest(model.proto) is not None:
            raise CheckpointError(
                f"{model.label} has slots already",
                hint="`onnx-adapt remove` gives the model without them",
            )
    if isinstance(tuned, Model):
        if base_weights is not None:
            raise CheckpointError(
                "base_weights has no effect where the tuned model is an ONNX model",
                hint="leave it out, or give the path of the tuned weights",
            )
        label = name or (tuned.path.stem if tuned.path else "tuned")
        return subtract_models(base, tuned, wanted, label)
    if base_weights is None:
        raise CheckpointError(
            f"{tuned} holds weights, and the base's are needed to tell what changed",
            hint="give the base's .safetensors or .bin: base_weights=, or as BASE",
        )
    return subtract_weights(base, Path(base_weights), Path(tuned), wanted, name)


def _is_onnx(tuned: ModelLike) -> bool:
    return isinstance(tuned, str | os.PathLike) and Path(tuned).suffix == ".onnx"
